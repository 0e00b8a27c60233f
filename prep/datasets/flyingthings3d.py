"""FlyingThings3D, the whole release: both passes, cameras and directions of time; its flow is .pfm.

frames_cleanpass (or frames_finalpass)/TRAIN/A/0000/left/0006.png and
optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm; TEST is held out.

Its makers leave the frames out of training that are too hard, by the list all_unused_files.txt: put
that beside the folders. Source:
https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html
"""

import glob
import os
import re
import sys

from launch.errors import UserError
from prep.datasets import PairFiles, check_folder

TITLE = "FlyingThings3D"
PAIRS = None  # how many the list leaves
VALIDATION = None
PARTS = ("clean", "final")
HARD = "all_unused_files.txt"
DIRECTIONS = (("into_future", "IntoFuture", 1), ("into_past", "IntoPast", -1))


def list_pairs(root, part):
    """The pairs of one pass by scene, camera, direction and frame, TRAIN before TEST.

    They are named PASS/TRAIN/A/0000/left/into_future/0006. A pass that was not downloaded
    has no pair, as has a flow whose second frame does not exist.
    """
    flows = os.path.join(root, "optical_flow")
    check_folder(flows, "the flow of the FlyingThings3D release, TRAIN/A/0000/into_future/left/*.pfm")
    frames = os.path.join(root, f"frames_{part}pass")
    if part == "final" and not os.path.isdir(frames):
        return []
    check_folder(frames, f"the {part} pass, TRAIN/A/0000/left/0006.png")
    hard = read_hard(os.path.join(root, HARD))
    pairs = [
        pair
        for scene in sorted(glob.glob("T*/*/*", root_dir=flows), key=lambda s: (s[:2] == "TE", s))
        for camera in ("left", "right")
        for direction, word, step in DIRECTIONS
        for pair in _list_flows(flows, frames, part, scene, camera, direction, word, step)
        if not hard & {os.path.relpath(path, frames) for path in (pair.image1, pair.image2)}
    ]
    if not pairs:
        raise UserError(f"{flows}: no pair in it; expected TRAIN/A/0000/into_future/left/*.pfm")
    return pairs


def _list_flows(flows, frames, part, scene, camera, direction, word, step):
    folder, pairs = os.path.join(flows, scene, direction, camera), []
    pattern = re.compile(rf"OpticalFlow{word}_(\d{{4}})_[LR]\.pfm")
    for match in map(pattern.fullmatch, sorted(os.listdir(folder) if os.path.isdir(folder) else [])):
        if match:
            first, second = (os.path.join(frames, scene, camera, f"{int(match[1]) + n:04}.png") for n in (0, step))
            # A scene's last frame has flow too, to one that was not rendered.
            if os.path.exists(second):
                pairs.append(
                    PairFiles(
                        name=f"{part}/{scene}/{camera}/{direction}/{match[1]}",
                        image1=first,
                        image2=second,
                        flow=os.path.join(folder, match[0]),
                        held_out=scene.startswith("TEST"),
                    )
                )
    return pairs


def read_hard(path):
    """The frames in the list of hard ones, as TRAIN/A/0000/left/0006.png; none without a list."""
    if not os.path.exists(path):
        print(f"note: {path}: not there, so no hard frame is left out", file=sys.stderr)
        return set()
    with open(path, encoding="utf-8", errors="replace") as file:
        return {line.strip() for line in file}
