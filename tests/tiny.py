"""Tiny datasets in the layouts of their releases, and ways to run commands on them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import forked
import numpy as np
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


def flyingthings3d(
    folder: Path, scenes: Iterable[str], height: int = 24, width: int = 40, frames: str = "frames_cleanpass/*.png"
) -> Path:
    """The clean pass of a FlyingThings3D, Monkaa or Driving release with scenes such as TRAIN/A/0000."""
    rng = np.random.default_rng(5)
    for scene in scenes:
        for camera in ("left", "right"):
            for frame in (6, 7, 8):
                path = folder / frames.replace("*", f"{scene}/{camera}/{frame:04}")
                save(path, picture(rng, height, width))
                for direction, word in (("into_future", "IntoFuture"), ("into_past", "IntoPast")):
                    name = f"OpticalFlow{word}_{frame:04}_{camera[0].upper()}.pfm"
                    path = folder / "optical_flow" / scene / direction / camera / name
                    save_pfm(path, flow(rng, height, width))
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


def flyingchairs2(folder: Path, train: int, val: int, height: int = 24, width: int = 40) -> Path:
    """A FlyingChairs2 release with this many pairs of images."""
    rng = np.random.default_rng(7)
    for split, pairs in (("train", train), ("val", val)):
        for number in range(pairs):
            stem = folder / split / f"{number:07}"
            for frame in (0, 1):
                save(Path(f"{stem}-img_{frame}.png"), picture(rng, height, width))
            for order in ("01", "10"):
                write_flo(f"{stem}-flow_{order}.flo", flow(rng, height, width))
                for kind in ("occ", "mb"):
                    save(Path(f"{stem}-{kind}_{order}.png"), mask(rng, height, width))
    return folder


def flyingchairsocc(folder: Path, numbers: Iterable[int], height: int = 24, width: int = 40) -> Path:
    """A FlyingChairsOcc release with these pairs of images."""
    rng = np.random.default_rng(8)
    for number in numbers:
        stem = folder / "data" / f"{number:05}"
        for frame in (1, 2):
            save(Path(f"{stem}_img{frame}.png"), picture(rng, height, width))
            save(Path(f"{stem}_occ{frame}.png"), mask(rng, height, width))
        for suffix in ("", "_b"):
            write_flo(f"{stem}_flow{suffix}.flo", flow(rng, height, width))
    return folder


def chairssdhom(folder: Path, train: int, test: int, height: int = 24, width: int = 40) -> Path:
    """A ChairsSDHom release with this many pairs."""
    rng = np.random.default_rng(9)
    for split, pairs in (("train", train), ("test", test)):
        for number in range(1, pairs + 1):
            for frame in ("t0", "t1"):
                save(folder / "data" / split / frame / f"{number:05}.png", picture(rng, height, width))
            save_pfm(folder / "data" / split / "flow" / f"{number:05}.pfm", flow(rng, height, width))
    return folder


def autoflow(folder: Path, parts: dict[int, list[str]], height: int = 24, width: int = 40) -> Path:
    """An AutoFlow release; `parts` gives the names of the pairs in each of the four."""
    rng = np.random.default_rng(10)
    for part, names in parts.items():
        for name in names:
            for frame in (0, 1):
                path = folder / f"static_40k_png_{part}_of_4" / name
                save(path / f"im{frame}.png", picture(rng, height, width))
            write_flo(path / "forward.flo", flow(rng, height, width))
    return folder


def tartanair(folder: Path, paths: dict[str, int], height: int = 24, width: int = 40) -> Path:
    """A TartanAir release; `paths` gives the number of frames by path, such as ocean/Easy/P000."""
    rng = np.random.default_rng(11)
    for path, frames in paths.items():
        (folder / path / "flow").mkdir(parents=True)
        for number in range(frames):
            save(folder / path / "image_left" / f"{number:06}_left.png", picture(rng, height, width))
            if number + 1 < frames:
                stem = folder / path / "flow" / f"{number:06}_{number + 1:06}"
                np.save(f"{stem}_flow.npy", flow(rng, height, width))
                np.save(f"{stem}_mask.npy", rng.choice([0, 0, 1, 10, 100], (height, width)).astype(np.uint8))
    return folder


def viper(folder: Path, sequences: dict[str, int], height: int = 24, width: int = 40, images: str = "png") -> Path:
    """A VIPER release; `sequences` gives the number of frames by split and name, such as train/001."""
    rng = np.random.default_rng(12)
    for sequence, frames in sequences.items():
        split, name = sequence.split("/")
        (folder / split / "flow" / name).mkdir(parents=True)
        for number in range(1, frames + 1):
            save(folder / split / "img" / name / f"{name}_{number:05}.{images}", picture(rng, height, width))
            u, v = np.moveaxis(100 * flow(rng, height, width), 2, 0).astype(np.float16)
            np.savez_compressed(folder / split / "flow" / name / f"{name}_{number:05}.npz", u=u, v=v)
    return folder


def middlebury(folder: Path, scenes: Iterable[str], height: int = 24, width: int = 40) -> Path:
    """A Middlebury release with these scenes, and one more without flow."""
    rng = np.random.default_rng(13)
    for scene in (*scenes, "Beanbags"):
        for frame in (10, 11):
            save(folder / "other-data" / scene / f"frame{frame}.png", picture(rng, height, width))
    for scene in scenes:
        path = folder / "other-gt-flow" / scene / "flow10.flo"
        path.parent.mkdir(parents=True)
        values = flow(rng, height, width)
        values[:3] = 1666666752.0  # unknown
        write_flo(path, values)
    return folder


def kubric(folder: Path, scenes: dict[str, int], height: int = 24, width: int = 40) -> Path:
    """Scenes rendered by Kubric; `scenes` gives the number of frames by name. All moves by (2, -1) pixels a frame."""
    rng = np.random.default_rng(14)
    for scene, frames in scenes.items():
        for number in range(frames):
            opaque = np.dstack([picture(rng, height, width), np.full((height, width), 255, np.uint8)])
            save(folder / scene / f"rgba_{number:05}.png", opaque)
            for direction in ("forward", "backward"):
                pixels = np.zeros((height, width, 3), np.uint16)
                pixels[..., 0], pixels[..., 1] = 3 * 4369, 6 * 4369  # red: -1, green: 2, of -4 to 11
                cv2.imwrite(str(folder / scene / f"{direction}_flow_{number:05}.png"), pixels[..., ::-1])
        ranges = {f"{direction}_flow": {"min": -4, "max": 11.0} for direction in ("forward", "backward")}
        (folder / scene / "data_ranges.json").write_text(json.dumps(ranges | {"depth": {"min": 1, "max": 2}}))
    return folder


def save_pfm(path: Path, flow: np.ndarray) -> None:
    """Write flow as a three-channel .pfm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = flow.shape[:2]
    rows = np.dstack([flow, np.zeros((height, width))])[::-1]
    path.write_bytes(b"PF\n%d %d\n-1\n" % (width, height) + rows.astype("<f4").tobytes())


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
    command = [*map(str, (ROOT / "prep" / "convert.py", dataset, "--root", root, "--out", out, *options))]
    if not keywords:
        return forked.run(command, ROOT.parent)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, cwd=ROOT.parent, **keywords
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


def has_launcher(launcher: str) -> bool:
    """Whether one of LAUNCHERS is installed and starts programs."""
    if launcher == "srun":  # it may be installed where Slurm does not run
        return not subprocess.run(["timeout", "9", "srun", "--mpi=pmix", "true"], capture_output=True).returncode
    return shutil.which(LAUNCHERS[launcher][0]) is not None


def launch(launcher: str, *program: Any, **environment: str) -> subprocess.Popen[str]:
    """Start a Python program as two ranks by one of LAUNCHERS, with all of its output in stderr."""
    command = [*LAUNCHERS[launcher], sys.executable, *program]
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
    return reader.training_batches([(reader.DatasetSplit.open(folder, "train"), 1.0)], **options)


def evaluation(folder: Path, split: str, **options: Any) -> Iterator[reader.Batch]:
    """The reader's evaluation batches of a converted dataset."""
    return reader.evaluation_batches(reader.DatasetSplit.open(folder, split), **options)


def occluded(batch: reader.Batch) -> np.ndarray:
    """The occlusion masks of an evaluation batch."""
    assert batch.occluded is not None
    return batch.occluded


def indices(batch: reader.Batch) -> list[int]:
    """The positions of a batch's pairs in their split."""
    return batch.index.tolist()
