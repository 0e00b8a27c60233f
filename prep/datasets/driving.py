"""Driving: drives through one virtual street, in the layout of `sceneflow.py`: scenes such as
35mm_focallength/scene_forwards/fast.

It has no validation split. Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html
"""

from prep.archive import ReleasePath
from prep.datasets import PairFiles, sceneflow

TITLE = "Driving"
PAIRS = None
VALIDATION = None
PASSES = sceneflow.PASSES


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs of one pass, as described in `list_sceneflow`."""
    return sceneflow.list_sceneflow(root, render_pass, "35mm_focallength/scene_forwards/fast")
