"""FlyingChairs: 22,872 pairs in one folder, as 00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo.

Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html
"""

import re

from prep.archive import ReleasePath, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_present, find_folder

SUFFIXES = ("_img1.ppm", "_img2.ppm", "_flow.flo")
NUMBER = re.compile(r"\d{5}")


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """All pairs in name order. `root` is the release's folder or its data folder."""
    folder = find_folder(root, "data", "the FlyingChairs release (containing data/) or its data folder")
    files = set(list_names(folder))
    names = sorted({f.removesuffix(s) for f in files for s in SUFFIXES if f.endswith(s) and f != s})
    if not names:
        raise NoRelease(f"{folder}: contains no pairs; expected files such as 00001{', 00001'.join(SUFFIXES)}")
    check_present(
        [folder / (name + suffix) for name in names for suffix in SUFFIXES if name + suffix not in files],
        "every pair needs two images and a flow file; restore the missing file or delete the rest of its pair",
    )
    image1, image2, flow = SUFFIXES
    return [
        PairFiles(
            name,
            folder / f"{name}{image1}",
            folder / f"{name}{image2}",
            folder / f"{name}{flow}",
            place=int(name) - 1 if NUMBER.fullmatch(name) else None,
        )
        for name in names
    ]


FLYINGCHAIRS = Dataset("FlyingChairs", list_pairs, pairs=22872, validation="flyingchairs_val.txt")
