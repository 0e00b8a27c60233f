"""Tiny datasets in the layouts of their releases, and ways to run commands on them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from prep import reader
from prep.formats.flow import write_flo
from prep.formats.image import write_ppm

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT.parent / "shared" / "samples" / "FlyingChairs_release"
"""One real pair, where there is one."""


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise, uint8 (H, W, 3)."""
    steps = rng.integers(-3, 4, (height, width, 3)).cumsum(0).cumsum(1)
    return (128 + steps).astype(np.uint8)


def flow(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 (H, W, 2) of all magnitudes."""
    return rng.normal(0, 10, (height, width, 2)).astype(np.float32)


def mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W), 0 or 255."""
    return 255 * rng.integers(0, 2, (height, width), np.uint8)


# --- Releases -------------------------------------------------------------------------------------


def chairs(folder: Path, pairs: int, height: int = 24, width: int = 40, seed: int = 0) -> Path:
    """The data folder of a FlyingChairs release; returns it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, pairs + 1):
        stem = f"{folder}/{number:05}"
        write_ppm(f"{stem}_img1.ppm", picture(rng, height, width))
        write_ppm(f"{stem}_img2.ppm", picture(rng, height, width))
        write_flo(f"{stem}_flow.flo", flow(rng, height, width))
    return folder


def sintel(folder: Path, scenes: dict[str, int], height: int = 24, width: int = 40, masks: bool = True) -> Path:
    """An MPI-Sintel release; `scenes` gives the number of frames by name."""
    rng = np.random.default_rng(1)
    training = folder / "training"
    for scene, frames in scenes.items():
        for number in range(1, frames + 1):
            for kind in ("clean", "final"):
                save(training / kind / scene / f"frame_{number:04}.png", picture(rng, height, width))
            if masks:
                save(training / "invalid" / scene / f"frame_{number:04}.png", mask(rng, height, width))
            if number < frames:
                path = training / "flow" / scene / f"frame_{number:04}.flo"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_flo(path, flow(rng, height, width))
                if masks:
                    save(training / "occlusions" / scene / f"frame_{number:04}.png", mask(rng, height, width))
    return folder


def kitti(folder: Path, pairs: int, frames: str = "image_2", height: int = 24, width: int = 40) -> Path:
    """A KITTI release in which every pair is a little wider than the one before."""
    rng = np.random.default_rng(2)
    training = folder / "training"
    for number in range(pairs):
        size = height, width + 8 * number
        for frame in (10, 11):
            save(training / frames / f"{number:06}_{frame}.png", picture(rng, *size))
        valid = rng.integers(0, 2, size)
        for kind, visible in (("flow_occ", valid), ("flow_noc", valid & rng.integers(0, 2, size))):
            save_kitti(training / kind / f"{number:06}_10.png", flow(rng, *size), visible)
    return folder


def hd1k(folder: Path, sequences: dict[int, int], height: int = 24, width: int = 40) -> Path:
    """An HD1K release; `sequences` gives the number of frames by number."""
    rng = np.random.default_rng(3)
    for sequence, frames in sequences.items():
        for frame in range(frames):
            name = f"{sequence:06}_{10 + frame:04}.png"
            save(folder / "hd1k_input/image_2" / name, picture(rng, height, width))
            valid = rng.integers(0, 2, (height, width))
            save_kitti(folder / "hd1k_flow_gt/flow_occ" / name, flow(rng, height, width), valid)
    return folder


def spring(folder: Path, scenes: dict[str, int], height: int = 12, width: int = 20) -> Path:
    """A Spring release; `scenes` gives the number of frames by name."""
    import h5py

    rng = np.random.default_rng(4)
    for scene, frames in scenes.items():
        for camera in ("left", "right"):
            for frame in range(1, frames + 1):
                name = f"frame_{camera}/frame_{camera}_{frame:04}.png"
                save(folder / "train" / scene / name, picture(rng, height, width))
            for direction, numbers in (("FW", range(1, frames)), ("BW", range(2, frames + 1))):
                kind = f"flow_{direction}_{camera}"
                (folder / "train" / scene / kind).mkdir()
                for frame in numbers:
                    with h5py.File(folder / "train" / scene / kind / f"{kind}_{frame:04}.flo5", "w") as file:
                        file.create_dataset("flow", data=flow(rng, 2 * height, 2 * width), compression=5)
    return folder


def flyingthings3d(folder: Path, scenes: Iterable[str], height: int = 24, width: int = 40) -> Path:
    """The clean pass of a FlyingThings3D release with scenes such as TRAIN/A/0000."""
    rng = np.random.default_rng(5)
    for scene in scenes:
        for camera in ("left", "right"):
            for frame in (6, 7, 8):
                name = f"{scene}/{camera}/{frame:04}.png"
                save(folder / "frames_cleanpass" / name, picture(rng, height, width))
                for direction, word in (("into_future", "IntoFuture"), ("into_past", "IntoPast")):
                    name = f"OpticalFlow{word}_{frame:04}_{camera[0].upper()}.pfm"
                    path = folder / "optical_flow" / scene / direction / camera / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    rows = np.dstack([flow(rng, height, width), np.zeros((height, width))])[::-1]
                    path.write_bytes(b"PF\n%d %d\n-1\n" % (width, height) + rows.astype("<f4").tobytes())
    return folder


def flyingthings3d_subset(folder: Path, frames: Iterable[int], height: int = 24, width: int = 40) -> Path:
    """The clean pass of a FlyingThings3D subset with these frame numbers in train and in val."""
    rng = np.random.default_rng(6)
    for split in ("train", "val"):
        for camera in ("left", "right"):
            for frame in frames:
                image = picture(rng, height, width)
                save(folder / split / "image_clean" / camera / f"{frame:07}.png", image)
                for direction in ("into_future", "into_past"):
                    path = folder / split / "flow" / camera / direction / f"{frame:07}.flo"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_flo(path, flow(rng, height, width))
                    occlusions = folder / split / "flow_occlusions" / camera / direction
                    save(occlusions / f"{frame:07}.png", mask(rng, height, width))
    return folder


def save_kitti(path: Path, flow: np.ndarray, valid: np.ndarray) -> None:
    """Write a KITTI flow PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), kitti_pixels(flow, valid)[..., ::-1])


