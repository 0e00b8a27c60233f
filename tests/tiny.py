"""Tiny data sets in the layouts of their releases, made for the tests that need one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from prep.flowio import write_flo
from prep.images import write_ppm

ROOT = Path(__file__).parent.parent


def picture(rng, height, width):
    """Smooth noise, uint8 (H, W, 3)."""
    steps = rng.integers(-3, 4, (height, width, 3)).cumsum(0).cumsum(1)
    return (128 + steps).astype(np.uint8)


def flow(rng, height, width):
    """float32 (H, W, 2) of every magnitude."""
    return rng.normal(0, 10, (height, width, 2)).astype(np.float32)


def chairs(folder, pairs, height=24, width=40, seed=0):
    """A FlyingChairs data folder of `pairs` pairs; returns it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, pairs + 1):
        stem = f"{folder}/{number:05}"
        write_ppm(f"{stem}_img1.ppm", picture(rng, height, width))
        write_ppm(f"{stem}_img2.ppm", picture(rng, height, width))
        write_flo(f"{stem}_flow.flo", flow(rng, height, width))
    return folder


def sintel(folder, scenes, height=24, width=40, masks=True):
    """An MPI-Sintel release with `scenes`, a dict of name to number of frames; returns its folder."""
    rng = np.random.default_rng(1)
    training = folder / "training"
    for scene, frames in scenes.items():
        for number in range(1, frames + 1):
            for kind in ("clean", "final"):
                save(training / kind / scene / f"frame_{number:04}.png", picture(rng, height, width))
            if masks:
                mask = 255 * rng.integers(0, 2, (height, width), np.uint8)
                save(training / "invalid" / scene / f"frame_{number:04}.png", mask)
            if number < frames:
                path = training / "flow" / scene / f"frame_{number:04}.flo"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_flo(path, flow(rng, height, width))
                if masks:
                    mask = 255 * rng.integers(0, 2, (height, width), np.uint8)
                    save(training / "occlusions" / scene / f"frame_{number:04}.png", mask)
    return folder


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def split_file(path, indices):
    """A split file that lists `indices`; returns its path."""
    path.write_text("# for a test\n" + "".join(f"{i}\n" for i in indices))
    return path


def run_convert(dataset, root, out, *options, **keywords):
    """Run prep/convert.py as a user does, from another folder; the finished process, with its text."""
    command = [sys.executable, ROOT / "prep" / "convert.py", dataset, "--root", root, "--out", out]
    return subprocess.run(
        [*map(str, command), *map(str, options)],
        capture_output=True, text=True, timeout=120, cwd=ROOT.parent, **keywords,
    )  # fmt: skip


def convert(*arguments, **keywords):
    """`run_convert` that must succeed; returns the set's folder."""
    done = run_convert(*arguments, **keywords)
    assert done.returncode == 0, done.stderr
    return arguments[2]
