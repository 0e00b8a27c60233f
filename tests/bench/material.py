"""The image pairs that benchmarks use: copies of a real one, or synthetic ones."""

import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[0] = ROOT  # `prep`, and not this folder's neighbours

from prep.datasets import Sample, flyingchairs, read_pair
from prep.formats import flow as flow_format
from prep.formats import image as image_format
from prep.shards import Manifest, stored_bytes
from prep.synthesis.version1 import make_pair

SAMPLES = os.path.join(os.path.dirname(ROOT), "shared", "samples", "FlyingChairs_release")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare --data and --pairs."""
    parser.add_argument(
        "--data", choices=("real", "synthetic"),
        default="real" if os.path.isdir(SAMPLES) else "synthetic",
        help=f"copies of the pair in {SAMPLES}, or made by prep/synthesize.py (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=640, help="default: %(default)s")


def samples(kind: str, number: int) -> list[Sample]:
    """At most `number` different pairs; of the real kind there is only one."""
    if kind == "real":
        return [read_pair(pair) for pair in flyingchairs.list_pairs(Path(SAMPLES), "")][:number]
    made = (make_pair(seed, 384, 512) for seed in range(number))
    return [{"image1": pair.image1, "image2": pair.image2, "flow": pair.flow} for pair in made]


def write_release(folder: str, kind: str, pairs: int) -> int:
    """Write pairs in the layout of FlyingChairs into a new folder; returns their total size in bytes.

    Every pair has its own files, so that they are not read from the processor's cache. Of the synthetic kind, only 40
    are different.
    """
    os.makedirs(folder)
    different = samples(kind, min(pairs, 40))
    for number in range(pairs):
        sample, stem = different[number % len(different)], os.path.join(folder, f"{number + 1:05}")
        image_format.write_ppm(f"{stem}_img1.ppm", sample["image1"])
        image_format.write_ppm(f"{stem}_img2.ppm", sample["image2"])
        flow_format.write_flo(f"{stem}_flow.flo", sample["flow"])
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def stored(folder: str) -> int:
    """The bytes on disk of a converted set's shards."""
    return stored_bytes(Manifest.load(Path(folder)).shards.values(), Path(folder))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print rows of text as a table in Markdown."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        print("| " + " | ".join(cells) + " |", flush=True)


def free(folder: str) -> None:
    """Remove a folder that a benchmark made."""
    shutil.rmtree(folder, ignore_errors=True)
