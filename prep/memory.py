"""Memory of the C library: keep large freed blocks for the next allocation."""

import ctypes

# Parameters of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_blocks() -> None:
    """Keep large blocks that this process frees, instead of returning them to the system.

    Each array of a pair is a block of up to some megabytes. Returned and requested again, every page costs a page
    fault, which together take about as long as decoding. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the maximum that it accepts
        mallopt(M_TRIM_THRESHOLD, 1 << 28)
