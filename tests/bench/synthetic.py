#!/usr/bin/env python3
"""Measure what synthetic pairs teach: train on each variant at the same budget, and test on real images.

The test never sees a synthetic pair. Its parts:
  affine, smooth   photographs that Python packages ship, moved by known motions, at 192x256 and at 384x512 (2x)
  two shots        the same with a different exposure and noise in each frame
  chairs           the pair of FlyingChairs in ../shared/samples, where there is one, at half size
  stereo           scikit-image's motorcycle, a real stereo pair with measured disparity, at a third of its size
  names of folders pairs of the converted datasets in --real, such as Middlebury, KITTI or Sintel

Interrupted, the same command continues. The table has the median over the seeds of each part's end-point error (EPE) in
pixels. "Relative" is the geometric mean over the test pairs of the EPE, median over the seeds, relative to that of the
first variant: an image with little texture, whose EPE is ten times that of others, would decide a mean.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)  # `prep`, and not this folder's neighbours

import cv2
import numpy as np

from launch import errors
from prep.datasets import flyingchairs, read_pair
from prep.formats.image import read_image
from prep.inspect import spread_evenly
from prep.reader import TRAINING_FIELDS, DatasetSplit, Position, read_samples
from prep.shards import Manifest

SAMPLES = ROOT.parent / "shared" / "samples" / "FlyingChairs_release"
PHOTOGRAPHS = {
    "skimage": [f"data/{name}" for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}
SIZE = (192, 256)  # (H, W) of most pairs that are made from photographs; the others are twice as large
MAX_REAL_PAIRS = 40  # of a converted dataset
MAX_REAL_SIDE = 640  # in pixels; larger pairs are reduced

INGREDIENTS = ("nonrigid", "perspective", "thin", "soft-edges", "motion-blur", "shadow", "fog", "exposure", "noise")
VARIANTS = {
    "profile 1": ["--profile", "1"],
    "profile 2": [],
    "with photographs": ["--textures", "TEXTURES"],
    **{f"without {name}": [f"--{name}", "0"] for name in INGREDIENTS},
    "none of these": [word for name in INGREDIENTS for word in (f"--{name}", "0")],
}


@dataclass(frozen=True)
class TestPair:
    """A real image pair with known flow."""

    part: str
    image1: np.ndarray
    """uint8 (H, W, 3)."""
    image2: np.ndarray
    flow: np.ndarray
    """float32 (H, W, 2) in pixels."""
    valid: np.ndarray
    """bool (H, W)."""


# --- Test pairs -----------------------------------------------------------------------------------


def find_photographs() -> list[Path]:
    """The photographs of installed packages."""
    found = []
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
        found += [Path(folder) / name for folder in folders for name in names if (Path(folder) / name).exists()]
    return found


def move_photograph(photograph: np.ndarray, rng: np.random.Generator, part: str, size: tuple[int, int]) -> TestPair:
    """A pair from one photograph, uint8 (H, W, 3), moved by some per cent of the frame's width."""
    height, width = size
    scale = min(photograph.shape[0] / height, photograph.shape[1] / width) / 1.3
    y, x = np.mgrid[:height, :width].astype(np.float32)
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    shift = rng.normal(0, 0.015 * width, 2)
    if part.startswith("affine"):
        angle, zoom, shear = rng.normal(0, np.deg2rad(2.5)), rng.normal(0, 0.03), rng.normal(0, 0.02)
        change = np.array([[zoom, -angle + shear], [angle, zoom]])
        flow = np.stack(
            [
                change[row, 0] * (x - centre_x) + change[row, 1] * (y - centre_y) + shift[row]
                for row in range(2)
            ],
            -1,
        )  # fmt: skip
    else:
        grid = rng.normal(0, 0.012 * width, (4, 5, 2)).astype(np.float32)
        flow = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) + shift
    flow = flow.astype(np.float32)
    # Both frames are sampled from the photograph, the first at where its pixels will be, so the flow is exact.
    smooth = cv2.GaussianBlur(photograph, (0, 0), max(0.01, 0.5 * (scale - 1))) if scale > 1 else photograph
    middle_y, middle_x = (np.array(photograph.shape[:2]) - 1) / 2

    def sample(at_x: np.ndarray, at_y: np.ndarray) -> np.ndarray:
        source_x, source_y = middle_x + scale * (at_x - centre_x), middle_y + scale * (at_y - centre_y)
        return cv2.remap(
            smooth, source_x.astype(np.float32), source_y.astype(np.float32), cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_REFLECT_101,
        )  # fmt: skip

    image1, image2 = sample(x + flow[..., 0], y + flow[..., 1]), sample(x, y)
    return TestPair(part, image1, image2, flow, np.ones(size, bool))


