"""Submissions: the test sets of Sintel and KITTI, and the folders that their servers expect."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from launch import progress
from launch.communicator import Communicator
from launch.errors import UserError, counted
from launch.files import check_replaceable, partial_of
from launch.logs import print_note
from prep.datasets import RENDER_PASSES

if TYPE_CHECKING:
    from model.inference import FlowPredictor
    from model.predict import FramePair


class BenchmarkPair(NamedTuple):
    """A pair of a test set."""

    file: str
    """Path of the flow to submit, in the submission's folder."""
    image1: pathlib.Path
    image2: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark with its test set, which has no public ground truth."""

    name: str
    """Name for messages, such as "KITTI 2015"."""
    pairs: list[BenchmarkPair]

    @functools.cached_property
    def by_size(self) -> dict[tuple[int, int], list[BenchmarkPair]]:
        """The pairs by (height, width) of their images; UserError if those of a pair differ in size."""
        from prep.formats.image import image_size

        groups: dict[tuple[int, int], list[BenchmarkPair]] = {}
        for pair in self.pairs:
            height, width = image_size(pair.image1)
            if image_size(pair.image2) != (height, width):
                other_height, other_width = image_size(pair.image2)
                raise UserError(
                    f"{pair.image2}: {other_height}x{other_width} pixels, expected {height}x{width} as "
                    f"{pair.image1.name} has; unpack the test set again"
                )
            groups.setdefault((height, width), []).append(pair)
        return groups


class Layout(NamedTuple):
    """How a benchmark's release stores its test set."""

    benchmark: str
    folder: str
    """Folder of the test set in the release."""
    images: tuple[str, ...]
    """Folders of images in it, all of which a submission needs."""
    list_pairs: Callable[[pathlib.Path], list[BenchmarkPair]]
    total: int
    """Pairs in the complete test set."""


def list_test_pairs(root: pathlib.Path) -> Benchmark:
    """Find the test set of Sintel or KITTI in an unpacked release.

    Args:
        root: folder of the release, or the folder of the test set in it:
            Sintel: test/{clean,final}/SCENE/frame_0001.png
            KITTI 2015: testing/image_2/000000_10.png, 000000_11.png
            KITTI 2012: testing/colored_0 or, without it, testing/image_0, likewise

    Returns:
        The pairs with the files to submit: {clean,final}/SCENE/frame0001.flo according to the readme of Sintel's
        bundler; flow/000000_10.png (2015) and 000000_10.png (2012) according to those of KITTI's development kits.

    Raises:
        UserError: the folder has another layout, or an image is missing.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected the unpacked test set of Sintel or KITTI")
    for layout in LAYOUTS:
        test = root / layout.folder
        if root.resolve().name == layout.folder and not test.is_dir():
            test = root
        folders = [test / name for name in layout.images]
        if not any(folder.is_dir() for folder in folders):
            continue
        for folder in folders:
            if not folder.is_dir():
                raise UserError(
                    f"{folder}: missing, but a submission to {layout.benchmark} needs it; download and unpack it too"
                )
        pairs = [pair for folder in folders for pair in layout.list_pairs(folder)]
        if layout.benchmark == "Sintel":
            check_passes(test, pairs)
        if len(pairs) != layout.total:
            print_note(f"the test set of {layout.benchmark} has {layout.total} pairs, {test} has {len(pairs)}")
        return Benchmark(layout.benchmark, pairs)
    found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
    raise UserError(
        f"{root}: contains no test set (it has {found}); expected test/clean and test/final of Sintel, or "
        "testing/image_2 (KITTI 2015) or testing/colored_0 (KITTI 2012)"
    )


def list_sintel(folder: pathlib.Path) -> list[BenchmarkPair]:
    """The pairs of one pass of Sintel's test set, scenes in alphabetical order."""
    pairs = []
    for scene in sorted(path for path in folder.iterdir() if path.is_dir()):
        frames = numbered_files(scene, r"frame_(\d{4})\.png")
        if not frames:
            raise UserError(f"{scene}: contains no frames; expected frame_0001.png and so on")
        numbers = range(1, max(frames) + 1)
        check_frames(scene / f"frame_{number:04}.png" for number in numbers)
        pairs += [
            BenchmarkPair(f"{folder.name}/{scene.name}/frame{number:04}.flo", frames[number], frames[number + 1])
            for number in numbers[:-1]
        ]
    if not pairs:
        raise UserError(f"{folder}: contains no pairs; expected SCENE/frame_0001.png and so on")
    return pairs


def check_passes(test: pathlib.Path, pairs: Iterable[BenchmarkPair]) -> None:
    """Raise UserError unless both passes of Sintel's test set have the same pairs."""
    files = [pair.file.split("/", 1) for pair in pairs]
    clean, final = ({file for name, file in files if name == wanted} for wanted in RENDER_PASSES)
    if clean != final:
        file = min(clean ^ final)
        incomplete = "final" if file in clean else "clean"
        raise UserError(
            f"{test / incomplete}: lacks the frames for {file}, which the other pass has; a submission needs both "
            "passes, so unpack the test set again"
        )


