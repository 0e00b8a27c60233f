"""KITTI's training pairs, in the layout that the 2012 and 2015 benchmarks share.

training/flow_occ/000000_10.png and, where it was downloaded too, flow_noc (the pixels that are not
occluded), with the frames NNNNNN_10.png and NNNNNN_11.png in a folder that differs. The flow was
measured, by a laser scanner, so it is known at some pixels only.
Source: https://www.cvlibs.net/datasets/kitti/eval_flow.php
"""

import os
import re

from launch.errors import UserError
from prep.datasets import PairFiles, check_folder, check_present, find_folder

FLOW = re.compile(r"(\d{6})_10\.png")


def list_kitti(root, frame_folders):
    """All pairs in order, with the frames of the first of `frame_folders` that is there, named
    NNNNNN.

    `root` is the release's folder or its training folder.
    """
    training = find_folder(root, "training", "the KITTI release (with training/ in it) or its training folder")
    flows, seen = os.path.join(training, "flow_occ"), os.path.join(training, "flow_noc")
    check_folder(flows, "the flow, NNNNNN_10.png")
    frames = [os.path.join(training, name) for name in frame_folders]
    frames = next((folder for folder in frames if os.path.isdir(folder)), frames[0])
    check_folder(frames, "the frames, NNNNNN_10.png and NNNNNN_11.png")
    numbers = sorted(m[1] for m in map(FLOW.fullmatch, os.listdir(flows)) if m)
    if not numbers:
        raise UserError(f"{flows}: no pair in it; expected 000000_10.png and so on")
    pairs = [
        PairFiles(
            name=number,
            image1=os.path.join(frames, number + "_10.png"),
            image2=os.path.join(frames, number + "_11.png"),
            flow=os.path.join(flows, number + "_10.png"),
            visible=os.path.join(seen, number + "_10.png") if os.path.isdir(seen) else None,
        )
        for number in numbers
    ]
    check_present([path for pair in pairs for path in pair.files()], "complete the folder")
    return pairs
