"""What every dataset module has in common: how its pairs are described, read and checked.

Each module defines one or several instances of `Dataset`, which `registry.py` lists by name. prep/README.md has the
table of datasets, and says how to add one.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.errors import UserError, describe_os_error
from prep.archive import ReleasePath, is_archive, list_folders, list_names, open_archives
from prep.formats import MAX_PIXELS
from prep.formats.flow import UNKNOWN_FLOW, KubricScale, flow_size, read_flow
from prep.formats.image import image_size, mask_size, read_image, read_mask
from prep.formats.video import VideoFrames

Sample = dict[str, np.ndarray]
"""The arrays of a pair by field: image1 and image2 uint8 (H, W, 3) RGB, flow float32 (H, W, 2) in pixels, valid and
occluded uint8 (H, W), 1 where the flow is known and where the second frame hides what the first shows. Without ground
truth, flow, valid and occluded are 0."""

RENDER_PASSES = ("clean", "final")
"""The passes of datasets that are rendered twice: the first part of their pairs' names."""
MARKS_UNKNOWN = (".png", ".flo5")
"""Suffixes of flow formats that themselves tell unknown flow from known."""


class BadPair(UserError):
    """The files of a pair are damaged or contradict each other."""


@dataclass(frozen=True)
class PairFiles:
    """The files of one pair: two frames, the flow between them if it is known, and the masks if there are any."""

    name: str
    image1: ReleasePath
    image2: ReleasePath
    flow: ReleasePath | None
    """None for a pair without ground truth."""
    invalid: ReleasePath | None = None
    """A mask, nonzero where the flow is unreliable."""
    valid: ReleasePath | None = None
    """A mask, nonzero where the flow is known."""
    occluded: ReleasePath | None = None
    """A mask, nonzero where the pixel is not visible in the second frame."""
    visible: ReleasePath | None = None
    """A second flow file, without the pixels that are not visible in the second frame."""
    flow_step: int = 1
    """Flow resolution divided by frame resolution: 2 for Spring."""
    flow_limit: float = UNKNOWN_FLOW
    """Flow of this magnitude or more is unknown."""
    flow_scale: KubricScale | None = None
    """Scale of the values in Kubric's flow files."""
    held_out: bool = False
    """Whether the dataset itself reserves this pair for validation."""
    place: int | None = None
    """Index of the pair in the complete release, which a fixed split lists; None if that is not known."""
    frames: VideoFrames | None = None
    """Which frames of a video the pair is, if image1 and image2 are that video."""
    nan_is_unknown: bool = True
    """Whether NaN in a format that does not provide for it means unknown flow, or is an error."""
    row: str = ""
    """File and line of a pair from a list, with which errors begin; "" for others."""

    def files(self) -> list[ReleasePath]:
        """All files that exist for this pair."""
        return [self.image1, self.image2, *(path for path in (self.flow, *self.masks(), self.visible) if path)]

    def masks(self) -> list[ReleasePath]:
        """The masks that exist for this pair."""
        return [path for path in (self.invalid, self.valid, self.occluded) if path]

    def how_to_read(self) -> str:
        """All that decides what is read for this pair, apart from the content of its files."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("name", "row", "held_out", "place"):
            del fields[name]
        return repr({name: "a file" if isinstance(value, ReleasePath) else value for name, value in fields.items()})

    @contextlib.contextmanager
    def naming_row(self) -> Iterator[None]:
        """Turn a UserError about a file into a BadPair; begin it, or an OSError, with the row of the list."""
        try:
            yield
        except UserError as error:
            raise BadPair(f"{self.row}: {error}" if self.row else str(error)) from None
        except OSError as error:
            if self.row:
                raise UserError(f"{self.row}: {describe_os_error(error)}") from None
            raise


class NoRelease(UserError):
    """A folder does not contain the release that it should."""


@dataclass(frozen=True)
class Dataset:
    """How a dataset's release is read and split."""

    title: str
    """Name for messages."""
    list_pairs: Callable[[ReleasePath, str], list[PairFiles]]
    """Called with the root of a release and a pass: returns all pairs of that pass, in the order that the indices of a
    user's split file refer to. Raises NoRelease if the root does not contain the release, UserError if files are
    missing."""
    pairs: int | None = None
    """Number of pairs in the release (per pass); None if that is not certain."""
    validation: str | None = None
    """File in prep/splits that lists the validation pairs by `place`; None if `PairFiles.held_out` decides."""
    passes: tuple[str, ...] = ("",)
    """Rendering passes, all of the same scenes and with the same split; ("",) if there is only one."""


