"""The GPU operators without a GPU: their kernels run on the CPU, and nvcc, if there, builds them.

g++ compiles model/native/ops.cu with tests/cuda_on_cpu/cuda_fp16.h in CUDA's place; the exported
functions are then called as MindSpore calls them and compared with float64 NumPy.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import mindspore
import numpy as np
import pytest
from mindspore import ops
from test_operators import SHAPES, cost_volume_numpy, warp_numpy

from model import native

HERE = Path(__file__).parent
SOURCE = HERE.parent / "model" / "native" / "ops.cu"
FUNCTIONS = ("CostVolume", "CostVolumeGradient", "Warp", "WarpGradient")
# Besides those of test_operators: several tiles in each direction, rows of whole quads, channels of
# several stages (8) and groups (16).
ALL_SHAPES = [*SHAPES, (2, 19, 17, 36), (1, 33, 9, 18)]
TOLERANCES = {np.float32: {"rtol": 1e-4, "atol": 1e-5}, np.float16: {"rtol": 3e-3, "atol": 3e-3}}
# Elements of NaN on either side of an array: reading them spoils a result, writing them shows.
GUARD = 64
# What the functions return; 1000 and more are CUDA's own errors.
OK, PARAMETER_COUNT, TYPE, SHAPE, RANGE = range(5)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory):
    """The library as g++ compiles it; it stops at any index outside an array's declared sizes."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not there")
    if subprocess.run(
        [compiler, "-fsyntax-only", "-x", "c++", "-"], input=b"_Float16 half;", check=False, capture_output=True
    ).returncode:
        pytest.skip("this g++ knows no float16; g++ 12 and later on x86-64 do")
    target = tmp_path_factory.mktemp("cuda") / "ops_on_cpu.so"
    sanitizers = "-fsanitize=bounds,alignment,shift,signed-integer-overflow"
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            sanitizers,
            "-fsanitize-undefined-trap-on-error",
            "-x",
            "c++",
            f"-I{HERE / 'cuda_on_cpu'}",
            str(SOURCE),
            "-o",
            str(target),
        ],
        check=True,
    )
    return ctypes.CDLL(str(target))


@pytest.fixture(params=[0, 1], ids=["threads", "reversed"])
def library(on_cpu, request: pytest.FixtureRequest):
    """That library with the threads between two barriers in either order: a result that depends
    on it lacks a barrier."""
    ctypes.c_int.in_dll(on_cpu, "run_threads_reversed").value = request.param
    return on_cpu


def guarded(array, shift):
    """The array inside a larger one of NaN, `shift` elements behind a multiple of 64 bytes."""
    size = array.size + 2 * GUARD + shift
    whole = np.full(size + 64, np.nan, array.dtype)
    start = -whole.ctypes.data % 64 // array.itemsize + GUARD + shift
    inner = whole[start : start + array.size].reshape(array.shape)
    inner[...] = array
    return whole, inner


