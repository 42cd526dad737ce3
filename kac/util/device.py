"""The device that this process computes on, and copies to it."""

import torch
from torch import Tensor


def default_device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to ``device``. The host does not wait for a GPU to copy it."""
    is_gpu = torch.device(device).type == "cuda"
    return values.pin_memory().to(device, non_blocking=True) if is_gpu else values
