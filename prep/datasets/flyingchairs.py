"""FlyingChairs: 22,872 pairs in one folder, as 00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo.

Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html
"""

import os

from prep.datasets import Pair, check_folder, missing_files
from prep.errors import UserError

TITLE = "FlyingChairs"
PAIRS = 22872
VALIDATION = "flyingchairs_val.txt"
PARTS = ("",)
SUFFIXES = ("_img1.ppm", "_img2.ppm", "_flow.flo")


def list_pairs(root, part):
    """All pairs under `root`, in name order. `root` is the release's folder or its data folder."""
    check_folder(root, "the FlyingChairs release (with data/ in it) or its data folder")
    data = os.path.join(root, "data")
    folder = data if os.path.isdir(data) else root
    files = set(os.listdir(folder))
    names = sorted({f[: -len(s)] for f in files for s in SUFFIXES if f.endswith(s) and f != s})
    if not names:
        raise UserError(f"{folder}: no pair in it; expected files as 00001{', 00001'.join(SUFFIXES)}")
    missing = [n + s for n in names for s in SUFFIXES if n + s not in files]
    if missing:
        raise missing_files(
            [os.path.join(folder, f) for f in missing],
            "every pair needs two images and a flow; complete the folder or remove the pair's others",
        )
    return [Pair(n, *(os.path.join(folder, n + s) for s in SUFFIXES)) for n in names]