def kitti_pixels(flow: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Flow (H, W, 2) and validity (H, W) as KITTI's RGB pixels, uint16 (H, W, 3)."""
    pixels = np.dstack([np.rint(64 * flow) + 2**15, np.ones(valid.shape)])
    return np.where(valid[..., None] != 0, pixels, 0).astype(np.uint16)


def save(path: Path, array: np.ndarray) -> None:
    """Write an image, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def split_file(path: Path, indices: Iterable[int]) -> Path:
    """A split file with these indices; returns its path."""
    path.write_text("# for a test\n" + "".join(f"{i}\n" for i in indices))
    return path


# --- Commands -------------------------------------------------------------------------------------

ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",  # other tests use the other cores, and MindSpore's threads wait by spinning
}
"""Variables for the commands that these functions start as ranks."""


def run_convert(dataset: str, root: Any, out: Any, *options: Any, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Run prep/convert.py as a user does, from another folder."""
    command = [sys.executable, ROOT / "prep" / "convert.py", dataset, "--root", root, "--out", out, *options]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=120, cwd=ROOT.parent, **keywords
    )


def convert(dataset: str, root: Any, out: Path, *options: Any, **keywords: Any) -> Path:
    """`run_convert` that must succeed; returns the dataset's folder."""
    done = run_convert(dataset, root, out, *options, **keywords)
    assert done.returncode == 0, done.stderr
    return out


def mpirun(ranks: int, *command: Any, **keywords: Any) -> subprocess.Popen[str]:
    """Start a command under mpirun, or directly if it is one rank, with its output in pipes."""
    command = ("mpirun", "--oversubscribe", "-n", ranks, *command) if ranks > 1 else command
    return subprocess.Popen(
        [*map(str, command)],
        env={**os.environ, **ENVIRONMENT},
        text=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **keywords,
    )


LAUNCHERS = {
    "mpirun": ["/usr/bin/mpirun", "--oversubscribe", "-n", "2"],
    "srun": ["srun", "--mpi=pmix", "--overcommit", "-n", "2"],
}
"""What starts two ranks beside this environment's mpirun: Debian's, and Slurm's."""


def launch(launcher: str, *program: Any, **environment: str) -> subprocess.Popen[str]:
    """Start a Python program as two ranks by one of LAUNCHERS, with all of its output in stderr.

    Skips the test if the launcher is not installed.
    """
    command = [*LAUNCHERS[launcher], sys.executable, *program]
    if not shutil.which(command[0]) or (
        launcher == "srun"
        and subprocess.run(["timeout", "9", "srun", "--mpi=pmix", "true"], capture_output=True).returncode
    ):
        pytest.skip(f"no {launcher} here beside this environment's mpirun")
    return subprocess.Popen(
        ["sh", "-c", 'exec "$@" >&2', "sh", *map(str, command)],
        text=True,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# --- Reading --------------------------------------------------------------------------------------


def training(folder: Path, **options: Any) -> Iterator[reader.Batch]:
    """The reader's training batches of a converted dataset."""
    return reader.training_batches(reader.DatasetSplit.open(folder, "train"), **options)


def evaluation(folder: Path, split: str, **options: Any) -> Iterator[reader.Batch]:
    """The reader's evaluation batches of a converted dataset."""
    return reader.evaluation_batches(reader.DatasetSplit.open(folder, split), **options)


def occluded(batch: reader.Batch) -> np.ndarray:
    """The occlusion masks of an evaluation batch."""
    assert batch.occluded is not None
    return batch.occluded


def indices(batch: reader.Batch) -> list[int]:
    """The positions of a batch's pairs in their split."""
    assert batch.index is not None
    return batch.index.tolist()
