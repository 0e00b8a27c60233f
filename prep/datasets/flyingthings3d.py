"""FlyingThings3D, the full release, in the layout of `sceneflow.py`: scenes such as TRAIN/A/0000; TEST is held out.

The authors exclude frames that are too hard, listed in all_unused_files.txt: put that file beside the folders.
Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html
"""

import dataclasses

from launch.logs import print_note
from prep.archive import ReleasePath
from prep.datasets import RENDER_PASSES, Dataset, PairFiles, sceneflow

EXCLUDED_FRAMES = "all_unused_files.txt"


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs of one pass as described in `sceneflow.list_pairs`, TRAIN before TEST."""
    pairs = sceneflow.list_pairs(root, render_pass, example="TRAIN/A/0000")
    excluded = read_excluded_frames(root / EXCLUDED_FRAMES) if pairs else set()
    kept = []
    for pair in pairs:
        scene, (camera, _, _) = pair.name.split("/")[1:4], pair.name.split("/")[4:]
        frames = (f"{'/'.join(scene)}/{camera}/{path.name}" for path in (pair.image1, pair.image2))
        if not excluded.intersection(frames):
            kept.append(dataclasses.replace(pair, held_out=scene[0] == "TEST"))
    return sorted(kept, key=lambda pair: pair.held_out)


def read_excluded_frames(path: ReleasePath) -> set[str]:
    """The frames that the authors exclude, as TRAIN/A/0000/left/0006.png; none if there is no such file."""
    if not path.exists():
        print_note(f"{path}: not found, so no hard frames are excluded")
        return set()
    return {line.strip() for line in path.read_text("utf-8", "replace").splitlines()}


# Without `pairs`: their number depends on the list of excluded frames.
FLYINGTHINGS3D = Dataset("FlyingThings3D", list_pairs, passes=RENDER_PASSES)
