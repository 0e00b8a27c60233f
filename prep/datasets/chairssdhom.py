"""ChairsSDHom: chairs with small displacements and homogeneous regions, for untextured and slow scenes.

data/train/t0/00001.png, data/train/t1/00001.png, data/train/flow/00001.pfm; likewise data/test/, which is held out.
One flow file of the release is known to contain NaN; that flow is unknown.
Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html
"""

import re

from prep.archive import ReleasePath, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_complete, find_folder

FLOW = re.compile(r"(\d+)\.pfm")


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs of train, then of test, named train/NNNNN. `root` is the release's folder or its data folder."""
    data = find_folder(root, "data", "the ChairsSDHom release (containing data/) or its data folder")
    pairs = [
        PairFiles(
            name=f"{split}/{match[1]}",
            image1=data / split / "t0" / f"{match[1]}.png",
            image2=data / split / "t1" / f"{match[1]}.png",
            flow=data / split / "flow" / match[0],
            held_out=split == "test",
        )
        for split in ("train", "test")
        if (data / split / "flow").is_dir()
        for match in map(FLOW.fullmatch, list_names(data / split / "flow"))
        if match
    ]
    if not pairs:
        raise NoRelease(f"{data}: contains no pairs; expected files such as train/flow/00001.pfm")
    check_complete(pairs)
    return pairs


CHAIRSSDHOM = Dataset("ChairsSDHom", list_pairs)
