"""FlyingChairs: 22,872 pairs in one folder, as 00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo.

Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html
"""

import os

from launch.errors import UserError
from prep.datasets import PairFiles, check_present, find_folder

TITLE = "FlyingChairs"
PAIRS = 22872
VALIDATION = "flyingchairs_val.txt"
PARTS = ("",)
SUFFIXES = ("_img1.ppm", "_img2.ppm", "_flow.flo")


def list_pairs(root, part):
    """All pairs under `root`, in name order. `root` is the release's folder or its data folder."""
    folder = find_folder(root, "data", "the FlyingChairs release (with data/ in it) or its data folder")
    files = set(os.listdir(folder))
    names = sorted({f[: -len(s)] for f in files for s in SUFFIXES if f.endswith(s) and f != s})
    if not names:
        raise UserError(f"{folder}: no pair in it; expected files as 00001{', 00001'.join(SUFFIXES)}")
    pairs = [PairFiles(n, *(os.path.join(folder, n + s) for s in SUFFIXES)) for n in names]
    check_present(
        [os.path.join(folder, n + s) for n in names for s in SUFFIXES if n + s not in files],
        "every pair needs two images and a flow; complete the folder or remove the pair's others",
    )
    return pairs
