"""HD1K: drives through one street, 2560x1080, with flow measured where its makers trust it.

hd1k_flow_gt/flow_occ/SSSSSS_FFFF.png (sequence, frame; KITTI's format) and hd1k_input/image_2/ the
same. Every tenth sequence is held out: frames of one are too alike to be apart.
Source: http://hci-benchmark.iwr.uni-heidelberg.de
"""

import os
import re

from launch.errors import UserError
from prep.datasets import PairFiles, check_folder, check_present

TITLE = "HD1K"
PAIRS = None
VALIDATION = None
PARTS = ("",)
FRAME = re.compile(r"(\d{6})_\d+\.png")


def list_pairs(root, part):
    """The pairs of each sequence's frames with the next ones, in order, named SSSSSS_FFFF."""
    flows, frames = (
        os.path.join(root, "hd1k_flow_gt", "flow_occ"),
        os.path.join(root, "hd1k_input", "image_2"),
    )
    check_folder(flows, "the flow of the HD1K release, SSSSSS_FFFF.png")
    check_folder(frames, "the frames of the HD1K release, SSSSSS_FFFF.png")
    files = sorted(f for f in {*os.listdir(flows), *os.listdir(frames)} if FRAME.fullmatch(f))
    check_present(
        [os.path.join(folder, file) for file in files for folder in (frames, flows)],
        "every frame has its flow; complete the folder",
    )
    pairs = [
        PairFiles(
            name=file.removesuffix(".png"),
            image1=os.path.join(frames, file),
            image2=os.path.join(frames, following),
            flow=os.path.join(flows, file),
            held_out=int(file[:6]) % 10 == 9,
        )
        for file, following in zip(files, files[1:])
        if file[:6] == following[:6]
    ]
    if not pairs:
        raise UserError(f"{frames}: no pair in it; expected 000000_0010.png and so on")
    return pairs
