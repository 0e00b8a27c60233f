"""KITTI training pairs, in the layout shared by the 2012 and 2015 benchmarks.

training/flow_occ/000000_10.png and, optionally, training/flow_noc (without occluded pixels); the frames are
NNNNNN_10.png and NNNNNN_11.png. Those of 2012, of static streets, are in colored_0 or, in greyscale, in image_0; those
of 2015, with moving cars, are in image_2. The flow was measured by a laser scanner, so it is sparse.
Source: https://www.cvlibs.net/datasets/kitti/eval_flow.php
"""

import re
from functools import partial

from prep.archive import ReleasePath, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_complete, check_folder, find_folder

FLOW = re.compile(r"(\d{6})_10\.png")


def list_pairs(root: ReleasePath, render_pass: str, *, frame_folders: tuple[str, ...]) -> list[PairFiles]:
    """All pairs in order, named NNNNNN, with frames from the first of `frame_folders` that exists.

    `root` is the release's folder or its training folder.
    """
    training = find_folder(root, "training", "the KITTI release (containing training/) or its training folder")
    flows, visible = training / "flow_occ", training / "flow_noc"
    check_folder(flows, "the flow, NNNNNN_10.png")
    folders = [training / name for name in frame_folders]
    frames = next((folder for folder in folders if folder.is_dir()), folders[0])
    check_folder(frames, "the frames, NNNNNN_10.png and NNNNNN_11.png")
    numbers = sorted(match[1] for match in map(FLOW.fullmatch, list_names(flows)) if match)
    if not numbers:
        raise NoRelease(f"{flows}: contains no pairs; expected files such as 000000_10.png")
    pairs = [
        PairFiles(
            name=number,
            place=int(number),
            image1=frames / f"{number}_10.png",
            image2=frames / f"{number}_11.png",
            flow=flows / f"{number}_10.png",
            visible=visible / f"{number}_10.png" if visible.is_dir() else None,
        )
        for number in numbers
    ]
    check_complete(pairs)
    return pairs


KITTI2012 = Dataset(
    "KITTI 2012",
    partial(list_pairs, frame_folders=("colored_0", "image_0")),
    pairs=194,
    validation="kitti2012_val.txt",
)
KITTI2015 = Dataset(
    "KITTI 2015", partial(list_pairs, frame_folders=("image_2",)), pairs=200, validation="kitti2015_val.txt"
)
