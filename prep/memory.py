"""The C library's memory: how large blocks are kept between uses."""

import ctypes

# The numbers of mallopt's parameters in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_blocks() -> None:
    """Have large blocks that this process frees kept for its next ones, not given back to the
    system.

    A pair is some megabytes and each of its arrays a block. Given back and taken anew, every page
    costs a page fault, all together about as much time as the decoding. Without glibc nothing is
    done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the largest that it takes
        mallopt(M_TRIM_THRESHOLD, 1 << 28)
