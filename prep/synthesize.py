#!/usr/bin/env python3
"""Make synthetic data: image pairs of moving textured layers with exact flow, in the layout of FlyingChairs.

A pair is a stack of layers: a textured background and several shapes in front of it, each with its own motion. Both
frames sample the same textures, so the flow is exact; a pixel's flow is that of its frontmost layer. Profile 2 adds
what makes such pairs resemble real ones. The package prep.synthesis draws the pairs; this command writes them.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import json
import multiprocessing
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from launch import files, progress
from launch.arguments import Parser
from launch.errors import UserError, counted, run
from launch.lock import Lock
from launch.processes import end_with_parent
from prep import memory
from prep.formats import flow as flow_format
from prep.formats import image as image_format
from prep.synthesis.textures import BLOCK, Photographs
from prep.synthesis.version1 import make_pair
from prep.synthesis.version2 import Ingredients, PairMaker

MIN_SIDE, MAX_SIDE = 32, 2048
MAX_PAIRS = 99999  # names have five digits, and name order must be number order
LOCK = "synthesize.lock"
"""The file in the work folder that the run that writes it has locked. It also tells that this command made the
folder."""


# --- Writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyntheticSpec:
    """What a dataset of synthetic pairs depends on. Its bytes are a pure function of this."""

    pairs: int
    height: int
    width: int
    seed: int
    profile: int = 2
    """The version of the pairs: a new one whenever the same seed gives other bytes."""
    format: str = "ppm"
    ingredients: Ingredients = field(default_factory=Ingredients)
    textures: Photographs | None = None

    def fields(self) -> dict[str, Any]:
        """The content of synthesize.json."""
        numbers = {"pairs": self.pairs, "height": self.height, "width": self.width, "seed": self.seed}
        content = {"made by": "prep/synthesize.py", "version": self.profile, **numbers}
        if self.profile == 1:
            return content
        textures = self.textures.sha256 if self.textures else None
        return {**content, "format": self.format, "textures": textures, **asdict(self.ingredients)}

    def maker(self) -> PairMaker:
        """What makes the pairs, from profile 2 on."""
        return PairMaker(self.seed, self.height, self.width, self.ingredients, self.textures)

    def file_names(self) -> Iterator[str]:
        """The names of all files."""
        parts, lists = [f"img1.{self.format}", f"img2.{self.format}", "flow.flo"], ["validation.txt", "synthesize.json"]
        if self.profile != 1:
            parts += ["flow_b.flo", "occ1.png", "occ2.png"]
            lists.append("pairs.csv")
        for number in range(1, self.pairs + 1):
            yield from (f"{number:05d}_{part}" for part in parts)
        yield from lists


def write_some(folder: Path, numbers: range, spec: SyntheticSpec) -> None:
    """Write pairs, numbered from 1, in the layout of FlyingChairs; profile 2 as FlyingChairsOcc, with its masks."""
    cv2.setNumThreads(1)
    if spec.profile == 1:
        for number in numbers:
            # Each pair has its own random numbers: its bytes depend neither on the worker nor on the number of pairs.
            pair = make_pair(np.random.SeedSequence([spec.seed, number]), spec.height, spec.width)
            image_format.write_ppm(folder / f"{number:05d}_img1.ppm", pair.image1)
            image_format.write_ppm(folder / f"{number:05d}_img2.ppm", pair.image2)
            flow_format.write_flo(folder / f"{number:05d}_flow.flo", pair.flow)
        return
    maker = spec.maker()
    write_image = image_format.write_ppm if spec.format == "ppm" else write_png
    for number in numbers:
        stem, pair = f"{folder}/{number:05d}", maker.make(number)
        write_image(f"{stem}_img1.{spec.format}", pair.image1)
        write_image(f"{stem}_img2.{spec.format}", pair.image2)
        flow_format.write_flo(f"{stem}_flow.flo", pair.flow)
        flow_format.write_flo(f"{stem}_flow_b.flo", pair.flow_back)
        write_png(f"{stem}_occ1.png", 255 * pair.occluded.view(np.uint8))
        write_png(f"{stem}_occ2.png", 255 * pair.occluded_back.view(np.uint8))


def write_png(path: str, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB or (H, W) as PNG.

    Run-length encoding of the rows' differences makes frames with noise both faster and smaller than zlib's default.
    """
    ordered = image[..., ::-1] if image.ndim == 3 else image
    _, data = cv2.imencode(".png", ordered, [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE])
    files.write_bytes(path, data.tobytes())