def find_release(dataset: Dataset, root: Path) -> ReleasePath:
    """The folder that contains a release: `root`, if that is an archive its only folder, or the archives in `root`.

    Raises:
        UserError: an archive cannot be read. That a folder contains no release is left to `list_pairs`.
    """

    def fits(folder: ReleasePath) -> bool:
        try:
            dataset.list_pairs(folder, dataset.passes[0])
        except NoRelease:
            return False
        return True

    if root.is_dir() and any(map(is_archive, list_names(root))) and not fits(root):
        folder: ReleasePath = open_archives(root)
    elif root.is_file() and is_archive(root):
        folder = open_archives(root)
    else:
        return root
    while len(inner := list_folders(folder)) == 1 and not fits(folder):
        folder = folder / inner[0]
    return folder


def read_pair(pair: PairFiles) -> Sample:
    """Read all arrays of a pair, bit for bit. Raises BadPair if a file is damaged or files contradict each other."""
    with pair.naming_row():
        return _read_pair(pair)


def _read_pair(pair: PairFiles) -> Sample:
    if not pair.flow:
        if pair.frames:
            image1, image2 = pair.frames.read(pair.image1)
        else:
            image1, image2 = read_image(pair.image1), read_image(pair.image2)
        size = image1.shape[:2]
        check_size(pair.image2, image2.shape[:2], pair.image1, size)
        unknown = np.zeros(size, np.uint8)
        flow = np.zeros((*size, 2), np.float32)
        return {"image1": image1, "image2": image2, "flow": flow, "valid": unknown, "occluded": unknown}
    flow_path = pair.flow
    arrays = read_flow(flow_path, limit=pair.flow_limit, scale=pair.flow_scale)
    flow, valid = (array[:: pair.flow_step, :: pair.flow_step] for array in arrays)
    size = flow.shape[:2]

    def read(path: ReleasePath, reader: Callable[[ReleasePath], np.ndarray] = read_image) -> np.ndarray:
        image = reader(path)
        check_size(path, image.shape[:2], flow_path, size)
        return image

    sample = {"image1": read(pair.image1), "image2": read(pair.image2), "flow": flow}
    occluded = np.zeros(size, np.uint8)
    if pair.occluded:
        occluded = read(pair.occluded, read_mask)
    if pair.visible:
        _, seen = read_flow(pair.visible)
        check_size(pair.visible, seen.shape, pair.flow, size)
        occluded |= valid & (seen == 0)
    if pair.invalid:
        valid = valid & (read(pair.invalid, read_mask) == 0)
    if pair.valid:
        mask = read(pair.valid, read_mask)
        check_mask(pair.valid, mask, pair.flow, valid)
        valid = mask
    elif not pair.nan_is_unknown and pair.flow.suffix.lower() not in MARKS_UNKNOWN:
        check_nan(pair.flow, flow)
    if pair.row and not valid.any():
        raise UserError(
            f"{pair.flow}: contains no known flow; leave the 'flow' column empty if there is no ground truth"
        )
    return {**sample, "valid": valid, "occluded": occluded}


def pair_size(pair: PairFiles) -> tuple[int, int]:
    """(H, W) of a pair from its files' headers; BadPair if a header is damaged or the sizes differ."""
    with pair.naming_row():
        return _pair_size(pair)


