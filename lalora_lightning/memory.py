"""Memory used by training: allocated memory on a GPU, resident memory of the process on a CPU."""

import sys
from pathlib import Path

import torch

__all__ = ["peak_memory_mib", "reset_peak_memory", "resident_mib"]


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory of a GPU; on a CPU, the peak of the process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB.

    Returns:
        On a GPU, the peak of the memory allocated by PyTorch since :func:`reset_peak_memory`. On a CPU, the peak
        resident memory of the process since it started, or None on systems other than Linux.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def resident_mib() -> float | None:
    """Return the memory that the process holds now, in MiB, on Linux; None on other systems."""
    if sys.platform != "linux":
        return None
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
