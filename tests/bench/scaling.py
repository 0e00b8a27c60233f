"""How training scales over ranks: speed, what the all-reduce takes of it, and what to expect of GPUs.

python tests/bench/scaling.py [--ranks 1 2] [--batch N] [--size H W] [--steps N] [--repeats N]
                              [--gpu-step MS ...]

Ranks are on this machine, with one thread each (OMP_NUM_THREADS=1), so that two ranks have twice the
cores of one; the jobs of a repeat follow each other. The prediction for GPUs is arithmetic, from the
gradient's bytes and rates of links that are printed with it; nothing of it was measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = 8_639_230
BYTES = 4 * WEIGHTS
"""Of the gradient, float32."""
NVLINK, NETWORK, LATENCY = 230e9, 20e9, 30e-6
"""Bytes per second that a ring all-reduce moves over each link: about what nccl-tests reports as bus
bandwidth on eight A100 with NVSwitch, and four fifths of one 200 Gb/s InfiniBand port per machine;
seconds per step of the ring."""


def job(ranks, options):
    """What rank 0 of a job of so many ranks found, a dict of seconds."""
    words = ["mpirun", "--oversubscribe", "-n", ranks, sys.executable,
             os.path.join(HERE, "scaling_child.py"), options.batch, *options.size, options.steps]
    done = subprocess.run([str(word) for word in words], text=True, stdout=subprocess.PIPE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"error: the job of {ranks} rank(s) ended with status {done.returncode}")
    return json.loads(lines[0])


def ring(ranks, bytes_per_second):
    """Seconds of a ring all-reduce of the gradient: each link carries 2 (n - 1) / n of its bytes."""
    return 2 * (ranks - 1) * (BYTES / ranks / bytes_per_second + LATENCY)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--batch", type=int, default=2, help="pairs on each rank (default 2)")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 192), metavar=("H", "W"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--gpu-step", type=float, nargs="+", default=(50, 100, 200), metavar="MS",
                        help="milliseconds of a step on one GPU, for the prediction")
    options = parser.parse_args()

    found = {ranks: [] for ranks in options.ranks}
    for _ in range(options.repeats):
        for ranks in options.ranks:
            found[ranks].append(job(ranks, options))
    median = {ranks: {key: statistics.median(entry[key] for entry in entries)
                      for key in entries[0]} for ranks, entries in found.items()}

    height, width = options.size
    print(f"batch {options.batch} a rank, {height}x{width}, one thread a rank, float32, "
          f"{options.steps} steps, medians of {options.repeats} job(s)\n")
    print("| ranks | s a step | pairs/s | efficiency | all-reduce, s | of the step | start, s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    base = options.ranks[0]
    for ranks, entry in median.items():
        reduce = entry.get(f"all_reduce {WEIGHTS}", 0.0)
        rate = ranks * options.batch / entry["step"]
        efficiency = median[base]["step"] / entry["step"]
        start = f"{entry['first_collective']:.1f}" if "first_collective" in entry else "-"
        print(f"| {ranks} | {entry['step']:.2f} | {rate:.2f} | {efficiency:.2f} | {reduce:.3f} | "
              f"{reduce / entry['step']:.1%} | {start} |")
    for ranks, entry in median.items():
        if ranks > 1:
            print(f"\nAll-reduce over {ranks} ranks:\n\n| numbers | ms | MB/s |\n| ---: | ---: | ---: |")
            for key, seconds in entry.items():
                if key.startswith("all_reduce ") and key.split()[1].isdigit():
                    size = int(key.split()[1])
                    print(f"| {size:,} | {1e3 * seconds:.2f} | {4e-6 * size / seconds:.0f} |")
            apart, together = entry["all_reduce apart"], entry[f"all_reduce {WEIGHTS}"]
            print(f"\nThe gradient in one vector, as train/step.py has it: {1e3 * together:.1f} ms; each of "
                  f"its 118 tensors by itself: {1e3 * apart:.1f} ms, {apart / together:.2f} times as long.")

    print(f"\nExpected of GPUs, by arithmetic: {BYTES / 1e6:.1f} MB of gradient, a ring over {NVLINK / 1e9:.0f} "
          f"GB/s inside a machine,\n{NETWORK / 1e9:.0f} GB/s between machines, {1e6 * LATENCY:.0f} us a hop, after "
          "the backward pass and not beside it:\n")
    print("| ms a step on one | 8 GPUs, one machine | 64 GPUs, eight machines |")
    print("| ---: | ---: | ---: |")
    for step in options.gpu_step:
        inside, across = 1e3 * ring(8, NVLINK), 1e3 * ring(64, NETWORK)
        print(f"| {step:g} | {step / (step + inside):.3f} | {step / (step + across):.3f} |")
    print("\n(efficiency: speed over that of as many single GPUs)")


if __name__ == "__main__":
    main()
