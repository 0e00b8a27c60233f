"""Monkaa: animated scenes of one monkey, in the layout of `sceneflow.py`: scenes such as a_rain_of_stones_x2.

It has no validation split. Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html
"""

from prep.archive import ReleasePath
from prep.datasets import PairFiles, sceneflow

TITLE = "Monkaa"
PAIRS = None
VALIDATION = None
PASSES = sceneflow.PASSES


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs of one pass, as described in `list_sceneflow`."""
    return sceneflow.list_sceneflow(root, render_pass, "a_rain_of_stones_x2")
