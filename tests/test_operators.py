"""The operators against float64 NumPy written straight from their definitions: values, gradients."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from model import native
from model.backend import Backend
from model.layers import Convolution
from model.operators import CostVolume, Warp

SHAPES = [(1, 3, 1, 1), (2, 5, 1, 7), (1, 4, 9, 1), (2, 3, 5, 12), (1, 16, 13, 11)]


def cost_volume_numpy(
    features1: np.ndarray, features2: np.ndarray, gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cost volume in float64, and both gradients of its product with `gradient`."""
    n, c, h, w = features1.shape
    padded = np.zeros((n, c, h + 8, w + 8))
    padded[:, :, 4:-4, 4:-4] = features2
    costs, gradient1, gradient2 = [], np.zeros_like(features1), np.zeros_like(padded)
    for dy in range(9):
        for dx in range(9):
            window = np.s_[:, :, dy : dy + h, dx : dx + w]
            costs.append((features1 * padded[window]).mean(1))
            upstream = gradient[:, 9 * dy + dx, None] / c
            gradient1 += upstream * padded[window]
            gradient2[window] += upstream * features1
    return np.stack(costs, 1), gradient1, gradient2[:, :, 4:-4, 4:-4]


def warp_numpy(
    features: np.ndarray, flow: np.ndarray, gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
            (top + 1, left + 1, a * b, b, a),
        ):
            if row > h - 1 or column > w - 1:  # on the last row or column: weight 0
                continue
            value, upstream = features[i, :, row, column], gradient[i, :, y, x]
            result[i, :, y, x] += weight * value
            to_features[i, :, row, column] += weight * upstream
            to_flow[i, 0, y, x] += by_u * (value * upstream).sum()
            to_flow[i, 1, y, x] += by_v * (value * upstream).sum()
    return result, to_features, to_flow


