"""The data sets that can be converted: how each one's pairs are listed and read.

A data set is a module with

    TITLE       its name for people
    PAIRS       the number of pairs in its release
    VALIDATION  the file in prep/splits that lists its validation pairs
    PARTS       its parts, each holding the same scenes under the same split; ("",) if it has none
    list_pairs(root, part) -> list[Pair], in the order that the split's indices mean
"""

import os
from dataclasses import dataclass

import numpy as np

from prep.errors import UserError
from prep.flowio import flow_size, read_flow
from prep.images import image_size, read_image


@dataclass(frozen=True)
class Pair:
    """The files of one pair: two frames, the flow between them and the masks that the set has.

    invalid and occluded are pictures, not 0 where the flow is not to be trusted or where the first
    frame's pixel can't be seen in the second.
    """

    name: str
    image1: str
    image2: str
    flow: str
    invalid: str | None = None
    occluded: str | None = None

    def files(self):
        """The paths of all its files."""
        return [f for f in (self.image1, self.image2, self.flow, self.invalid, self.occluded) if f]


def read_pair(pair):
    """Read all of a pair, bit for bit, as a dict of arrays.

    image1, image2: uint8 (H, W, 3); flow: float32 (H, W, 2), pixels; valid, occluded: uint8 (H, W), 1
    where the flow is known and where it leads to something hidden. UserError if the sizes differ.
    """
    flow, valid = read_flow(pair.flow)
    sample = {
        "image1": read_image(pair.image1),
        "image2": read_image(pair.image2),
        "flow": flow,
        "valid": valid,
        "occluded": np.zeros_like(valid),
    }
    size = flow.shape[:2]
    for field in ("image1", "image2"):
        check_size(getattr(pair, field), sample[field].shape[:2], pair.flow, size)
    if pair.invalid:
        mask = read_image(pair.invalid)[..., 0]
        check_size(pair.invalid, mask.shape, pair.flow, size)
        sample["valid"] = valid & (mask == 0)
    if pair.occluded:
        mask = read_image(pair.occluded)[..., 0]
        check_size(pair.occluded, mask.shape, pair.flow, size)
        sample["occluded"] = (mask != 0).astype(np.uint8)
    return sample


def pair_size(pair):
    """(H, W) of a pair from its files' headers; UserError if a header is wrong or they differ."""
    size = flow_size(pair.flow)
    for path in pair.files():
        if path != pair.flow:
            check_size(path, image_size(path), pair.flow, size)
    return size


def check_size(path, found, other, expected):
    """UserError if two files of one pair are not of the same (H, W)."""
    if found != expected:
        raise UserError(
            f"{path}: {found[1]}x{found[0]} pixels, expected {expected[1]}x{expected[0]} as "
            f"{os.path.basename(other)} has; the files of a pair must have one size"
        )


def check_folder(path, expected):
    """UserError unless `path` is a folder; `expected` says what it should hold."""
    if not os.path.isdir(path):
        found = "is not a folder" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path}: {found}; expected {expected}")


def missing_files(missing, reason):
    """UserError that names the first of the `missing` files and says how many more there are."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return UserError(f"{missing[0]}: not there{more}; {reason}")