def pair_list(spec: SyntheticSpec) -> str:
    """The content of pairs.csv, which names all files of each pair."""
    validation = validation_indices(spec.pairs)
    lines = ["name,image1,image2,flow,occluded,split"]
    for index in range(spec.pairs):
        stem, split = f"{index + 1:05d}", "val" if index in validation else "train"
        images = f"{stem}_img1.{spec.format},{stem}_img2.{spec.format}"
        lines.append(f"{stem},{images},{stem}_flow.flo,{stem}_occ1.png,{split}")
    return "\n".join(lines) + "\n"


def write_dataset(folder: Path, spec: SyntheticSpec, workers: int) -> bool:
    """Write a dataset into a new folder, which appears when it is complete or not at all.

    Returns:
        Whether it was written; False if the folder already contains the same complete dataset.

    Raises:
        UserError: the folder contains anything else, another process is writing it, or a photograph is damaged.
    """
    if is_complete(folder, spec):
        return False
    files.check_replaceable(folder)
    if spec.profile != 1:
        spec.maker().textures.check(workers)
    partial = files.partial_of(folder)
    lock = empty_partial(partial)
    try:
        if is_complete(folder, spec):  # another run has completed it meanwhile
            return False
        write_pairs(partial, spec, workers)
        lines = [
            f"# 0-based index of the validation pairs among the {spec.pairs} pairs of this set in name "
            "order (pair 00001 is index 0); every tenth",
            *map(str, validation_indices(spec.pairs)),
            "",
        ]
        files.write_bytes(partial / "validation.txt", "\n".join(lines).encode())
        if spec.profile != 1:
            files.write_bytes(partial / "pairs.csv", pair_list(spec).encode())
        files.write_bytes(partial / "synthesize.json", json.dumps(spec.fields(), indent=2).encode() + b"\n")
        if missing := find_missing(partial, spec):
            raise UserError(
                f"{partial / missing}: is missing, although it was written; find out which other process removed it, "
                "then run the same command again"
            )
        partial.rename(folder)
        (folder / LOCK).unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()
    return True


def empty_partial(partial: Path) -> Lock:
    """Create the work folder, or empty that of a killed run; return its lock. UserError if it is anything else."""
    found = ""
    if partial.is_symlink() or not partial.is_dir():
        found = "a file or link" if os.path.lexists(partial) else ""
    elif (names := sorted(os.listdir(partial))) and LOCK not in names:
        found = f"a folder with {names[0]}"
    if found:
        raise UserError(
            f"{partial}: already exists and is not left over from an interrupted run of this command (it is {found}); "
            "move it away or choose another --out"
        )
    partial.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(partial / LOCK, "synthesis")
    except FileNotFoundError:  # its holder took the folder away when it ended
        raise UserError(
            f"{partial}: another run of this command has just finished writing to it; run the same command again"
        ) from None
    except OSError as error:
        error.filename = error.filename or str(partial / LOCK)
        raise
    for path in partial.iterdir():
        if path.name != LOCK:
            path.unlink()
    return lock


def find_missing(folder: Path, spec: SyntheticSpec) -> str | None:
    """The name of the first file of a dataset that a folder lacks."""
    present = set(os.listdir(folder))
    return next((name for name in spec.file_names() if name not in present), None)


def is_complete(folder: Path, spec: SyntheticSpec) -> bool:
    """Whether a folder contains exactly this dataset; UserError if it contains anything else."""
    if not os.path.lexists(folder) or (folder.is_dir() and not os.listdir(folder)):
        return False
    try:
        found = dict(json.loads((folder / "synthesize.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{folder}: already exists and was not made by this command; expected a new or empty folder, choose "
            "another --out"
        ) from None
    expected = spec.fields()
    if found != expected:
        differences = [name for name in expected if found.get(name) != expected[name]]
        seen = ", ".join(f"{name} {found.get(name)} instead of {expected[name]}" for name in differences)
        raise UserError(f"{folder}: contains another dataset ({seen}); choose another --out or remove it")
    if missing := find_missing(folder, spec):
        raise UserError(
            f"{folder / missing}: is missing, expected all files of {counted(spec.pairs, 'pair')}; remove the folder "
            "and run the same command again"
        )
    return True


def validation_indices(pairs: int) -> range:
    """0-based indices of the validation pairs: every tenth, at least one."""
    return range(min(9, pairs - 1), pairs, 10)


def jobs(spec: SyntheticSpec) -> list[range]:
    """The numbers of the pairs that a worker makes at a time: those that share textures, from profile 2 on."""
    size = 4 if spec.profile == 1 else BLOCK
    # Block n of textures is for the pairs from n * BLOCK on, and numbers begin at 1.
    starts = [1, *range(size, spec.pairs + 1, size)]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], spec.pairs + 1], strict=True)]


