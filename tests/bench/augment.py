"""How fast pairs are augmented, each part alone and the recipes' whole, next to what a model takes.

python tests/bench/augment.py [--data real|synthetic] [--consumes PAIRS_PER_S] [--threads N]

One pair of 384x512 is in memory and a view of 320x448 is made of it, again and again: reading and
decoding are the reader's (read.py). One thread with OpenCV's own threads off, so that the figures
are those of a core; --threads shows what that many threads at once make of them.
"""

import argparse
import concurrent.futures
import statistics
import time

import cv2
import material
import numpy as np

from prep import memory
from prep.datasets import Sample
from train.augment import Augment
from train.recipe import Recipe

CROP = (320, 448)
GEOMETRY = {"flip": True, "vertical_flip": True, "scale": (1.0, 1.5), "affine": 1.0,
            "relative_affine": 1.0}  # fmt: skip
CHAIRS = {**GEOMETRY, "jitter": 0.5, "gamma": (0.7, 1.5), "noise": 0.04}
PARTS = {
    "crop alone": {},
    "flips": {"flip": True, "vertical_flip": True},
    "scale, affine, relative affine, flips": GEOMETRY,
    "exposure": {"exposure": 0.1},
    "jitter": {"jitter": 0.5},
    "gamma": {"gamma": (0.7, 1.5)},
    "relative jitter": {"relative_jitter": 0.1},
    "noise": {"noise": 0.04},
    "eraser": {"eraser": 1.0},
    "recipe chairs": CHAIRS,
    **{f"recipe chairs without {key}": {k: v for k, v in CHAIRS.items() if k != key}
       for key in ("jitter", "gamma", "noise")},
    "recipe chairs without geometry": {k: v for k, v in CHAIRS.items() if k not in GEOMETRY},
    "recipe chairs, relative jitter, eraser": {**CHAIRS, "relative_jitter": 0.1, "eraser": 1.0},
}  # fmt: skip


def measure(
    pool: concurrent.futures.Executor, threads: int, view: Augment, sample: Sample, views: int
) -> tuple[float, float]:
    """Wall time and CPU time per view in seconds, of `views` views on each of the pool's threads."""

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(views):
            view(sample, rng)

    wall, cpu = time.perf_counter(), time.process_time()
    list(pool.map(work, range(threads)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / views / threads, cpu / views / threads


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast pairs are augmented.")
    material.add_options(parser)
    parser.set_defaults(pairs=1)
    parser.add_argument("--consumes", type=float, default=100.0, metavar="PAIRS_PER_S",
                        help="what the model takes; the last column is the cores it needs "
                        "(default: %(default)s, a modern GPU)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--views", type=int, default=10, help="of each repeat (default: 10)")
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    options = parser.parse_args()
    memory.keep_freed_blocks()  # as the reader does
    cv2.setNumThreads(1)
    found = material.samples(options.data, 1)[0]
    sample = {key: np.ascontiguousarray(found[key]) for key in ("image1", "image2", "flow")}
    dense = sample | {"valid": np.ones(sample["flow"].shape[:2], np.uint8)}
    known = (np.random.default_rng(0).random(sample["flow"].shape[:2]) < 0.3).astype(np.uint8)
    sparse = dense | {"valid": known, "flow": sample["flow"] * known[..., None]}

    cases = [(name, Augment(CROP, **parts), dense) for name, parts in PARTS.items()]
    cases.append(("recipe chairs, flow 30 % known", Augment(CROP, **CHAIRS), sparse))
    example = Recipe.load("example")
    cases.append((f"recipe example (to {example.crop[0]}x{example.crop[1]})",
                  Augment.from_recipe(example), dense))  # fmt: skip
    print(f"{options.data} pair, threads: {options.threads}, model: {options.consumes:g} pairs/s\n")
    times = {name: [] for name, *_ in cases}
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        for repeat in range(1 + options.repeats):  # interleaved; the first time warms up
            for name, view, pair in cases:
                seconds = measure(pool, options.threads, view, pair, options.views)
                if repeat:
                    times[name].append(seconds)
    rows = []
    for name, seconds in times.items():
        clock, processor = (statistics.median(values) for values in zip(*seconds, strict=True))
        fastest = min(seconds)[0]
        rows.append([name, *(f"{1e3 * value:.2f}" for value in (clock, fastest, processor)),
                     f"{1 / clock:.0f}", f"{options.consumes * processor:.2f}"])  # fmt: skip
    material.print_table(["", "ms/pair", "fastest", "of a core", "pairs/s", "cores for the model"],
                         rows)  # fmt: skip


if __name__ == "__main__":
    main()
