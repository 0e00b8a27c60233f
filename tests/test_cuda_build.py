"""The GPU operators without a GPU: their kernels run on the CPU, and nvcc, if installed, builds them.

g++ compiles model/native/cuda with tests/cuda_on_cpu/cuda_runtime.h in place of CUDA's; the exported functions are then
called as MindSpore calls them and compared with float64 NumPy.
"""

import ctypes
import re
import subprocess
from functools import partial
from pathlib import Path

import mindspore
import numpy as np
import pytest
from cuda_libraries import build_operators
from mindspore import nn, ops
from native_calls import CUDA_ERROR, DTYPE, SHAPE, TENSOR_COUNT, call, check_refusals, results
from test_operators import SHAPES, cost_volume_numpy, warp_numpy

from model.layers import conv
from model.native import build
from model.precision import Precision

FUNCTIONS = ("CostVolume", "CostVolumeGradient", "Warp", "WarpGradient", "BiasActivation", "BiasActivationGradient")
# Besides those of test_operators: several tiles in each direction, rows of whole quads, channels of several stages (8)
# and groups (16).
ALL_SHAPES = [*SHAPES, (2, 19, 17, 36), (1, 33, 9, 18)]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library as g++ compiles it; it traps at any index outside an array's declared sizes."""
    target = tmp_path_factory.mktemp("cuda") / "ops_on_cpu.so"
    build_operators(target)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=[0, 1], ids=["threads", "reversed"])
