"""KITTI 2012: 194 pairs of static streets, in colour (colored_0) or else grey (image_0)."""

from prep.datasets.kitti import list_kitti

TITLE = "KITTI 2012"
PAIRS = 194
VALIDATION = "kitti2012_val.txt"
PARTS = ("",)


def list_pairs(root, part):
    """All pairs, as `list_kitti` says."""
    return list_kitti(root, ("colored_0", "image_0"))
