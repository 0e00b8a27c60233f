"""Sums whose bits do not depend on timing, which MindSpore's own do not promise."""

import math

from mindspore import Tensor, ops


def ordered_sum(x: Tensor) -> Tensor:
    """Sum all elements in an order that depends on their number alone.

    On the CPU MindSpore splits the sum of a vector of 200,000 elements or more between threads, tries
    several splits in its first calls, keeps the fastest and adds the parts in the order in which the
    threads finish: the bits depend on timing and on the number of threads. (ReduceSum's
    AccelerateLongVector and ParallelLaunchAutoSearch; the context's deterministic="ON" changes
    nothing.) Along one axis of a matrix, each sum is one thread's, from front to back, however the
    sums are shared out. So this is two of those, first over about sqrt(n) rows of sqrt(n)
    elements, which also keeps the rounding error of float32 small.

    Args:
        x: of any shape with at least one element; differentiable.

    Returns:
        () of the type of x.
    """
    rows, width = _split(x.size)
    x = x.reshape(-1)
    partial = x[: rows * width].reshape(rows, width).sum(1)
    if x.size > rows * width:
        partial = ops.concat((partial, x[rows * width :]))
    return partial.reshape(1, -1).sum(1)[0]


@ops.constexpr
def _split(size: int) -> tuple[int, int]:
    """Rows and their width; fewer than `width` elements are left over."""
    width = math.isqrt(size)
    return size // width, width
