"""KITTI 2015: 200 pairs of street scenes with moving cars, in colour (image_2)."""

from prep.archive import ReleasePath
from prep.datasets import PairFiles
from prep.datasets.kitti import list_kitti

TITLE = "KITTI 2015"
PAIRS = 200
VALIDATION = "kitti2015_val.txt"
PASSES = ("",)


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """All pairs, as described in `list_kitti`."""
    return list_kitti(root, ("image_2",))