def convolution_numpy(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    stride: int,
    dilation: int,
    activation: bool,
    gradient: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A 3x3 convolution with LeakyReLU in float64, and the gradients of its product."""
    h, w = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (dilation, dilation), (dilation, dilation)))
    windows = {
        (i, j): np.s_[:, :, i * dilation : i * dilation + h : stride, j * dilation : j * dilation + w : stride]
        for i, j in np.ndindex(3, 3)
    }
    y = bias[None, :, None, None] + sum(
        np.einsum("nchw,oc->nohw", padded[window], weight[:, :, i, j]) for (i, j), window in windows.items()
    )
    slope = np.where(y > 0, 1.0, 0.1 if activation else 1.0)
    before = gradient * slope
    to_padded, to_weight = np.zeros_like(padded), np.zeros_like(weight)
    for (i, j), window in windows.items():
        to_padded[window] += np.einsum("nohw,oc->nchw", before, weight[:, :, i, j])
        to_weight[:, :, i, j] = np.einsum("nohw,nchw->oc", before, padded[window])
    to_x = to_padded[:, :, dilation : dilation + h, dilation : dilation + w]
    return y * slope, to_x, to_weight, before.sum((0, 2, 3))


class Product(nn.Cell):
    """The sum of a function's value times a gradient, so that its gradients are known."""

    def __init__(self, function: nn.Cell) -> None:
        super().__init__()
        self.function = function

    def construct(self, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return (self.function(*inputs) * gradient).sum()


def run_with_gradients(cell: nn.Cell, gradient: np.ndarray, *inputs: np.ndarray) -> list[np.ndarray]:
    """A Cell's value and its inputs' and weights' gradients in float32, as NumPy arrays."""
    upstream, *tensors = (Tensor(array.astype(np.float32)) for array in (gradient, *inputs))
    weights = cell.trainable_params()
    positions = tuple(range(1, len(inputs) + 1))
    gradients = ops.grad(Product(cell), positions, weights or None)(upstream, *tensors)
    if weights:
        gradients = (gradients[0], *gradients[1])
    return [array.asnumpy() for array in (cell(*tensors), *gradients)]


@pytest.fixture(params=["native", "mindspore", "exportable"])
def backend(request: pytest.FixtureRequest, graph_mode: None) -> Backend:
    """The operators that the Cells are built from; all must agree."""
    if request.param == "native" and not native.available():
        pytest.skip("there is no compiler here")
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_volume_equals_its_definition(shape: tuple[int, ...], backend: Backend) -> None:
    """Values, channel order (rows outer), zero padding, mean over channels, both gradients."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, *shape))
    gradient = rng.normal(size=(shape[0], 81, *shape[2:]))
    cell = CostVolume(backend)
    slope = np.where(cost_volume_numpy(first, second, gradient)[0] > 0, 1, 0.1)
    costs, *gradients = cost_volume_numpy(first, second, gradient * slope)
    for found, expected in zip(
        run_with_gradients(cell, gradient, first, second), (costs * slope, *gradients), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["fraction", "zero", "integer", "far"])
@pytest.mark.parametrize("shape", SHAPES)
def test_warp_equals_its_definition(shape: tuple[int, ...], kind: str, backend: Backend) -> None:
    """Values and gradients inside, at the border and outside; zero flow changes nothing."""
    rng = np.random.default_rng(1)
    features, gradient = rng.normal(size=(2, *shape))
    size = (shape[0], 2, *shape[2:])
    flow = {
        "fraction": rng.integers(-3, 3, size) + rng.uniform(0.1, 0.9, size),
        "zero": np.zeros(size),
        "integer": rng.integers(-2, 3, size).astype(float),
        "far": rng.choice([-1e6, 1e4], size),
    }[kind]
    cell = Warp("bilinear", backend)
    value, to_features, to_flow = run_with_gradients(cell, gradient, features, flow)
    expected = warp_numpy(features, flow, gradient)
    np.testing.assert_allclose(value, expected[0], atol=1e-4)
    np.testing.assert_allclose(to_features, expected[1], atol=1e-4)
    if kind == "zero":
        np.testing.assert_allclose(value, features, atol=1e-5)
    if kind in ("fraction", "far") or backend == "native":  # at integers MindSpore's may take the other side
        np.testing.assert_allclose(to_flow, expected[2], atol=2e-3)


def test_nearest_warp_takes_the_nearest_pixel(graph_mode: None) -> None:
    """The nearest mode takes the whole value of the nearest pixel."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=(1, 3, 6, 7)).astype(np.float32)
    flow = np.empty((1, 2, 6, 7), np.float32)
    flow[:, 0], flow[:, 1] = 0.9, -1.2
    found = Warp("nearest", "native")(Tensor(features), Tensor(flow)).asnumpy()
    np.testing.assert_array_equal(found[:, :, 2:, :6], features[:, :, 1:5, 1:])


@pytest.mark.parametrize(
    "channels,stride,dilation,activation,concatenate",
    [
        ((3, 16), 2, 1, True, False),  # the first of the pyramid
        ((19, 32), 1, 1, True, True),  # of a dense estimator, channels of no multiple of a vector
        ((40, 2), 1, 1, False, False),  # a flow
        ((17, 33), 1, 4, True, False),
        ((32, 16), 1, 16, True, False),  # of the context network
    ],
)
@pytest.mark.parametrize("size", [(1, 9), (13, 22)])
def test_convolution_equals_its_definition(
    size: tuple[int, int],
    channels: tuple[int, int],
    stride: int,
    dilation: int,
    activation: bool,
    concatenate: bool,
    backend: Backend,
) -> None:
    """Values and gradients with every combination of settings that the network uses."""
    if size[0] == 1 and stride == 2:
        pytest.skip("levels of one row are not halved")
    rng = np.random.default_rng(3)
    cell = Convolution(
        *channels, backend, stride=stride, dilation=dilation, activation=activation, concatenate=concatenate
    )
    x = rng.normal(size=(2, channels[0], *size))
    weight, bias = rng.normal(size=cell.weight.shape) / 10, rng.normal(size=channels[1])
    cell.weight.set_data(Tensor(weight.astype(np.float32)))
    cell.bias.set_data(Tensor(bias.astype(np.float32)))
    total = channels[1] + (channels[0] if concatenate else 0)
    gradient = rng.normal(size=(2, total, *(-(-side // stride) for side in size)))
    y, to_x, to_weight, to_bias = convolution_numpy(
        x, weight, bias, stride, dilation, activation, gradient[:, : channels[1]]
    )
    if concatenate:
        y, to_x = np.concatenate([y, x], 1), to_x + gradient[:, channels[1] :]
    for found, expected in zip(run_with_gradients(cell, gradient, x), (y, to_x, to_weight, to_bias), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