def _pair_size(pair: PairFiles) -> tuple[int, int]:
    if pair.frames:
        reference, (height, width) = pair.image1, pair.frames.size
    elif pair.flow:
        reference, (flow_height, flow_width) = pair.flow, flow_size(pair.flow)
        height, width = -(-flow_height // pair.flow_step), -(-flow_width // pair.flow_step)
        if pair.visible:
            check_size(pair.visible, flow_size(pair.visible), pair.flow, (flow_height, flow_width))
    else:
        reference, (height, width) = pair.image1, image_size(pair.image1)
    if height * width > MAX_PIXELS:
        raise UserError(f"{reference}: {width}x{height} pixels, expected at most {MAX_PIXELS} in total")
    if not pair.frames:
        for path in (pair.image1, pair.image2):
            check_size(path, image_size(path), reference, (height, width))
    for path in pair.masks():
        check_size(path, mask_size(path), reference, (height, width))
    return height, width


def check_mask(path: ReleasePath, mask: np.ndarray, flow: ReleasePath, known: np.ndarray) -> None:
    """Raise UserError if a mask says that flow is known which the flow file does not contain."""
    if wrong := np.argwhere((mask != 0) & (known == 0)).tolist():
        raise UserError(
            f"{path}: marks {len(wrong)} pixels as valid at which {flow.name} is NaN or over 1e9, the first at row "
            f"{wrong[0][0]}, column {wrong[0][1]}; the mask must be 0 there"
        )


def check_nan(path: ReleasePath, flow: np.ndarray) -> None:
    """Raise UserError if flow contains NaN."""
    if wrong := np.argwhere(np.isnan(flow).any(axis=2)).tolist():
        raise UserError(
            f"{path}: NaN at {len(wrong)} of {flow.shape[0] * flow.shape[1]} pixels, the first at row {wrong[0][0]}, "
            f"column {wrong[0][1]}; correct it, add a mask in the 'valid' column that is 0 there, or use "
            "--nan-is-unknown"
        )


def check_size(path: ReleasePath, found: tuple[int, ...], other: ReleasePath, expected: tuple[int, ...]) -> None:
    """Raise UserError unless two files of a pair have the same (H, W)."""
    if found != expected:
        raise UserError(
            f"{path}: {found[1]}x{found[0]} pixels, expected {expected[1]}x{expected[0]} as in {other.name}; "
            "all files of a pair must have the same size"
        )


def check_folder(path: ReleasePath, expected: str) -> None:
    """Raise UserError unless `path` is a folder; `expected` says what it should contain."""
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise NoRelease(f"{path}: {found}; expected {expected}")


def find_folder(root: ReleasePath, inner: str, expected: str) -> ReleasePath:
    """`root`/`inner` if that is a folder, else `root`; UserError unless `root` is one."""
    check_folder(root, expected)
    path = root / inner
    return path if path.is_dir() else root


def check_present(paths: Iterable[ReleasePath | None], remedy: str) -> None:
    """Raise UserError, ending in `remedy`, if one of the files is missing."""
    missing = [path for path in paths if path and not path.exists()]
    if missing:
        raise missing_files(missing, remedy)


def check_complete(pairs: Iterable[PairFiles]) -> None:
    """Raise UserError if a file of a pair is missing."""
    check_present([path for pair in pairs for path in pair.files()], "restore the missing file")


def check_consecutive(numbers: list[int], path_of: Callable[[int], ReleasePath]) -> None:
    """Raise UserError unless the frame numbers run from 1 without a gap; `path_of(number)` is a frame's file."""
    last = max(numbers, default=0)
    gaps = sorted(set(range(1, last + 1)) - set(numbers))
    if gaps:
        raise missing_files(map(path_of, gaps), f"frames of a scene must run from 1 to {last} without a gap")


def missing_files(missing: Iterable[ReleasePath], remedy: str) -> UserError:
    """A UserError that names the first missing file and counts the others."""
    first, *others = missing
    more = f", and {len(others)} more files" if others else ""
    return UserError(f"{first}: missing{more}; {remedy}")
