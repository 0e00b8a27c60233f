"""How training scales over ranks: step time, gradient sum, start-up, and what to expect of GPUs.

python tests/bench/scaling.py [--ranks 1 2] [--batch N] [--size H W] [--steps N] [--repeats N]
                              [--hosts] [--gpu-step MS ...]

Ranks are on this machine, with one thread each (OMP_NUM_THREADS=1), so that two ranks have twice the
cores of one; the jobs of a repeat follow each other. With --hosts each rank has a host of its own, a network
namespace with one of the cores, and messages go over TCP. A bare MPI_Allreduce of the same vector is timed in
the same job; so are steps that exchange nothing, which show what the machine itself allows. The prediction for
GPUs is arithmetic, from the gradient's bytes and rates of links that are printed with it; nothing of it was
measured.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

from hosts import Hosts

os.environ.update(OMP_NUM_THREADS="1", OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
WEIGHTS = 8_639_230
BYTES = 4 * WEIGHTS
"""Of the gradient, float32."""
NVLINK, NETWORK, LATENCY = 230e9, 20e9, 30e-6
"""Bytes per second that a ring all-reduce moves over each link: about what nccl-tests reports as bus
bandwidth on eight A100 with NVSwitch, and four fifths of one 200 Gb/s InfiniBand port per machine;
seconds per step of the ring."""


def job(ranks: int, options: argparse.Namespace) -> dict[str, float]:
    """Run scaling_child.py on some ranks; returns what rank 0 measured, in seconds.

    Each rank has a core, if there are enough. A single one would use more: MindSpore's threads are not only OpenMP's.
    """
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    child = [sys.executable, HERE / "scaling_child.py", options.batch, *options.size, options.steps, time.time()]
    words = [str(word) for word in child]
    if options.hosts:
        with tempfile.TemporaryDirectory() as folder, Hosts(folder, ranks, cores) as hosts:
            process = hosts.mpirun(*words)
            output, errors = process.communicate()
    else:
        process = subprocess.Popen(
            ["mpirun", "--oversubscribe", "-n", str(ranks), *words],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        output, errors = process.communicate()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        sys.exit(f"{errors}error: the job of {ranks} rank(s) ended with status {process.returncode}")
    return json.loads(lines[0])


def import_seconds(ranks: int) -> float:
    """Seconds that importing MindSpore takes in so many processes at once, the slowest of them."""
    program = "import time; start = time.time(); import mindspore; print(time.time() - start)"
    done = subprocess.run(
        ["mpirun", "--oversubscribe", "-n", str(ranks), sys.executable, "-c", program],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return max(float(line) for line in done.stdout.split())


def ring(ranks: int, bytes_per_second: float) -> float:
    """Seconds of a ring all-reduce of the gradient: each link carries 2 (n - 1) / n of its bytes."""
    return 2 * (ranks - 1) * (BYTES / ranks / bytes_per_second + LATENCY)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how training scales over ranks.")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--batch", type=int, default=2, help="pairs on each rank (default 2)")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 192), metavar=("H", "W"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--hosts", action="store_true", help="each rank on a host of its own (needs root and iproute2)")
    parser.add_argument(
        "--gpu-step",
        type=float,
        nargs="+",
        default=(50, 100, 200),
        metavar="MS",
        help="milliseconds of a step on one GPU, for the prediction",
    )
    options = parser.parse_args()

    found = {ranks: [] for ranks in options.ranks}
    for _ in range(options.repeats):
        for ranks in options.ranks:
            found[ranks].append({**job(ranks, options), "import": import_seconds(ranks)})
    median = {
        ranks: {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        for ranks, entries in found.items()
    }

    height, width = options.size
    print(
        f"batch {options.batch} a rank, {height}x{width}, one thread a rank, float32, "
        f"{options.steps} steps, medians of {options.repeats} job(s)\n"
    )
    print(
        "| ranks | s a step | pairs/s | efficiency | without sums | sum of gradients, ms | to bare MPI_Allreduce | "
        "first sum after, s | of it MindSpore's import | equal weights |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    base = options.ranks[0]
    for ranks, entry in median.items():
        rate = ranks * options.batch / entry["step"]
        efficiency = statistics.median(
            one["step"] / many["step"] for one, many in zip(found[base], found[ranks], strict=True)
        )
        alone = statistics.median(
            one["step"] / many["step alone"] for one, many in zip(found[base], found[ranks], strict=True)
        )
        sums = "- | -"
        if ranks > 1:
            sums = f"{1e3 * entry['sum in step']:.1f} | {entry['sum in step'] / entry[f'bare {WEIGHTS}']:.2f}"
        print(
            f"| {ranks} | {entry['step']:.3f} | {rate:.2f} | {efficiency:.2f} | {alone:.2f} | {sums} | "
            f"{entry['first_collective']:.1f} | {entry['import']:.1f} | "
            f"{'yes' if entry['equal weights'] else 'NO'} |"
        )
    for ranks, entry in median.items():
        if ranks > 1:
            print(f"\nSum over {ranks} ranks, beside a bare MPI_Allreduce:\n")
            print("| numbers | ms | bare, ms | MB/s |\n| ---: | ---: | ---: | ---: |")
            for size in sorted(int(key.split()[1]) for key in entry if key.startswith("bare ")):
                seconds, bare = entry[f"sum {size}"], entry[f"bare {size}"]
                print(f"| {size:,} | {1e3 * seconds:.2f} | {1e3 * bare:.2f} | {4e-6 * size / seconds:.0f} |")

    print(
        f"\nExpected of GPUs, by arithmetic: {BYTES / 1e6:.1f} MB of gradient, a ring over {NVLINK / 1e9:.0f} "
        f"GB/s inside a machine,\n{NETWORK / 1e9:.0f} GB/s between machines, {1e6 * LATENCY:.0f} us a hop, after "
        "the backward pass and not beside it:\n"
    )
    print("| ms a step on one | 8 GPUs, one machine | 64 GPUs, eight machines |")
    print("| ---: | ---: | ---: |")
    for step in options.gpu_step:
        inside, across = 1e3 * ring(8, NVLINK), 1e3 * ring(64, NETWORK)
        print(f"| {step:g} | {step / (step + inside):.3f} | {step / (step + across):.3f} |")
    print("\n(efficiency: speed over that of as many single GPUs)")


if __name__ == "__main__":
    main()
