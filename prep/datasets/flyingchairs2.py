"""FlyingChairs2: FlyingChairs rendered anew, with flow in both directions and occlusions.

train/0000000-img_0.png, -img_1.png, -flow_01.flo and, optionally, -occ_01.png (occlusions); likewise -flow_10.flo and
-occ_10.png backward, and val/, which is held out.
Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html
"""

import re

from prep.archive import ReleasePath, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_present

FLOW = re.compile(r"(\d{7})-flow_(01|10)\.flo")
DIRECTIONS = {"01": "forward", "10": "backward"}


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs of train, then of val, by number and direction, named train/NNNNNNN/forward."""
    pairs = [pair for split in ("train", "val") if (root / split).is_dir() for pair in _list_split(root / split)]
    if not pairs:
        raise NoRelease(f"{root}: contains no pairs; expected files such as train/0000000-flow_01.flo")
    return pairs


def _list_split(folder: ReleasePath) -> list[PairFiles]:
    names = list_names(folder)
    present, pairs = set(names), []
    for match in filter(None, map(FLOW.fullmatch, names)):
        number, order = match.groups()
        mask = f"{number}-occ_{order}.png"
        pairs.append(
            PairFiles(
                name=f"{folder.name}/{number}/{DIRECTIONS[order]}",
                image1=folder / f"{number}-img_{order[0]}.png",
                image2=folder / f"{number}-img_{order[1]}.png",
                flow=folder / match[0],
                occluded=folder / mask if mask in present else None,
                held_out=folder.name == "val",
            )
        )
    check_present(
        [path for pair in pairs for path in (pair.image1, pair.image2) if path.name not in present],
        "every flow file needs two images; restore the missing file",
    )
    return pairs


# Without `pairs`: one direction of the flow is optional.
FLYINGCHAIRS2 = Dataset("FlyingChairs2", list_pairs)
