"""Sums have the same bits in every call, on any number of threads, on an idle and on a busy machine."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mindspore import Tensor, grad, nn, ops

from model.reductions import ordered_sum

pytestmark = pytest.mark.usefixtures("graph_mode")

PARAMETERS = 8_639_230
"""Of the network: the gradient's size, a multiple of no power of two but 2."""


class Sum(nn.Cell):
    def construct(self, x):
        return ordered_sum(x)


def numbers(size):
    """Positive and negative numbers of very different sizes, (size,) float32."""
    rng = np.random.default_rng(size)
    return (rng.normal(size=size) * np.exp(rng.normal(0, 3, size))).astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 5000))
@example(size=1)
@example(size=2)
@example(size=3)
@example(size=PARAMETERS)
def test_sum_is_that_of_float64(size):
    """No element is left out or counted twice, whatever the size."""
    x = numbers(size)
    total, magnitude = x.sum(dtype=np.float64), np.abs(x).sum(dtype=np.float64)
    assert abs(float(Sum()(Tensor(x))) - total) <= 5e-7 * magnitude


def test_gradient_is_one_everywhere():
    x = Tensor(numbers(3 * 5 * 7).reshape(3, 5, 7))

    def squares(x):
        return ordered_sum(ops.square(x))

    gradient = grad(squares)(x)
    np.testing.assert_array_equal(gradient.asnumpy(), 2 * x.asnumpy())


CALLS = """
import sys
import numpy as np
import mindspore
from mindspore import Tensor
sys.path.insert(0, "tests")
from test_reductions import PARAMETERS, Sum
mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU",
                      runtime_num_threads=int(sys.argv[1]))
# The second half takes away nearly all of the first, so any change of the order shows in the result.
half = np.random.default_rng(0).random(PARAMETERS // 2, np.float32)
x, total = Tensor(np.concatenate((half, -np.float32(0.999) * half))), Sum()
print(*sorted({float(total(x)).hex() for _ in range(110)}))
"""


@pytest.mark.slow
def test_bits_do_not_depend_on_calls_threads_or_load():
    """More calls than MindSpore needs to try all its splits, in processes that disturb each other."""
    started = [subprocess.Popen([sys.executable, "-c", CALLS, threads], text=True,
                                stdout=subprocess.PIPE) for threads in "123"]
    seen = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(seen) == 1 and len(seen.pop().split()) == 1
