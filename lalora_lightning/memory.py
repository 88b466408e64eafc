"""Memory that training takes: allocated on a GPU, resident in the process on a CPU."""

import sys
from pathlib import Path

import torch

__all__ = ["peak_memory_mib", "reset_peak_memory", "resident_mib"]


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement on a GPU. The peak of a process on a CPU counts from its start and cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB.

    Returns:
        On a GPU the most that PyTorch had allocated there since :func:`reset_peak_memory`. On a CPU the most that the
        whole process held since it started, on Linux; None on other systems.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def resident_mib() -> float:
    """Return the memory that the process holds now, in MiB; Linux only."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
