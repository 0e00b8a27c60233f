"""How fast batches are read: this toolkit's reader beside a PyTorch DataLoader on the raw files.

python tests/bench/read.py [--torch-python PATH] [--data real|synthetic] [--pairs N]

Each reads, decodes, crops 384x448 at random and stacks batches of 4, from a warm page cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import material
import numpy as np

from prep import reader
from prep.datasets import Sample

BATCH, HEIGHT, WIDTH = 4, 384, 448
SKIP = 10  # batches before the clock starts


def crop(sample: Sample, rng: np.random.Generator) -> Sample:
    """A random part of a sample, HEIGHT x WIDTH."""
    height, width = sample["valid"].shape
    y, x = rng.integers(0, (height - HEIGHT + 1, width - WIDTH + 1))
    return {field: array[y : y + HEIGHT, x : x + WIDTH] for field, array in sample.items()}


def read(folder: str, pairs: int, workers: int | None) -> float:
    """Pairs per second of the toolkit's reader over as many batches as the others read."""
    steps, start = pairs // BATCH, 0
    batches = reader.training_batches(
        [(reader.DatasetSplit.open(folder, "train"), 1.0)], batch=BATCH, steps=steps, transform=crop, workers=workers
    )
    for number, _ in enumerate(batches, 1):
        if number == SKIP:
            start = time.perf_counter()
    return (steps - SKIP) * BATCH / (time.perf_counter() - start)


class Torch:
    """PyTorch's loader in a process of its own, which stays warm between the measurements."""

    def __init__(self, python: str, root: str, workers: int | None, as_float: bool) -> None:
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "torch_loader.py")
        command = [python, script, root, "--workers", workers, "--batch", BATCH,
                   "--crop", HEIGHT, WIDTH, "--skip", SKIP, *["--float"] * as_float]  # fmt: skip
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast batches are read.")
    material.add_options(parser)
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH",
                        help="an interpreter that has PyTorch (default: this one)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args()
    found = subprocess.run([options.torch_python, "-c", "import torch"], capture_output=True)
    with_torch = found.returncode == 0
    if not with_torch:
        print(f"note: {options.torch_python} has no PyTorch, which is left out (--torch-python)")
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, "data")
        raw = material.write_release(root, options.data, options.pairs)
        none = os.path.join(folder, "none.txt")
        Path(none).touch()
        sets = {codec: os.path.join(folder, codec) for codec in ("zstd", "raw")}
        for codec, out in sets.items():
            subprocess.run(
                [sys.executable, os.path.join(material.ROOT, "prep", "convert.py"), "flyingchairs",
                 "--root", root, "--out", out, "--codec", codec, "--split-file", none],
                check=True, capture_output=True,
            )  # fmt: skip
        cores = len(os.sched_getaffinity(0))
        print(f"{options.pairs} {options.data} pairs, {raw / 1e6:.0f} MB raw, {cores} cores, "
              f"{options.repeats} repeats, medians\n")  # fmt: skip
        sizes = {codec: material.stored(out) / raw for codec, out in sets.items()}
        peers = {}
        if with_torch:
            peers = {
                f"PyTorch, {workers} workers, {kind}":
                    Torch(options.torch_python, root, workers, kind == "float")
                for workers in (2, 0) for kind in ("float", "uint8")
            }  # fmt: skip
        readers = {
            **{f"this toolkit, {codec}": lambda out=out: read(out, options.pairs, None)
               for codec, out in sets.items()},
            **{name: peer.read for name, peer in peers.items()},
        }  # fmt: skip
        rates = {name: [] for name in readers}
        for repeat in range(1 + options.repeats):  # interleaved; the first time warms all of them up
            for name, measure in readers.items():
                rate = measure()
                if repeat:
                    rates[name].append(rate)
        for peer in peers.values():
            peer.end()
        medians = {name: statistics.median(values) for name, values in rates.items()}
        base = medians.get("PyTorch, 2 workers, float")
        rows = [
            [name, f"{median:.0f}", f"{min(rates[name]):.0f}-{max(rates[name]):.0f}",
             f"{median / base:.2f}" if base else "-",
             f"{sizes.get(name.rpartition(' ')[2], 1):.3f}"]
            for name, median in medians.items()
        ]  # fmt: skip
        header = ["", "pairs/s", "range", "of PyTorch's 2 workers", "bytes of raw"]
        material.print_table(header, rows)


if __name__ == "__main__":
    main()