def call(library, name, inputs, outputs, shift=0):
    """Call a function as MindSpore does; `outputs` are (shape, type). Returns status, arrays."""
    blank = [np.full(shape, np.nan, dtype) for shape, dtype in outputs]
    wholes, arrays = zip(*(guarded(array, shift) for array in (*inputs, *blank)), strict=True)
    count = len(arrays)
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    status = getattr(library, name)(
        count,
        (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
        (ctypes.c_int * count)(*(array.ndim for array in arrays)),
        (ctypes.POINTER(ctypes.c_int64) * count)(*shapes),
        (ctypes.c_char_p * count)(*(array.dtype.name.encode() for array in arrays)),
        None,
        None,
    )
    for whole, array in zip(wholes, arrays, strict=True):
        assert np.isnan(whole).sum() == whole.size - array.size + np.isnan(array).sum()
    return status, arrays[len(inputs) :]


def results(library, name, inputs, outputs, shift=0):
    """The outputs of a call that must succeed."""
    status, arrays = call(library, name, inputs, outputs, shift)
    assert status == OK
    return arrays


def embed(gradient, search_range):
    """A gradient of a cost volume with a smaller search range as part of one of range 4."""
    n, _, h, w = gradient.shape
    side = 2 * search_range + 1
    whole = np.zeros((n, 9, 9, h, w))
    middle = slice(4 - search_range, 5 + search_range)
    whole[:, middle, middle] = gradient.reshape(n, side, side, h, w)
    return whole.reshape(n, 81, h, w)


def check_cost_volume(library, shape, dtype, search_range=4, shift=0) -> None:
    """Values and both gradients of the cost volume with its LeakyReLU."""
    rng = np.random.default_rng(0)
    side = 2 * search_range + 1
    costs_shape = (shape[0], side * side, *shape[2:])
    first, second = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    gradient = rng.normal(size=costs_shape).astype(dtype)
    close = TOLERANCES[dtype]

    exact = [array.astype(np.float64) for array in (first, second, gradient)]
    middle = slice(4 - search_range, 5 + search_range)
    costs = cost_volume_numpy(*exact[:2], embed(exact[2], search_range))[0]
    costs = costs.reshape(shape[0], 9, 9, *shape[2:])[:, middle, middle].reshape(costs_shape)
    features = (shape, dtype)
    activated = results(library, "CostVolume", (first, second), [(costs_shape, dtype)], shift)[0]
    np.testing.assert_allclose(activated, np.where(costs > 0, costs, 0.1 * costs), **close)
    # The sign is the activated output's: costs near zero may round to either side.
    upstream = np.where(activated > 0, exact[2], 0.1 * exact[2])
    gradients = cost_volume_numpy(*exact[:2], embed(upstream, search_range))[1:]
    found = results(
        library, "CostVolumeGradient", (first, second, activated.copy(), gradient), [features, features], shift
    )
    for array, expected in zip(found, gradients, strict=True):
        np.testing.assert_allclose(array, expected, **close)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_cost_volume(library, shape, dtype) -> None:
    """Values and gradients for odd sizes, single rows and columns, several tiles."""
    check_cost_volume(library, shape, dtype)


@pytest.mark.parametrize("search_range", [1, 2, 3])
def test_cost_volume_range(library, search_range) -> None:
    """The search range follows from the number of the costs' channels."""
    check_cost_volume(library, (1, 5, 10, 20), np.float32, search_range)
    check_cost_volume(library, (1, 5, 10, 21), np.float16, search_range)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_cost_volume_at_any_address(library, dtype) -> None:
    """Arrays whose addresses are no multiples of a quad's size."""
    check_cost_volume(library, (1, 3, 4, 24), dtype, shift=1)


def flow_of(kind, size, rng):
    """Flow that points between pixels, at them, far away, along the border, or is no number."""
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
    # All target places on the last column or row, or between its pixels.
    columns, rows = np.meshgrid(np.arange(w), np.arange(h))
    along = rng.uniform(0, 1, (size[0], h, w))
    last = rng.integers(0, 2, (size[0], h, w)).astype(bool)
    u = np.where(last, w - 1, (along * (w - 1)).astype(np.float32)) - columns
    v = np.where(last, (along * (h - 1)).astype(np.float32), h - 1) - rows
    return np.stack([u, v], 1).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["fraction", "zero", "integer", "far", "border", "none"])
@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_warp(library, shape, kind, dtype) -> None:
    """Values and both gradients; many pixels that point to one place; places outside are zero."""
    rng = np.random.default_rng(1)
    features, gradient = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    flow = flow_of(kind, (shape[0], 2, *shape[2:]), rng)
    # The place is a float32 sum; the reference must round it alike to agree on what is outside.
    rows, columns = np.indices(shape[2:], np.float32)
    grid = np.stack([columns, rows])
    place = grid + flow - grid.astype(np.float64)
    expected = warp_numpy(features.astype(np.float64), place, gradient.astype(np.float64))

    found = [
        *results(library, "Warp", (features, flow), [(shape, dtype)]),
        *results(library, "WarpGradient", (features, flow, gradient), [(shape, np.float32), (flow.shape, np.float32)]),
    ]
    np.testing.assert_allclose(found[0], expected[0], **TOLERANCES[dtype])
    for array, exact in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(array, exact, rtol=1e-4, atol=1e-5)
    if kind == "zero":
        np.testing.assert_array_equal(found[0], features)
    if kind in ("far", "none"):
        assert not any(array.any() for array in found)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing(library, shape) -> None:
    """Empty tensors are no error; what is not empty although the features are is zero."""
    n, _, h, w = shape
    features, flow = np.zeros(shape, np.float32), np.zeros((n, 2, h, w), np.float32)
    costs = np.zeros((n, 81, h, w), np.float32)
    sizes = [(array.shape, np.float32) for array in (features, flow, costs)]
    outputs = [
        *results(library, "CostVolume", (features, features), sizes[2:]),
        *results(library, "CostVolumeGradient", (features, features, costs, costs), [sizes[0], sizes[0]]),
        *results(library, "Warp", (features, flow), sizes[:1]),
        *results(library, "WarpGradient", (features, flow, features), sizes[:2]),
    ]
    assert not any(array.any() for array in outputs)


