"""The peak memory of this process."""

import re
from pathlib import Path

import torch


def peak_memory() -> int | None:
    """Return this process's peak resident memory in KiB, or None on a system without /proc."""
    status = Path("/proc/self/status")
    match = re.search(r"^VmHWM:\s+(\d+)", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(match[1]) if match else None


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: that of tensors on a GPU, or of this process on a CPU (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * (peak_memory() or 0)