def list_kitti2012(folder: pathlib.Path) -> list[BenchmarkPair]:
    """The pairs of KITTI's test set with its images in `folder`."""
    frames = numbered_files(folder, r"(\d{6})_1[01]\.png")
    if not frames:
        raise UserError(f"{folder}: contains no pairs; expected 000000_10.png, 000000_11.png and so on")
    names = [f"{number:06}" for number in range(max(frames) + 1)]
    check_frames(folder / f"{name}_{frame}.png" for name in names for frame in (10, 11))
    return [BenchmarkPair(f"{name}_10.png", folder / f"{name}_10.png", folder / f"{name}_11.png") for name in names]


def list_kitti2015(folder: pathlib.Path) -> list[BenchmarkPair]:
    """The pairs of KITTI 2015's test set, whose submissions have a folder for each of several tasks."""
    return [pair._replace(file=f"flow/{pair.file}") for pair in list_kitti2012(folder)]


LAYOUTS = (
    Layout("Sintel", "test", RENDER_PASSES, list_sintel, 1104),
    Layout("KITTI 2015", "testing", ("image_2",), list_kitti2015, 200),
    Layout("KITTI 2012", "testing", ("colored_0",), list_kitti2012, 195),
    Layout("KITTI 2012", "testing", ("image_0",), list_kitti2012, 195),
)


def numbered_files(folder: pathlib.Path, pattern: str) -> dict[int, pathlib.Path]:
    """The files of a folder whose names match, by the number in the name."""
    matches = ((re.fullmatch(pattern, path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def check_frames(paths: Iterable[pathlib.Path]) -> None:
    """Raise UserError if one of these frames is missing."""
    if missing := [path for path in paths if not path.is_file()]:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: missing{more}; a submission needs every pair of the test set, so unpack it again"
        )


class SubmissionWriter:
    """Writes flow to a folder under the pairs' names, in the format of their suffix."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def write(self, pair: "FramePair", flow: np.ndarray) -> None:
        """Write the flow of a pair, (H, W, 2) float32 in pixels."""
        from prep.formats.flow import write_flo, write_kitti_png

        path = self.folder / pair.name
        path.parent.mkdir(parents=True, exist_ok=True)
        (write_flo if path.suffix == ".flo" else write_kitti_png)(path, flow)


def check_out(out: pathlib.Path, benchmark: Benchmark) -> None:
    """Check that `out` can become the folder of a submission, and remove what a killed process half wrote beside it.

    Raises:
        UserError: it cannot, or an interrupted submission to it has files that are not part of this one.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty, and other files must not get into a submission; name a new folder")
    check_replaceable(out)
    partial, expected = partial_of(out.resolve()), {pair.file for pair in benchmark.pairs}
    for path in partial.rglob("*"):
        if path.is_file() and ".partial-" in path.name:  # half written by a process that was killed
            path.unlink()
        elif path.is_file() and str(path.relative_to(partial)) not in expected:
            raise UserError(f"{path}: is not part of this submission to {benchmark.name}; remove {partial}")


def write_submission(
    benchmark: Benchmark, out: pathlib.Path, predictor: "FlowPredictor", batch: int, comm: Communicator
) -> None:
    """Predict the flow of a test set and write it, to OUT.partial until it is complete.

    Args:
        benchmark: the benchmark whose test set to predict; the ranks share its pairs.
        out: folder of the submission, from `check_out`.
        predictor: computes the flow.
        batch: pairs per batch and rank.
        comm: the ranks.

    Raises:
        UserError: an image cannot be read, or the ranks do not share the folder.
        OSError: the flow cannot be written.
    """
    from model.predict import FramePair, predict
    from prep.formats.image import read_image

    partial = partial_of(out.resolve())
    shares = [pairs[comm.rank :: comm.size] for pairs in benchmark.by_size.values()]
    with progress.bar(total=sum(map(len, shares)), unit="pair", disable=comm.rank != 0) as bar:
        for share in shares:  # one graph for each size
            pairs = (FramePair(pair.file, read_image(pair.image1), read_image(pair.image2)) for pair in share)
            predict(predictor, pairs, SubmissionWriter(partial).write, batch=batch, on_pairs=bar.update)
    comm.barrier()
    if comm.rank == 0:
        if missing := [pair.file for pair in benchmark.pairs if not (partial / pair.file).is_file()]:
            raise UserError(
                f"{partial / missing[0]}: another rank wrote it, but not to this disk, like {len(missing)} of "
                f"{counted(len(benchmark.pairs), 'file')}; name a folder that all hosts share"
            )
        partial.rename(out.resolve())
        archive = "bundle it with Sintel's bundler" if benchmark.name == "Sintel" else "zip its contents"
        pairs = counted(len(benchmark.pairs), "pair")
        print(f"results: {out}, flow of {pairs} for {benchmark.name}; {archive} and upload that")
