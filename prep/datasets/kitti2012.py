"""KITTI 2012: 194 pairs of static streets, in colour (colored_0) or else greyscale (image_0)."""

from prep.archive import ReleasePath
from prep.datasets import PairFiles
from prep.datasets.kitti import list_kitti

TITLE = "KITTI 2012"
PAIRS = 194
VALIDATION = "kitti2012_val.txt"
PASSES = ("",)


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """All pairs, as described in `list_kitti`."""
    return list_kitti(root, ("colored_0", "image_0"))
