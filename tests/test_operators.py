"""The operators against float64 NumPy written straight from their definitions: values, gradients."""

import functools
from collections.abc import Callable

import mindspore
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from model import native
from model.backend import Backend
from model.layers import Convolution, conv, keep_blocked_layout
from model.operators import CostVolume, Warp
from model.precision import Precision
from model.pwcnet import FlowEstimator

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


@functools.cache  # so that a graph is compiled once for each Cell and shape
def gradient_function(cell: nn.Cell, count: int) -> Callable[..., tuple]:
    """The function that gives the gradients of `Product(cell)` for a Cell's `count` inputs and its weights, if any."""
    return ops.grad(Product(cell), tuple(range(1, count + 1)), cell.trainable_params() or None)


def run_with_gradients(cell: nn.Cell, gradient: np.ndarray, *inputs: np.ndarray) -> list[np.ndarray]:
    """A Cell's value and its inputs' and weights' gradients in float32, as NumPy arrays."""
    upstream, *tensors = (Tensor(array.astype(np.float32)) for array in (gradient, *inputs))
    weights = cell.trainable_params()
    gradients = gradient_function(cell, len(inputs))(upstream, *tensors)
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


@functools.cache
def make_warp(backend: Backend) -> Warp:
    """The same Cell for all tests of a backend, so that they share its graphs."""
    return Warp("bilinear", backend)


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
    value, to_features, to_flow = run_with_gradients(make_warp(backend), gradient, features, flow)
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
    "channels,stride,dilation,activation",
    [
        ((3, 16), 2, 1, True),  # the first of the pyramid
        ((19, 32), 1, 1, True),  # channels of no multiple of a vector
        ((40, 2), 1, 1, False),  # a flow
        ((17, 33), 1, 4, True),
        ((32, 16), 1, 16, True),  # of the context network
    ],
)
@pytest.mark.parametrize("size", [(1, 9), (13, 22)])
def test_convolution_equals_its_definition(
    size: tuple[int, int],
    channels: tuple[int, int],
    stride: int,
    dilation: int,
    activation: bool,
    backend: Backend,
) -> None:
    """Values and gradients with every combination of settings that the network uses."""
    if size[0] == 1 and stride == 2:
        pytest.skip("levels of one row are not halved")
    rng = np.random.default_rng(3)
    cell = Convolution(*channels, backend, stride=stride, dilation=dilation, activation=activation)
    x = rng.normal(size=(2, channels[0], *size))
    weight, bias = rng.normal(size=cell.weight.shape) / 10, rng.normal(size=channels[1])
    cell.weight.set_data(Tensor(weight.astype(np.float32)))
    cell.bias.set_data(Tensor(bias.astype(np.float32)))
    gradient = rng.normal(size=(2, channels[1], *(-(-side // stride) for side in size)))
    expected = convolution_numpy(x, weight, bias, stride, dilation, activation, gradient)
    for found, value in zip(run_with_gradients(cell, gradient, x), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-4)


def need_native_convolution(precision: Precision) -> None:
    """Skip where there is no native convolution in this precision."""
    if not (native.available() and native.has_operator("Convolution3x3")):
        pytest.skip("no native convolution here")
    if precision == "bfloat16" and not native.has_bfloat16():
        pytest.skip("this processor has no bfloat16")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "channels,dilation,size",
    [
        ((270, 40), 1, (1, 16, 17)),
        ((17, 64), 1, (2, 12, 14)),
        ((48, 33), 3, (2, 13, 20)),
        ((32, 128), 4, (2, 16, 19)),
    ],
    ids=["channels in chunks, tiles in an odd number", "whole tiles", "dilated, parts of tiles", "dilated"],
)
def test_large_convolutions_round_as_their_factors_do(
    channels: tuple[int, int], dilation: int, size: tuple[int, ...], precision: Precision, graph_mode: None
) -> None:
    """Images that are large enough for Winograd's filtering: values and gradients, with their error."""
    need_native_convolution(precision)
    rng = np.random.default_rng(7)
    activation = precision == "float32"  # rounding to bfloat16 changes signs, and so slopes
    cell = Convolution(*channels, "native", dilation=dilation, activation=activation)
    cell.set_precision(precision)
    x, gradient = (rng.normal(size=(size[0], count, *size[1:])) for count in channels)
    weight, bias = rng.normal(size=cell.weight.shape) / 10, rng.normal(size=channels[1])
    cell.weight.set_data(Tensor(weight.astype(np.float32)))
    cell.bias.set_data(Tensor(bias.astype(np.float32)))
    x, gradient, weight, bias = (array.astype(np.float32).astype(np.float64) for array in (x, gradient, weight, bias))
    expected = convolution_numpy(x, weight, bias, 1, dilation, activation, gradient)
    # A number is rounded by up to 6e-8 of it in float32, by up to 4e-3 in bfloat16.
    low, high = (0, 1e-6) if precision == "float32" else (1e-4, 5e-3)
    for found, value in zip(run_with_gradients(cell, gradient, x), expected, strict=True):
        error = np.sqrt(np.mean((found - value) ** 2) / np.mean(value**2))
        assert low < error < high, error


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_layout_between_convolutions_changes_nothing(precision: Precision, graph_mode: None) -> None:
    """Channels of no multiple of a block, with stride and dilation, by oneDNN and by Winograd's filtering. Nor does it
    change anything that the first layer reads an image."""
    need_native_convolution(precision)
    rng = np.random.default_rng(8)
    mindspore.set_seed(0)  # of the weights
    layers = [conv(3, 20, "native", stride=2), conv(20, 33, "native"), conv(33, 18, "native", dilation=2)]
    for layer in layers:
        layer[0].set_precision(precision)
    x, gradient = rng.normal(size=(2, 3, 32, 36)), rng.normal(size=(2, 18, 16, 18))
    plain = run_with_gradients(nn.SequentialCell(layers), gradient, x)
    layers[0][0].reads_image = True
    keep_blocked_layout(layers)
    assert layers[0](Tensor(x.astype(np.float32))).shape == (2, 2, 16, 18, 16)
    blocked = run_with_gradients(nn.SequentialCell(layers), gradient, x)
    for index, (found, value) in enumerate(zip(blocked, plain, strict=True)):
        # In bfloat16, the gradients between the convolutions are rounded once more.
        error = np.sqrt(np.mean((found - value) ** 2) / np.mean(value**2))
        assert error < (2**-8 if index and precision == "bfloat16" else 1e-6), error


@pytest.mark.parametrize("backend,precision", [("native", "float32"), ("native", "bfloat16"), ("mindspore", "float32")])
def test_a_change_of_precision_leaves_no_trace(backend: Backend, precision: Precision, graph_mode: None) -> None:
    """Layers that were set to float16 first give the same bits as others."""
    if backend == "native":
        need_native_convolution(precision)
    x, results = Tensor(np.random.default_rng(9).normal(size=(1, 3, 16, 18)).astype(np.float32)), []
    for precisions in ([precision], ["float16", precision]):
        mindspore.set_seed(0)  # of the weights
        layers = [conv(3, 20, backend), conv(20, 7, backend)]
        keep_blocked_layout(layers)
        for choice in precisions:
            for layer in layers:
                layer[0].set_precision(choice)
        results.append(nn.SequentialCell(layers)(x).asnumpy())
    assert results[0].dtype == results[1].dtype == np.float32
    np.testing.assert_array_equal(*results)


@pytest.fixture
def bfloat16(graph_mode: None) -> None:
    """Skips where the processor does not multiply bfloat16 numbers."""
    need_native_convolution("bfloat16")


@pytest.mark.parametrize("channels,stride,dilation,activation", [((19, 32), 2, 1, True), ((32, 48), 1, 8, False)])
def test_bfloat16_rounds_only_what_it_multiplies(
    channels: tuple[int, int], stride: int, dilation: int, activation: bool, bfloat16: None
) -> None:
    """With factors that bfloat16 has, only the upstream gradient is rounded: sums, biases and results are float32."""
    rng = np.random.default_rng(4)
    cell = Convolution(*channels, "native", stride=stride, dilation=dilation, activation=activation)
    cell.set_precision("bfloat16")
    x, weight = rng.integers(-128, 129, (2, channels[0], 24, 30)) / 64, rng.integers(-64, 65, cell.weight.shape) / 256
    bias = rng.normal(size=channels[1])
    cell.weight.set_data(Tensor(weight.astype(np.float32)))
    cell.bias.set_data(Tensor(bias.astype(np.float32)))
    gradient = rng.normal(size=(2, channels[1], *(-(-side // stride) for side in x.shape[2:])))
    expected = convolution_numpy(x, weight, bias, stride, dilation, activation, gradient)
    found = run_with_gradients(cell, gradient, x)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
    for array, value in zip(found[1:], expected[1:], strict=True):
        error = np.sqrt(np.mean((array - value) ** 2) / np.mean(value**2))
        assert 1e-4 < error < 2**-8, error  # half of bfloat16's spacing is at most 2 ** -9 of a number


class Estimator(nn.Cell):
    """A dense flow estimator with a reader of its features, computed by one operator or, if not `fused`, by many."""

    def __init__(self, channels: int, reader: str, fused: bool) -> None:
        super().__init__()
        self.estimator = FlowEstimator(channels, True, "native", reader)
        self.reader = reader
        self.context = conv(self.estimator.channels_out + 2 * self.estimator.with_flow, 33, "native", dilation=2)
        assert self.estimator.is_fused
        self.estimator.is_fused = fused

    def construct(self, x: Tensor) -> Tensor:
        features, flow = self.estimator(x)
        if self.reader == "":
            return flow
        if self.reader != "upsampling":
            features = self.context(features)
        return ops.concat((features, flow), 1)


class TwoEstimators(nn.Cell):
    """One that gives only a flow, and one whose features are read, too."""

    def __init__(self, channels: int, fused: bool) -> None:
        super().__init__()
        self.first = Estimator(channels, "", fused)
        self.second = Estimator(channels + 2, "context and flow", fused)

    def construct(self, x: Tensor) -> Tensor:
        return self.second(ops.concat((x, self.first(x)), 1))


def check_equal(cells: list[nn.Cell], gradient: np.ndarray, x: np.ndarray) -> None:
    """A fused cell and one of single layers have the same values and gradients, once they have the same weights."""
    for fused, single in zip(*(cell.trainable_params() for cell in cells), strict=True):
        fused.set_data(single)
    results = [run_with_gradients(cell, gradient, x) for cell in cells]
    for fused, single in zip(*results, strict=True):
        scale = np.sqrt(np.mean(single**2)) + 1e-30  # of the context's weights, which may have no gradient
        np.testing.assert_allclose(fused / scale, single / scale, rtol=1e-3, atol=3e-5)


def test_flow_estimators_have_gradients_of_their_own(graph_mode: None) -> None:
    """MindSpore gives operators of one name the gradient of one of them."""
    if not (native.available() and native.estimator_block(False)):
        pytest.skip("no native flow estimator here")
    rng = np.random.default_rng(9)
    mindspore.set_seed(0)  # of the weights
    cells = [TwoEstimators(19, fused) for fused in (True, False)]
    x, gradient = rng.normal(size=(2, 19, 6, 7)), rng.normal(size=(2, 35, 6, 7))
    check_equal(cells, gradient, x)


def output_channels(cell: Estimator) -> int:
    """Channels of the cell's result."""
    features = {"": 0, "upsampling": cell.estimator.channels_out}
    return 2 + features.get(cell.reader, 33)


@pytest.mark.parametrize(
    "reader,shape",
    [
        ("", (1, 81, 6, 7)),
        ("upsampling", (2, 117, 1, 1)),
        ("upsampling", (2, 83, 13, 14)),
        ("context", (2, 115, 5, 9)),
        ("context and flow", (3, 115, 5, 9)),
        ("context and flow", (2, 16, 3, 20)),
        ("context", (2, 83, 13, 14)),
        ("context and flow", (2, 16, 13, 14)),
    ],
    ids=[
        "one image, only the flow",
        "a single pixel",
        "Winograd's filtering, features",
        "no multiple of a block",
        "the flow in the last block",
        "the flow in a block of its own",
        "Winograd's filtering",
        "Winograd's filtering, the flow in a block of its own",
    ],
)
def test_flow_estimator_equals_its_layers(reader: str, shape: tuple[int, ...], graph_mode: None) -> None:
    """Features, flow and gradients are those of six convolutions with concatenation; images do not mix."""
    if not (native.available() and native.estimator_block(False)):
        pytest.skip("no native flow estimator here")
    rng = np.random.default_rng(5)
    mindspore.set_seed(0)  # of the weights
    cells = [Estimator(shape[1], reader, fused) for fused in (True, False)]
    x, gradient = rng.normal(size=shape), rng.normal(size=(shape[0], output_channels(cells[0]), *shape[2:]))
    check_equal(cells, gradient, x)


@pytest.mark.parametrize("reader", ["upsampling", "context and flow"])
def test_flow_estimator_in_bfloat16_is_close_to_float32(reader: str, bfloat16: None) -> None:
    """Values are within bfloat16's rounding, gradients within what a changed sign before an activation makes of it."""
    if not native.estimator_block(True):
        pytest.skip("no native flow estimator here")
    rng = np.random.default_rng(6)
    mindspore.set_seed(0)  # of the weights
    cells = [Estimator(83, reader, fused=True) for _ in range(2)]
    x, gradient = rng.normal(size=(2, 83, 12, 14)), rng.normal(size=(2, output_channels(cells[0]), 12, 14))
    for half, single in zip(*(cell.trainable_params() for cell in cells), strict=True):
        half.set_data(single)
    cells[0].estimator.set_precision("bfloat16")
    cells[0].context[0].set_precision("bfloat16")
    results = [run_with_gradients(cell, gradient, x) for cell in cells]
    for index, (half, single) in enumerate(zip(*results, strict=True)):
        if single.any():
            error = np.sqrt(np.mean((half - single) ** 2) / np.mean(single**2))
            low = -1 if single.shape == (2,) else 1e-4  # the flow's biases are not rounded
            assert low < error < (0.01 if index == 0 else 0.15), error
