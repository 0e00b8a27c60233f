"""The FlyingThings3D subset, without the hard samples: both passes, cameras and directions.

train/image_clean (or image_final)/left/0000000.png, train/flow/left/into_future/0000000.flo and,
where they were downloaded too, train/flow_occlusions/left/into_future/0000000.png; right for left,
into_past for into_future; val/ the same, which is held out. Where its flow is not known it is NaN.
Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html
"""

import os
import re

from launch.errors import UserError
from prep.datasets import PairFiles, check_folder

TITLE = "FlyingThings3D subset"
PAIRS = None
VALIDATION = None
PARTS = ("clean", "final")
FLOW = re.compile(r"(\d{7})\.flo")


def list_pairs(root, part):
    """The pairs of one pass by camera, direction and frame, named
    PASS/train/left/into_future/NNNNNNN.

    A pass that was not downloaded has no pair, as has a flow whose second frame was left out as
    hard.
    """
    check_folder(root, "the FlyingThings3D subset, with train/ and val/ in it")
    folders = [os.path.join(root, split, f"image_{part}") for split in ("train", "val")]
    if part == "final" and not any(map(os.path.isdir, folders)):
        return []
    pairs = []
    for split in ("train", "val"):
        for camera in ("left", "right"):
            for direction, step in (("into_future", 1), ("into_past", -1)):
                pairs += _list_flows(root, part, split, camera, direction, step)
    if not pairs:
        raise UserError(
            f"{root}: no pair in it; expected train/image_{part}/left/0000000.png and "
            "train/flow/left/into_future/0000000.flo and so on"
        )
    return pairs


def _list_flows(root, part, split, camera, direction, step):
    frames = os.path.join(root, split, f"image_{part}", camera)
    flows = os.path.join(root, split, "flow", camera, direction)
    masks = os.path.join(root, split, "flow_occlusions", camera, direction)
    if not (os.path.isdir(frames) and os.path.isdir(flows)):
        return []
    has_masks, there, pairs = os.path.isdir(masks), set(os.listdir(frames)), []
    for match in filter(None, map(FLOW.fullmatch, sorted(os.listdir(flows)))):
        first, second = f"{match[1]}.png", f"{int(match[1]) + step:07}.png"
        if second in there:
            pairs.append(
                PairFiles(
                    name=f"{part}/{split}/{camera}/{direction}/{match[1]}",
                    image1=os.path.join(frames, first),
                    image2=os.path.join(frames, second),
                    flow=os.path.join(flows, match[0]),
                    occluded=os.path.join(masks, first) if has_masks else None,
                    held_out=split == "val",
                )
            )
    return pairs