def library(on_cpu: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """That library with the threads between two barriers in either order, which a result must not depend on."""
    ctypes.c_int.in_dll(on_cpu, "run_threads_reversed").value = request.param
    return on_cpu


def check_cost_volume(library: ctypes.CDLL, shape: tuple[int, ...], shift: int = 0) -> None:
    """Values and both gradients of the cost volume with its LeakyReLU."""
    rng = np.random.default_rng(0)
    costs_shape = (shape[0], 81, *shape[2:])
    first, second = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    gradient = rng.normal(size=costs_shape).astype(np.float32)
    exact = [array.astype(np.float64) for array in (first, second, gradient)]
    costs = cost_volume_numpy(exact[0], exact[1], exact[2])[0]
    activated = results(library, "CostVolume", (first, second), [costs_shape], shift)[0]
    np.testing.assert_allclose(activated, np.where(costs > 0, costs, 0.1 * costs), rtol=1e-4, atol=1e-5)
    # The sign is the activated output's: costs near zero may round to either side.
    upstream = np.where(activated > 0, exact[2], 0.1 * exact[2])
    gradients = cost_volume_numpy(exact[0], exact[1], upstream)[1:]
    inputs = (first, second, activated.copy(), gradient)
    found = results(library, "CostVolumeGradient", inputs, [shape, shape], shift)
    for array, expected in zip(found, gradients, strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_cost_volume_is_right_for_every_shape(library: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    """Values and gradients for odd sizes, single rows and columns, several tiles."""
    check_cost_volume(library, shape)


def test_cost_volume_is_right_at_any_address(library: ctypes.CDLL) -> None:
    """Arrays whose addresses are not multiples of a quad's size."""
    check_cost_volume(library, (1, 3, 4, 24), shift=1)


def flow_of(kind: str, size: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Flow that points between pixels, at them, far away, along the border, or is not a number."""
    h, w = size[2:]
    flow = {
        "fraction": lambda: rng.integers(-3, 3, size) + rng.uniform(0.1, 0.9, size),
        "zero": lambda: np.zeros(size),
        "integer": lambda: rng.integers(-2, 3, size),
        "far": lambda: rng.choice([-1e30, -1e6, 1e4, 1e30], size),
        "none": lambda: np.full(size, np.nan),
    }
    if kind != "border":
        return flow[kind]().astype(np.float32)
    # All target positions on the last column or row, or between its pixels.
    columns, rows = np.meshgrid(np.arange(w), np.arange(h))
    along = rng.uniform(0, 1, (size[0], h, w))
    last = rng.integers(0, 2, (size[0], h, w)).astype(bool)
    u = np.where(last, w - 1, (along * (w - 1)).astype(np.float32)) - columns
    v = np.where(last, (along * (h - 1)).astype(np.float32), h - 1) - rows
    return np.stack([u, v], 1).astype(np.float32)


@pytest.mark.parametrize("kind", ["fraction", "zero", "integer", "far", "border", "none"])
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_warp_is_right_for_every_shape_and_flow(library: ctypes.CDLL, shape: tuple[int, ...], kind: str) -> None:
    """Values and both gradients; many pixels that point to one position; positions outside are zero."""
    rng = np.random.default_rng(1)
    features, gradient = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    flow = flow_of(kind, (shape[0], 2, *shape[2:]), rng)
    # The position is a float32 sum; the reference must round it alike to agree on what is outside.
    rows, columns = np.indices(shape[2:], np.float32)
    grid = np.stack([columns, rows])
    position = grid + flow - grid.astype(np.float64)
    expected = warp_numpy(features.astype(np.float64), position, gradient.astype(np.float64))

    found = [
        *results(library, "Warp", (features, flow), [shape]),
        *results(library, "WarpGradient", (features, flow, gradient), [shape, flow.shape]),
    ]
    for array, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-4, atol=1e-5)
    if kind == "zero":
        np.testing.assert_array_equal(found[0], features)
    if kind in ("far", "none"):
        assert not any(array.any() for array in found)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [*ALL_SHAPES, (3, 2, 31, 37)])
def test_bias_and_activation_are_right_for_every_shape(
    library: ctypes.CDLL, shape: tuple[int, ...], dtype: type[np.floating]
) -> None:
    """Values and both gradients; several blocks and turns of a thread; sums in float32 of float16 numbers."""
    rng = np.random.default_rng(2)
    x, gradient = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    bias = rng.normal(size=shape[1]).astype(np.float32)
    check = partial(np.testing.assert_allclose, rtol=1e-6 if dtype is np.float32 else 1e-3, atol=1e-6)

    (y,) = results(library, "BiasActivation", (x, bias), [shape], dtypes=[dtype])
    exact = x.astype(np.float64) + bias[:, None, None]
    check(y, np.where(exact > 0, exact, 0.1 * exact))

    found = results(library, "BiasActivationGradient", (y, gradient), [shape, bias.shape], dtypes=[dtype, np.float32])
    before = gradient.astype(np.float64) * np.where(y > 0, 1, 0.1)
    check(found[0], before)
    np.testing.assert_allclose(found[1], before.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_overflows_stay_overflows(library: ctypes.CDLL) -> None:
    """Loss scaling finds them: in float16 the largest numbers become infinite, and what is no number stays none."""
    x = np.array([65504, -65504, np.inf, -np.inf, np.nan], np.float16).reshape(1, 1, 1, 5)
    bias, ones = np.array([32], np.float32), np.ones_like(x)
    (y,) = results(library, "BiasActivation", (x, bias), [x.shape], dtypes=[x.dtype])
    np.testing.assert_array_equal(y.ravel(), np.array([np.inf, -6547, np.inf, -np.inf, np.nan], np.float16))
    found = results(library, "BiasActivationGradient", (ones, x), [x.shape, (1,)], dtypes=[x.dtype, np.float32])
    np.testing.assert_array_equal(found[0], x)
    assert np.isnan(found[1])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_tensors_are_accepted(library: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    """An output that is not empty although the features are is zero."""
    n, _, h, w = shape
    features, flow = np.zeros(shape, np.float32), np.zeros((n, 2, h, w), np.float32)
    costs = np.zeros((n, 81, h, w), np.float32)
    bias = np.zeros(shape[1], np.float32)
    outputs = [
        *results(library, "BiasActivation", (features, bias), [shape]),
        *results(library, "BiasActivationGradient", (features, features), [shape, bias.shape]),
        *results(library, "CostVolume", (features, features), [costs.shape]),
        *results(library, "CostVolumeGradient", (features, features, costs, costs), [shape, shape]),
        *results(library, "Warp", (features, flow), [shape]),
        *results(library, "WarpGradient", (features, flow, features), [shape, flow.shape]),
    ]
    assert not any(array.any() for array in outputs)


def test_wrong_calls_are_refused_with_a_reason(on_cpu: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    check_refusals(on_cpu, capfd)
    x, bias = np.zeros((1, 2, 3, 4), np.float16), np.zeros(2, np.float32)
    for name, inputs, outputs, expected, message in [
        ("BiasActivation", (x,), [], TENSOR_COUNT, "1 tensors, expected 3"),
        ("BiasActivation", (x.astype(np.float64), bias), [x.shape], DTYPE, "x is float64, expected float32"),
        ("BiasActivation", (x, bias), [x.shape], DTYPE, "y is float32, expected float16"),
        ("BiasActivation", (x, bias[1:]), [x.shape], SHAPE, "bias has shape (1), expected (2)"),
        ("BiasActivationGradient", (x, x.astype(np.float32)), [x.shape, (2,)], DTYPE, "gradient is float32, expected"),
    ]:
        assert call(on_cpu, name, inputs, outputs)[0] == expected
        assert message in capfd.readouterr().err


def test_errors_of_cuda_come_back(on_cpu: ctypes.CDLL) -> None:
    """More samples than a grid can have in its third direction."""
    many = np.zeros((65536, 1, 1, 1), np.float32)
    assert call(on_cpu, "CostVolume", (many, many), [(65536, 81, 1, 1)])[0] == CUDA_ERROR + 9


def test_mindspore_calls_the_functions(on_cpu: ctypes.CDLL) -> None:
    """Its dtype names, and several outputs."""
    features = (np.arange(120).reshape(1, 5, 4, 6) / 64).astype(np.float32)
    flow = np.full((1, 2, 4, 6), 0.5, np.float32)
    inputs = (features, flow, features)
    expected = [
        *results(on_cpu, "Warp", inputs[:2], [features.shape]),
        *results(on_cpu, "WarpGradient", inputs, [features.shape, flow.shape]),
    ]
    forward = ops.Custom(f"{on_cpu._name}:Warp", lambda x, _: x, lambda x, _: x, func_type="aot")
    backward = ops.Custom(
        f"{on_cpu._name}:WarpGradient", lambda x, y, _: (x, y), lambda x, y, _: (x, y), func_type="aot"
    )
    tensors = [mindspore.Tensor(array) for array in inputs]
    for found, array in zip((forward(*tensors[:2]), *backward(*tensors)), expected, strict=True):
        np.testing.assert_array_equal(found.asnumpy(), array)


def sum_of_squares(cell: nn.Cell, x: mindspore.Tensor) -> mindspore.Tensor:
    return cell(x).astype(mindspore.float32).square().sum()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_layers_compute_as_with_operators_of_mindspore(
    on_cpu: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """A level of the pyramid as on a GPU, but for MindSpore's convolutions: features and the gradients of weights."""
    monkeypatch.setattr(build, "load_library", lambda device: on_cpu)
    found = []
    for backend in ("native", "mindspore"):
        layers = nn.SequentialCell(conv(3, 16, backend, stride=2), conv(16, 32, backend, dilation=2))
        weights, rng = layers.trainable_params(), np.random.default_rng(3)
        for weight in weights:
            weight.set_data(mindspore.Tensor(rng.normal(0, 0.3, weight.shape), mindspore.float32))
        for layer in layers:
            layer[0].set_precision(precision)
        image = mindspore.Tensor(rng.normal(size=(2, 3, 32, 32)), mindspore.float32)
        features = layers(image)
        assert features.dtype == getattr(mindspore, precision)
        gradients = ops.grad(sum_of_squares, None, weights)(layers, image)
        found.append([array.asnumpy().astype(np.float64) for array in (features, *gradients)])
    for array, expected in zip(*found, strict=True):
        error = np.linalg.norm(array - expected) / np.linalg.norm(expected)
        assert error < (1e-6 if precision == "float32" else 5e-3)


@pytest.mark.slow
def test_nvcc_builds_without_a_warning(tmp_path: Path) -> None:
    """Prints what ptxas reports about each kernel (pytest -s)."""
    try:
        target = build.gpu_target()
    except build.BuildError as reason:
        pytest.skip(str(reason))
    path = tmp_path / "ops.so"
    built = subprocess.run(
        [*target.command, "-Xptxas", "-v", *map(str, target.sources), "-o", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    for kernel, spilled, registers in re.findall(
        r"Compiling entry function '(.*)\n(?:.*\n)*?.*bytes stack frame, (\d+) .*\n"
        r".*Used (\d+) registers",
        built.stderr,
    ):
        print(f"{kernel}: {registers} registers, {spilled} bytes spilled")
    library = ctypes.CDLL(str(path))
    for name in FUNCTIONS:
        assert hasattr(library, name), name
    # No GPU is needed to refuse a call.
    assert library.Warp(0, None, None, None, None, None, None) == TENSOR_COUNT
