"""Early renderings of Kubric, in which x and y of the flow are swapped; otherwise as `kubric.py`."""

from prep.archive import ReleasePath
from prep.datasets import PairFiles, kubric

TITLE = "Kubric (x and y of the flow swapped)"
PAIRS = None
VALIDATION = None
PASSES = ("",)


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs, as described in `kubric.list_scenes`."""
    return kubric.list_scenes(root, swapped=True)
