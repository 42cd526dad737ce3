"""How much memory this process has held at most."""

import re
from pathlib import Path

import torch


def peak_memory() -> int | None:
    """The most resident memory that this process has held, KiB; None where Linux's /proc is missing."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+)", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found[1]) if found else None


def peak_bytes(device: torch.device) -> int:
    """The most that tensors have taken of a GPU, or of the process's memory on the CPU (0 where nobody knows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * (peak_memory() or 0)
