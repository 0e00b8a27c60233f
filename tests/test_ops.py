"""The operators against float64 NumPy written straight from their definitions: values, gradients."""

import numpy as np
import pytest
from mindspore import Tensor, ops

from model.ops import cost_volume, warp

SHAPES = [(1, 3, 1, 1), (2, 5, 1, 7), (1, 4, 9, 1), (2, 3, 5, 12), (1, 16, 13, 11)]


def cost_volume_numpy(features1, features2, gradient):
    """Cost volume in float64, and both gradients of its product with `gradient`."""
    n, c, h, w = features1.shape
    padded = np.zeros((n, c, h + 8, w + 8))
    padded[:, :, 4:-4, 4:-4] = features2
    costs, gradient1, gradient2 = [], np.zeros_like(features1), np.zeros_like(padded)
    for dy in range(9):
        for dx in range(9):
            window = np.s_[:, :, dy:dy + h, dx:dx + w]
            costs.append((features1 * padded[window]).mean(1))
            upstream = gradient[:, 9 * dy + dx, None] / c
            gradient1 += upstream * padded[window]
            gradient2[window] += upstream * features1
    return np.stack(costs, 1), gradient1, gradient2[:, :, 4:-4, 4:-4]


def warp_numpy(features, flow, gradient):
    """Bilinear warping in float64, pixel by pixel, and both gradients of its product."""
    n, _, h, w = features.shape
    result = np.zeros_like(features)
    to_features, to_flow = np.zeros_like(features), np.zeros_like(flow)
    for i, y, x in np.ndindex(n, h, w):
        u, v = x + flow[i, 0, y, x], y + flow[i, 1, y, x]
        if not (0 <= u <= w - 1 and 0 <= v <= h - 1):
            continue
        left, top = int(np.floor(u)), int(np.floor(v))
        a, b = u - left, v - top
        for row, column, weight, by_u, by_v in (
                (top, left, (1 - a) * (1 - b), b - 1, a - 1),
                (top, left + 1, a * (1 - b), 1 - b, -a),
                (top + 1, left, (1 - a) * b, -b, 1 - a),
                (top + 1, left + 1, a * b, b, a)):
            if row > h - 1 or column > w - 1:  # on the last row or column: weight 0
                continue
            value, upstream = features[i, :, row, column], gradient[i, :, y, x]
            result[i, :, y, x] += weight * value
            to_features[i, :, row, column] += weight * upstream
            to_flow[i, 0, y, x] += by_u * (value * upstream).sum()
            to_flow[i, 1, y, x] += by_v * (value * upstream).sum()
    return result, to_features, to_flow


def run_with_gradients(function, first, second, gradient):
    """The function's value and both gradients in float32, as NumPy arrays."""
    first, second, gradient = (Tensor(array.astype(np.float32))
                               for array in (first, second, gradient))
    value = function(first, second)
    gradients = ops.grad(lambda a, b: (function(a, b) * gradient).sum(), (0, 1))(first, second)
    return [array.asnumpy() for array in (value, *gradients)]


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_volume(shape):
    """Values, channel order (rows outer), zero padding, mean over channels, both gradients."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, *shape))
    gradient = rng.normal(size=(shape[0], 81, *shape[2:]))
    for found, expected in zip(run_with_gradients(cost_volume, first, second, gradient),
                               cost_volume_numpy(first, second, gradient), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["fraction", "zero", "integer", "far"])
@pytest.mark.parametrize("shape", SHAPES)
def test_warp(shape, kind):
    """Values and gradients inside, at the border and outside; zero flow changes nothing."""
    rng = np.random.default_rng(1)
    features, gradient = rng.normal(size=(2, *shape))
    size = (shape[0], 2, *shape[2:])
    flow = {"fraction": rng.integers(-3, 3, size) + rng.uniform(0.1, 0.9, size),
            "zero": np.zeros(size), "integer": rng.integers(-2, 3, size).astype(float),
            "far": rng.choice([-1e6, 1e4], size)}[kind]
    value, to_features, to_flow = run_with_gradients(warp, features, flow, gradient)
    expected = warp_numpy(features, flow, gradient)
    np.testing.assert_allclose(value, expected[0], atol=1e-4)
    np.testing.assert_allclose(to_features, expected[1], atol=1e-4)
    if kind == "zero":
        np.testing.assert_allclose(value, features, atol=1e-5)
    if kind in ("fraction", "far"):  # at integers the flow's gradient depends on the side
        np.testing.assert_allclose(to_flow, expected[2], atol=2e-3)


def test_warp_nearest():
    """The nearest mode takes the whole value of the nearest pixel."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=(1, 3, 6, 7)).astype(np.float32)
    flow = np.empty((1, 2, 6, 7), np.float32)
    flow[:, 0], flow[:, 1] = 0.9, -1.2
    found = warp(Tensor(features), Tensor(flow), "nearest").asnumpy()
    np.testing.assert_array_equal(found[:, :, 2:, :6], features[:, :, 1:5, 1:])
