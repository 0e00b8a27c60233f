"""TartanAir: flights through simulated scenes, 640x480, with the flow that the camera's motion causes.

SCENE/Easy/P000/image_left/000000_left.png, SCENE/Easy/P000/flow/000000_000001_flow.npy and 000000_000001_mask.npy;
likewise with Hard. The mask is not 0 where the flow does not hold: at moving objects, occlusions and beyond the image.
Source: https://github.com/castacks/tartanair_tools
"""

import re

from prep.archive import ReleasePath, list_folders, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_folder, check_present

FLOW = re.compile(r"((\d{6})_(\d{6}))_flow\.npy")


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs by scene, difficulty, trajectory and frame, named SCENE/Easy/P000/NNNNNN."""
    check_folder(root, "the TartanAir release, SCENE/Easy/P000/flow/*_flow.npy")
    pairs = []
    for scene in list_folders(root):
        # The archives contain SCENE/SCENE.
        folder = inner if (inner := root / scene / scene).is_dir() else root / scene
        for level in ("Easy", "Hard"):
            for path in list_folders(folder / level) if (folder / level).is_dir() else []:
                pairs += _list_flows(folder / level / path, f"{scene}/{level}/{path}")
    if not pairs:
        raise NoRelease(
            f"{root}: contains no pairs; expected files such as SCENE/Easy/P000/flow/000000_000001_flow.npy"
        )
    check_present(
        [pair.invalid for pair in pairs],
        "download the masks as well: download_training.py --flow, without --only-flow",
    )
    check_present(
        [path for pair in pairs for path in (pair.image1, pair.image2, pair.flow)], "restore the missing file"
    )
    return pairs


def _list_flows(folder: ReleasePath, name: str) -> list[PairFiles]:
    flows, frames = folder / "flow", folder / "image_left"
    return [
        PairFiles(
            name=f"{name}/{match[2]}",
            image1=frames / f"{match[2]}_left.png",
            image2=frames / f"{match[3]}_left.png",
            flow=flows / match[0],
            invalid=flows / f"{match[1]}_mask.npy",
        )
        for match in map(FLOW.fullmatch, list_names(flows) if flows.is_dir() else [])
        if match
    ]


TARTANAIR = Dataset("TartanAir", list_pairs)
