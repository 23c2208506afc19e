"""Tell the C library to keep freed memory, or to give it back. A no-op where the C library is not glibc."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>
KEEP_BYTES = 16 * 1024 * 1024  # at the top of the heap: the copies of some blocks of each connection
BLOCK_BYTES = 4 * 1024 * 1024  # smaller ones come from the heap, not from the kernel; it grows by as much


def keep_freed_memory() -> bool:
    """Call once, at the start of a process that exchanges checkpoints. Gives back whether it took effect.

    Every 255 KiB block of a transfer is copied about ten times on its way through SSH. By default glibc gives such
    memory back to the kernel and takes it again, zeroed, page by page. *Measured*, sending six files of 95 MB: 370,546
    page faults without this and 14,765 with it, a quarter less processor time, the same peak memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_TRIM_THRESHOLD: KEEP_BYTES, _MMAP_THRESHOLD: BLOCK_BYTES, _TOP_PAD: BLOCK_BYTES}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def give_freed_memory_back() -> bool:
    """To the system, now; was there any? *Measured*, after a round of HSL with ResNet18 at 64 px: the trainer keeps
    1.4 GB without this and 0.8 GB with it, as much as before the round."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False
