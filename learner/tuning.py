"""Process-wide settings that make updates quick.

On the CPU freed memory stays with the process, and denormal numbers count as zero; on CUDA the
quickest algorithm of every convolution is found by trying.

An update on the CPU frees and takes hundreds of large tensors. By default glibc maps and unmaps
each of them, so every update faults its pages in again; measured, that took from a third to two
thirds of the whole update. With these settings freed memory stays in the heap, at the cost of a
resident size that stays at its peak.
"""

from __future__ import annotations

import ctypes
import logging

import torch

log = logging.getLogger(__name__)

# Parameters of mallopt(3); a trim threshold of -1 means never.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 1024**2


def tune_for(device: str) -> None:
    """Set this process up for updates on a device. Call once, before the first update."""
    if device.startswith("cuda"):
        # Shapes never change, so what is tried in the first updates serves all others.
        torch.backends.cudnn.benchmark = True
        return
    keep_freed_memory()
    # Decaying moments end in denormals, on which the vector units are many times slower.
    torch.set_flush_denormal(True)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory. Returns False where there is no glibc.

    It changes nothing but speed and the resident size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        log.info("allocator_unchanged reason=%s", "no mallopt in this C library")
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(key, value) == 1 for key, value in settings)