def test_errors(library) -> None:
    """Wrong counts, types, shapes and search ranges are refused, each with its own number."""
    features = np.zeros((1, 2, 3, 4), np.float32)
    costs, flow = np.zeros((1, 81, 3, 4), np.float32), np.zeros((1, 2, 3, 4), np.float32)

    def status(name, inputs, *outputs):
        return call(library, name, inputs, outputs)[0]

    of_features, of_costs = (features.shape, np.float32), (costs.shape, np.float32)
    half = features.astype(np.float16)
    assert status("CostVolume", (features,), of_costs) == PARAMETER_COUNT
    assert status("CostVolume", (features, half), of_costs) == TYPE
    assert status("CostVolume", (features, features[:, 1:]), of_costs) == SHAPE
    assert status("CostVolume", (features, features[0]), of_costs) == SHAPE
    assert status("CostVolume", (features, features), ((1, 80, 3, 4), np.float32)) == RANGE
    assert status("CostVolume", (features, features), ((1, 121, 3, 4), np.float32)) == RANGE
    assert status("CostVolumeGradient", (features, features, costs, costs[:, :49]), of_features, of_features) == SHAPE
    assert status("Warp", (features, flow.astype(np.float16)), of_features) == TYPE
    assert status("Warp", (half, flow), of_features) == TYPE
    assert status("Warp", (features, costs), of_features) == SHAPE
    assert status("WarpGradient", (features, flow), of_features, of_features) == PARAMETER_COUNT
    double = features.astype(np.float64)
    assert status("Warp", (double, flow), (double.shape, np.float64)) == TYPE
    # More samples than a grid can have in its third direction: CUDA's own error comes back.
    many = np.zeros((65536, 1, 1, 1), np.float32)
    assert status("CostVolume", (many, many), ((65536, 9, 1, 1), np.float32)) == 1009


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_as_custom_operators(on_cpu, dtype) -> None:
    """MindSpore itself calls the functions: its type names, several outputs, float32 beside
    float16."""
    features = (np.arange(120).reshape(1, 5, 4, 6) / 64).astype(dtype)
    flow = np.full((1, 2, 4, 6), 0.5, np.float32)
    inputs = (features, flow, features)
    expected = [
        *results(on_cpu, "Warp", inputs[:2], [(features.shape, dtype)]),
        *results(on_cpu, "WarpGradient", inputs, [(features.shape, np.float32), (flow.shape, np.float32)]),
    ]
    forward = ops.Custom(f"{on_cpu._name}:Warp", lambda x, _: x, lambda x, _: x, func_type="aot")
    backward = ops.Custom(
        f"{on_cpu._name}:WarpGradient",
        lambda x, y, _: (x, y),
        lambda x, y, _: (mindspore.float32, mindspore.float32),
        func_type="aot",
    )
    tensors = [mindspore.Tensor(array) for array in inputs]
    for found, array in zip((forward(*tensors[:2]), *backward(*tensors)), expected, strict=True):
        np.testing.assert_array_equal(found.asnumpy(), array)


@pytest.mark.slow
def test_nvcc_builds(tmp_path: Path) -> None:
    """nvcc compiles the file without a warning and the functions are there; prints what ptxas
    reports about each kernel (pytest -s)."""
    try:
        source, command = native.gpu_command()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    target = tmp_path / "ops.so"
    built = subprocess.run(
        [*command, "-Xptxas", "-v", str(source), "-o", str(target)], check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    for kernel, spilled, registers in re.findall(
        r"Compiling entry function '(.*)\n(?:.*\n)*?.*bytes stack frame, (\d+) .*\n"
        r".*Used (\d+) registers",
        built.stderr,
    ):
        print(f"{kernel}: {registers} registers, {spilled} bytes spilled")
    library = ctypes.CDLL(str(target))
    for name in FUNCTIONS:
        assert hasattr(library, name), name
    # No GPU is needed to refuse a call.
    assert library.Warp(0, None, None, None, None, None, None) == PARAMETER_COUNT
