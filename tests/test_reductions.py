"""Sums have the same bits in every call, on any number of threads, on an idle and on a busy machine."""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mindspore import Tensor, grad, nn, ops, value_and_grad

from model.losses import make_loss
from model.operators import normalize_pair
from model.reductions import ordered_sum

pytestmark = pytest.mark.usefixtures("graph_mode")

Call = Callable[[], list[Tensor]]
"""Computes something; its results must have the same bits in every call."""
PARAMETERS = 8_639_230
"""Of the network: the size of its gradient, odd but for a factor of 2."""


class Sum(nn.Cell):
    def construct(self, x: Tensor) -> Tensor:
        return ordered_sum(x)


def numbers(size: int) -> np.ndarray:
    """Positive and negative numbers of very different sizes, (size,) float32."""
    rng = np.random.default_rng(size)
    return (rng.normal(size=size) * np.exp(rng.normal(0, 3, size))).astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 5000))
@example(size=1)
@example(size=2)
@example(size=3)
@example(size=PARAMETERS)
def test_sum_is_that_of_float64(size: int) -> None:
    """No element is left out or counted twice, whatever the size."""
    x = numbers(size)
    total, magnitude = x.sum(dtype=np.float64), np.abs(x).sum(dtype=np.float64)
    assert abs(float(Sum()(Tensor(x))) - total) <= 5e-7 * magnitude


def test_gradient_is_one_everywhere() -> None:
    x = Tensor(numbers(3 * 5 * 7).reshape(3, 5, 7))

    def squares(x: Tensor) -> Tensor:
        return ordered_sum(ops.square(x))

    gradient = grad(squares)(x)
    np.testing.assert_array_equal(gradient.asnumpy(), 2 * x.asnumpy())


def cancelling(size: int) -> np.ndarray:
    """Numbers whose second half takes away nearly all of the first, (size,) float32.

    Any other order of summation shows in the last bits of what is left.
    """
    half = np.random.default_rng(0).random(size // 2, np.float32)
    return np.concatenate((half, -np.float32(0.999) * half))


def large_sum() -> Call:
    """Of as many numbers as the gradient has."""
    x, total = Tensor(cancelling(PARAMETERS)), Sum()
    return lambda: [total(x)]


def losses_and_gradients() -> Call:
    """Of both multi-scale losses, on maps of more than the 200,000 pixels that MindSpore splits."""
    n, height, width = 2, 320, 448
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 2, height >> level, width >> level)) for level in (6, 5, 4, 3, 2)]
    arrays += [cancelling(2 * n * height * width).reshape(n, 2, height, width), rng.random((n, 1, height, width)) < 0.3]
    arguments = [Tensor(array.astype(np.float32)) for array in arrays]
    losses = [make_loss(name) for name in ("multiscale", "robust", "sparse")]

    def total(*inputs: Tensor) -> Tensor:
        return sum(loss(inputs[:5], inputs[5], inputs[6]).sum() for loss in losses)

    step = value_and_grad(total, (0, 1, 2, 3, 4))

    def call() -> list[Tensor]:
        value, gradients = step(*arguments)
        return [value, *gradients]

    return call


def normalized_features() -> Call:
    """The statistics that features are normalised by, and their gradient, in a batch of 1 and of 2."""
    pairs = [[Tensor(cancelling(n * 64 * 48 * 56).reshape(n, 64, 48, 56) * (i + 1)) for i in range(2)] for n in (1, 2)]

    def total(features1: Tensor, features2: Tensor) -> Tensor:
        normalized1, normalized2 = normalize_pair(features1, features2)
        return ordered_sum(ops.square(normalized1) * normalized2)

    step = value_and_grad(total, (0, 1))

    def call() -> list[Tensor]:
        return [
            array for pair in pairs for part in step(*pair) for array in (part if isinstance(part, tuple) else (part,))
        ]

    return call


CALLS = """
import hashlib, sys
import mindspore
sys.path.insert(0, {folder!r})
from test_reductions import large_sum, losses_and_gradients, normalized_features
mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU", runtime_num_threads={threads})
for make, calls in ((large_sum, 110), (losses_and_gradients, 17), (normalized_features, 17)):
    call = make()
    print(make.__name__, *sorted({{hashlib.sha256(b"".join(array.asnumpy().tobytes() for array in call())).hexdigest()
                                   for _ in range(calls)}}))
"""


@pytest.mark.slow
def test_bits_do_not_depend_on_calls_threads_or_load() -> None:
    """More calls than the 15 in which MindSpore tries its splits, in processes that disturb each other."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CALLS.format(folder=os.path.dirname(__file__), threads=threads)],
            text=True,
            stdout=subprocess.PIPE,
        )
        for threads in (1, 2, 3)
    ]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert printed[0] == printed[1] == printed[2]
    for line in printed[0].splitlines():
        assert len(line.split()) == 2, line
    assert len(printed[0].splitlines()) == 3
