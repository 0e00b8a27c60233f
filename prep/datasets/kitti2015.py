"""KITTI 2015: 200 pairs of street scenes with moving cars, in colour (image_2)."""

from prep.datasets.kitti import list_kitti

TITLE = "KITTI 2015"
PAIRS = 200
VALIDATION = "kitti2015_val.txt"
PARTS = ("",)


def list_pairs(root, part):
    """All pairs, as `list_kitti` says."""
    return list_kitti(root, ("image_2",))