def expose(pair: TestPair, rng: np.random.Generator) -> TestPair:
    """The pair as a camera would take it in two shots: the second brighter or darker, each with its own noise."""
    gain, sigma = np.exp(rng.choice([-1, 1]) * rng.uniform(0.05, 0.25)), rng.uniform(2, 6)
    image1, image2 = (
        np.clip(np.rint(share * image + rng.normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)
        for share, image in ((1 / gain if gain > 1 else 1, pair.image1), (1 if gain > 1 else gain, pair.image2))
    )
    return TestPair("two shots", image1, image2, pair.flow, pair.valid)


def shrink(pair: TestPair, factor: int) -> TestPair:
    """A pair at a fraction of its size; a pixel's flow is the mean of the valid ones that it replaces.

    It is valid if it replaces more than half as many valid pixels as the average one does, so that a single one is
    enough where the ground truth is sparse.
    """
    height, width = (side // factor for side in pair.flow.shape[:2])
    cut = np.s_[: height * factor, : width * factor]

    def blocks(array: np.ndarray) -> np.ndarray:
        return array[cut].reshape(height, factor, width, factor, -1).astype(np.float64).sum((1, 3))

    image1, image2 = (np.rint(blocks(image) / factor**2).astype(np.uint8) for image in (pair.image1, pair.image2))
    count = blocks(pair.valid[..., None])
    flow = blocks(np.where(pair.valid[..., None], pair.flow, 0)) / np.maximum(count, 1) / factor
    enough = factor**2 * pair.valid.mean() / 2
    return TestPair(pair.part, image1, image2, flow.astype(np.float32), count[..., 0] > enough)


def read_real(folder: Path) -> list[TestPair]:
    """At most MAX_REAL_PAIRS labelled pairs of a converted dataset, evenly spaced."""
    manifest = Manifest.load(folder)
    for shard in manifest.shards.values():
        shard.check_structure(folder)
    # Its splits may overlap, as Sintel's do, so this reads all shards as one.
    whole = DatasetSplit(folder, "all", manifest.dataset, list(manifest.shards.values()))
    labelled = whole.labelled.nonzero()[0]
    chosen = [Position(0, 0, index) for index in labelled[spread_evenly(len(labelled), MAX_REAL_PAIRS)].tolist()]
    pairs = []
    for decoded in read_samples([whole], chosen, TRAINING_FIELDS):
        sample = decoded.sample
        pair = TestPair(folder.name, sample["image1"], sample["image2"], sample["flow"], sample["valid"] != 0)
        pairs.append(shrink(pair, math.ceil(max(pair.valid.shape) / MAX_REAL_SIDE)))
    return pairs


def make_test(real: list[Path]) -> list[TestPair]:
    """All test pairs, including those of the converted datasets in `real`."""
    photographs = find_photographs()
    if not photographs:
        sys.exit("error: no photographs found; pip install scikit-image scikit-learn matplotlib")
    pairs = []
    for number, path in enumerate(photographs):
        photograph = read_image(path)
        for part in ("affine", "smooth"):
            for variation in range(3):
                rng = np.random.default_rng([number, variation, part == "smooth"])
                pairs.append(move_photograph(photograph, rng, part, SIZE))
            pairs.append(expose(pairs[-1], np.random.default_rng([number, 8, part == "smooth"])))
            rng = np.random.default_rng([number, 9, part == "smooth"])
            pairs.append(move_photograph(photograph, rng, f"{part} 2x", (2 * SIZE[0], 2 * SIZE[1])))
    if SAMPLES.is_dir():
        sample = read_pair(flyingchairs.list_pairs(SAMPLES, "")[0])
        pair = TestPair("chairs", sample["image1"], sample["image2"], sample["flow"], sample["valid"] != 0)
        pairs.append(shrink(pair, 2))
    motorcycle = [path.parent for path in photographs if path.parent.parent.name == "skimage"][:1]
    if motorcycle and (motorcycle[0] / "motorcycle_disp.npz").exists():
        left, right = (read_image(motorcycle[0] / f"motorcycle_{side}.png") for side in ("left", "right"))
        disparity = np.load(motorcycle[0] / "motorcycle_disp.npz")["arr_0"].astype(np.float32)
        valid = np.isfinite(disparity)
        disparity = np.where(valid, disparity, 0)
        flow = np.stack([-disparity, np.zeros_like(disparity)], -1)
        pairs.append(shrink(TestPair("stereo", left, right, flow, valid), 3))
    return pairs + [pair for folder in real for pair in read_real(folder)]


def measure(checkpoint: Path, pairs: list[TestPair]) -> list[float]:
    """EPE of a network on each pair in pixels."""
    import model

    network = model.load(checkpoint)
    return end_point_errors(pairs, [network.flow(pair.image1, pair.image2) for pair in pairs])


def end_point_errors(pairs: list[TestPair], flows: list[np.ndarray]) -> list[float]:
    """EPE of flows, (H, W, 2), on each pair in pixels."""
    return [
        float(np.linalg.norm(flow - pair.flow, axis=-1)[pair.valid].mean())
        for pair, flow in zip(pairs, flows, strict=True)
    ]


# --- Training -------------------------------------------------------------------------------------


def run(*words: object) -> None:
    """Run a command of the project."""
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with status {done.returncode}\n{done.stderr[-3000:]}")


def train(variant: str, seed: int, options: argparse.Namespace) -> Path:
    """Make a variant's pairs and train on them; returns the last checkpoint."""
    name = variant.replace(" ", "-")
    raw, data = options.out / f"{name}-raw", options.out / f"{name}-data"
    if not data.exists():
        words = [str(options.textures) if word == "TEXTURES" else word for word in VARIANTS[variant]]
        run("prep/synthesize.py", "--out", raw, "--pairs", options.pairs, "--size", options.size, *words)
        run("prep/convert.py", "flyingchairs", "--root", raw, "--out", data, "--shards", 4,
            "--split-file", raw / "validation.txt")  # fmt: skip
        shutil.rmtree(raw)
    runs = options.out / f"{name}-{seed}"
    run("train/main.py", "--config", "example", "--data", data, "--out", runs, f"steps={options.steps}",
        f"seed={seed}", f"validate_every={options.steps}", "checkpoint_every=50", *options.set)  # fmt: skip
    return runs / "checkpoints" / f"step-{options.steps:08}.ckpt"


def print_table(results: dict[str, dict[str, list[float]]], pairs: list[TestPair], still: list[float]) -> None:
    """Print the medians over seeds as a table in Markdown.

    Args:
        results: EPE on each pair, by variant and seed.
        pairs: the test.
        still: EPE of zero flow on each pair.
    """
    parts = np.array([pair.part for pair in pairs])
    names = list(dict.fromkeys(parts.tolist()))

    def cells(by_seed: list[list[float]]) -> str:
        epe = np.array(by_seed)
        return " | ".join(f"{np.median(epe[:, parts == name].mean(1)):.2f}" for name in names)

    print("| trained on | seeds | " + " | ".join(names) + " | relative |")
    print("| --- | ---: |" + " ---: |" * (len(names) + 1))
    print(f"| nothing: zero flow | | {cells([still])} | |")
    first: np.ndarray | None = None
    for variant, by_seed in results.items():
        if not by_seed:
            continue
        epe = list(by_seed.values())
        median = np.median(epe, 0)
        first = median if first is None else first
        relative = np.exp(np.mean(np.log(median / first)))
        print(f"| {variant} | {len(epe)} | {cells(epe)} | {relative:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument("--real", type=Path, nargs="+", default=[], metavar="DIR", help="converted datasets to test on")
    parser.add_argument("--textures", type=Path, help="photographs for the variant with photographs; none of the test")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["profile 1", "profile 2"], metavar="NAME",
        help="some of: " + ", ".join(VARIANTS) + " (default: profile 1, profile 2)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--steps", type=int, default=1500, help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=2400, help="default: %(default)s")
    parser.add_argument("--size", default="128x192", help="of the synthetic pairs (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other keys of the recipe")
    options = parser.parse_args()
    options.out, results_file = options.out.resolve(), options.out.resolve() / "results.json"
    options.out.mkdir(parents=True, exist_ok=True)
    if "with photographs" in options.variants and not options.textures:
        sys.exit("error: the variant with photographs needs --textures")
    pairs = make_test(options.real)
    still = end_point_errors(pairs, [np.zeros_like(pair.flow) for pair in pairs])
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    if any(len(epe) != len(pairs) for by_seed in results.values() for epe in by_seed.values()):
        sys.exit(f"error: {results_file} has the results of another test: use the same --real, or another --out")
    for seed in options.seeds:
        for variant in options.variants:
            if str(seed) in results.get(variant, {}):
                continue
            checkpoint = train(variant, seed, options)
            results.setdefault(variant, {})[str(seed)] = measure(checkpoint, pairs)
            results_file.write_text(json.dumps(results, indent=1))
            print_table({name: results.get(name, {}) for name in options.variants}, pairs, still)
            print(flush=True)


if __name__ == "__main__":
    errors.run(main)
