"""Makes the C library give memory back. Pictures and bodies of many megabytes come and go in this process.

glibc raises, with each large block that is freed, the size from which it asks the kernel for a block of its own, up to
32 MiB; from then on large blocks come from its heap and stay there between small ones (mallopt(3), M_MMAP_THRESHOLD).
A threshold that is set stays as it is.
"""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
THRESHOLD = 2**18  # bytes


def fix_thresholds() -> None:
    """Large blocks are the kernel's from now on, and the heap shrinks. Without mallopt it does nothing."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, THRESHOLD)