def start_worker(parent: int) -> None:
    """Prepare a worker process; it must not outlive its parent, whose lock protects what it writes."""
    end_with_parent(parent)
    memory.keep_freed_blocks()


def write_pairs(folder: Path, spec: SyntheticSpec, workers: int) -> None:
    """Write all pairs in worker processes, with a progress bar."""
    parts = jobs(spec)
    # A new interpreter for each worker, because forking a process with threads can deadlock.
    pool = ProcessPoolExecutor(
        min(workers, len(parts)), multiprocessing.get_context("spawn"), start_worker, (os.getpid(),)
    )
    processes = []
    try:
        # A terminal sends Ctrl-C to all processes, but only this one should handle it: workers, which start with the
        # first job, inherit the blocked signal.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        written = {pool.submit(write_some, folder, numbers, spec): len(numbers) for numbers in parts}
        processes = multiprocessing.active_children()
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        with progress.bar(total=spec.pairs, unit="pair", desc="synthesizing") as bar:
            for future in as_completed(written):
                future.result()
                bar.update(written[future])
    except BrokenProcessPool:
        raise UserError(
            f"{folder}: a worker process was killed (out of memory?); try again with fewer --workers"
        ) from None
    except BaseException:
        for process in processes:  # do not wait for what they are making
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# --- Command line ---------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) of a text such as 128x192."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    height, width = map(int, match.groups()) if match else (0, 0)
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise UserError(
            f"--size {text}: expected HEIGHTxWIDTH, each from {MIN_SIDE} to {MAX_SIDE} pixels, such as 128x192"
        )
    return height, width


def parse_options() -> argparse.Namespace:
    parser = Parser(
        description="Make synthetic data: image pairs of moving textured layers with exact flow and occlusions, in the "
        "layout of FlyingChairs. The same options always give the same bytes.",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder (required)")
    parser.add_argument("--pairs", type=int, default=1200, metavar="N", help="number of pairs")
    parser.add_argument("--size", default="128x192", metavar="HxW", help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of the random numbers")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="worker processes (default: one per core, here %(default)s)",
    )
    parser.add_argument(
        "--profile",
        type=int,
        choices=(1, 2),
        default=2,
        help="2, or 1 for the pairs of release 0.9: sharp shapes in affine motion",
    )
    group = parser.add_argument_group("profile 2")
    group.add_argument("--textures", type=Path, metavar="DIR", help="photographs to use as textures")
    group.add_argument("--format", choices=("ppm", "png"), help="image format of the frames (default: ppm)")
    for ingredient in fields(Ingredients):
        group.add_argument(
            f"--{ingredient.name.replace('_', '-')}",
            type=float,
            metavar="P",
            help=f"probability {ingredient.metadata['help']} (default: {ingredient.default})",
        )
    return parser.parse_args()


def make_spec(options: argparse.Namespace) -> SyntheticSpec:
    """The spec that the options ask for; UserError if one is out of range."""
    height, width = parse_size(options.size)
    if not 1 <= options.pairs <= MAX_PAIRS:
        raise UserError(f"--pairs {options.pairs}: expected 1 to {MAX_PAIRS}")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected 1 or more")
    names = [ingredient.name for ingredient in fields(Ingredients)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.profile == 1:
        extra = [name for name in ("textures", "format") if getattr(options, name) is not None] + list(given)
        if extra:
            raise UserError(f"--{extra[0].replace('_', '-')}: needs --profile 2; profile 1 has no such option")
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: expected a probability from 0 to 1")
    textures = Photographs.load(options.textures) if options.textures else None
    if "photographs" in given and not textures:
        raise UserError("--photographs: needs --textures, the folder with photographs")
    return SyntheticSpec(
        options.pairs,
        height,
        width,
        options.seed,
        options.profile,
        options.format or "ppm",
        Ingredients(**given),
        textures,
    )


def main() -> None:
    options = parse_options()
    folder, spec = Path(os.path.realpath(options.out)), make_spec(options)  # a link cannot be replaced by a folder
    written = write_dataset(folder, spec, options.workers)
    validation = len(validation_indices(spec.pairs))
    out = shlex.quote(str(options.out))
    print(
        f"{options.out}: {counted(spec.pairs, 'pair')} of {spec.height}x{spec.width}, seed {spec.seed}, "
        f"{validation} for validation" + ("" if written else "; already complete, nothing to do")
    )
    what = f"pairs --list {out}/pairs.csv"
    if spec.profile == 1:  # without masks, so without a list
        what = f"flyingchairs --root {out} --split-file {out}/validation.txt"
    print(f"next: python prep/convert.py {what} --out {out}-mindrecord")


if __name__ == "__main__":
    run(main)
