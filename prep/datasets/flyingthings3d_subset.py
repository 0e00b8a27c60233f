"""The FlyingThings3D subset, without the hardest samples: both passes, both cameras, both directions in time.

train/image_clean (or image_final)/left/0000000.png, train/flow/left/into_future/0000000.flo and, optionally,
train/flow_occlusions/left/into_future/0000000.png; likewise with right, into_past and val/, which is held out.
Unknown flow is NaN. Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html
"""

import re

from prep.archive import ReleasePath, list_names
from prep.datasets import RENDER_PASSES, Dataset, NoRelease, PairFiles, check_folder

FLOW = re.compile(r"(\d{7})\.flo")
DIRECTIONS = {"into_future": 1, "into_past": -1}
"""The step from the first frame's number to the second's, by folder."""


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs of one pass by camera, direction and frame, named PASS/train/left/into_future/NNNNNNN.

    A flow whose second frame was excluded from the subset makes no pair. The final pass may be absent.
    """
    check_folder(root, "the FlyingThings3D subset, containing train/ and val/")
    if render_pass == "final" and not any((root / split / "image_final").is_dir() for split in ("train", "val")):
        return []
    pairs = [
        pair
        for split in ("train", "val")
        for camera in ("left", "right")
        for direction in DIRECTIONS
        for pair in _list_flows(root, render_pass, split, camera, direction)
    ]
    if not pairs:
        raise NoRelease(
            f"{root}: contains no pairs; expected files such as train/image_{render_pass}/left/0000000.png and "
            "train/flow/left/into_future/0000000.flo"
        )
    return pairs


def _list_flows(root: ReleasePath, render_pass: str, split: str, camera: str, direction: str) -> list[PairFiles]:
    frames = root / split / f"image_{render_pass}" / camera
    flows = root / split / "flow" / camera / direction
    masks = root / split / "flow_occlusions" / camera / direction
    if not (frames.is_dir() and flows.is_dir()):
        return []
    has_masks, present, pairs = masks.is_dir(), set(list_names(frames)), []
    for match in filter(None, map(FLOW.fullmatch, list_names(flows))):
        first, second = f"{match[1]}.png", f"{int(match[1]) + DIRECTIONS[direction]:07}.png"
        if second in present:
            pairs.append(
                PairFiles(
                    name=f"{render_pass}/{split}/{camera}/{direction}/{match[1]}",
                    image1=frames / first,
                    image2=frames / second,
                    flow=flows / match[0],
                    occluded=masks / first if has_masks else None,
                    held_out=split == "val",
                )
            )
    return pairs


FLYINGTHINGS3D_SUBSET = Dataset("FlyingThings3D subset", list_pairs, passes=RENDER_PASSES)
