"""The data sets that can be converted: how each one's pairs are listed and read.

A data set is a module with

    TITLE       its name for people
    PAIRS       the number of pairs in its release (in each part); None if that is not certain
    VALIDATION  the file in prep/splits that lists its validation pairs; None if its pairs say
                themselves which are held out, as the release does or as whole scenes
    PARTS       its parts, each holding the same scenes under the same split; ("",) if it has none
    list_pairs(root, part) -> list[PairFiles], in the order that the split's indices mean
"""

import os
from dataclasses import dataclass

import numpy as np

from launch.errors import UserError
from prep.formats.flow import MAX_PIXELS, flow_size, read_flow
from prep.formats.image import image_size, read_image


@dataclass(frozen=True)
class PairFiles:
    """The files of one pair: two frames, the flow between them and the masks that the set has.

    invalid, occluded  pictures, not 0 where the flow is not to be trusted or where the pixel can't
                       be seen in the second frame
    visible            a flow file that lacks those pixels of `flow` that can't be seen there
    flow_step          rows and columns of the flow file for each of the frames', as Spring has 2
    held_out           whether the data set itself has the pair for validation
    """

    name: str
    image1: str
    image2: str
    flow: str
    invalid: str | None = None
    occluded: str | None = None
    visible: str | None = None
    flow_step: int = 1
    held_out: bool = False

    def files(self):
        """The paths of all its files."""
        return [f for f in (self.image1, self.image2, self.flow, *self.masks(), self.visible) if f]

    def masks(self):
        """The paths of its masks: invalid, occluded; None for one that it has not."""
        return self.invalid, self.occluded


def read_pair(pair):
    """Read all of a pair, bit for bit, as a dict of arrays.

    image1, image2: uint8 (H, W, 3); flow: float32 (H, W, 2), pixels; valid, occluded: uint8 (H, W),
    1 where the flow is known and where it leads to something hidden. UserError if the sizes differ.
    """
    flow, valid = (a[:: pair.flow_step, :: pair.flow_step] for a in read_flow(pair.flow))
    size = flow.shape[:2]

    def read(path):
        image = read_image(path)
        check_size(path, image.shape[:2], pair.flow, size)
        return image

    sample = {"image1": read(pair.image1), "image2": read(pair.image2), "flow": flow}
    occluded = np.zeros(size, np.uint8)
    if pair.occluded:
        occluded = (read(pair.occluded)[..., 0] != 0).astype(np.uint8)
    if pair.visible:
        _, seen = read_flow(pair.visible)
        check_size(pair.visible, seen.shape, pair.flow, size)
        occluded |= valid & (seen == 0)
    if pair.invalid:
        valid = valid & (read(pair.invalid)[..., 0] == 0)
    return {**sample, "valid": valid, "occluded": occluded}


def pair_size(pair):
    """(H, W) of a pair from its files' headers; UserError if a header is wrong or they differ."""
    size = tuple(-(-side // pair.flow_step) for side in flow_size(pair.flow))
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{pair.flow}: {size[1]}x{size[0]} pixels, expected {MAX_PIXELS} in all at most")
    for path in (pair.image1, pair.image2, *filter(None, pair.masks())):
        check_size(path, image_size(path), pair.flow, size)
    if pair.visible:
        check_size(pair.visible, flow_size(pair.visible), pair.flow, size)
    return size


def check_size(path, found, other, expected) -> None:
    """UserError if two files of one pair are not of the same (H, W)."""
    if found != expected:
        raise UserError(
            f"{path}: {found[1]}x{found[0]} pixels, expected {expected[1]}x{expected[0]} as "
            f"{os.path.basename(other)} has; the files of a pair must have one size"
        )


def check_folder(path, expected) -> None:
    """UserError unless `path` is a folder; `expected` says what it should hold."""
    if not os.path.isdir(path):
        found = "is not a folder" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path}: {found}; expected {expected}")


def find_folder(root, inner, expected):
    """`root`/`inner` if it is a folder, else `root` itself; UserError unless that is one."""
    check_folder(root, expected)
    path = os.path.join(root, inner)
    return path if os.path.isdir(path) else root


def check_present(paths, reason) -> None:
    """UserError, with the `reason`, if one of the files `paths` is not there."""
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise missing_files(missing, reason)


def check_run(numbers, path_of) -> None:
    """UserError if frame `numbers` don't run from 1 without a gap; `path_of(number)` is a file."""
    gaps = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
    if gaps:
        raise missing_files(
            [path_of(number) for number in gaps],
            f"the scene's frames must run from 1 to {max(numbers)} without a gap",
        )


def missing_files(missing, reason):
    """UserError that names the first of the `missing` files and says how many more there are."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return UserError(f"{missing[0]}: not there{more}; {reason}")
