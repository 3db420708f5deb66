"""Memory of a process: how much it took at its peak, and giving back what it no longer needs."""

import ctypes
import resource
import sys

import torch

M_MMAP_THRESHOLD = -3
"""of glibc's malloc.h"""


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def return_freed_memory() -> None:
    """Have tensors of 4 MiB and more given back to the system as they are freed, where malloc is glibc's.

    By itself it keeps blocks of up to 32 MiB in a heap, which comes to lie in pieces: a process that trains on a CPU
    grows by hundreds of MiB, and is no faster for it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 4 * 2**20)
