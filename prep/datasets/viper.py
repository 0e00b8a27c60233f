"""VIPER: drives through a virtual city, 1920x1080, in several kinds of weather.

train/img/001/001_00001.png (or .jpg) and train/flow/001/001_00001.npz; likewise val/, which is held out. Flow of 512 px
or more is unknown. A flow whose second frame is missing makes no pair. Source: https://playing-for-benchmarks.org
"""

import re

from prep.archive import ReleasePath, list_folders, list_names
from prep.datasets import Dataset, NoRelease, PairFiles

FLOW = re.compile(r"(\d+)_(\d{5})\.npz")
UNKNOWN = 512.0
"""Pixels: flow of this magnitude or more is unknown."""


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs of train, then of val, by sequence and frame, named train/SEQ_NNNNN."""
    pairs = [
        pair
        for split in ("train", "val")
        if (root / split / "flow").is_dir()
        for sequence in list_folders(root / split / "flow")
        for pair in _list_sequence(root / split, sequence)
    ]
    if not pairs:
        raise NoRelease(
            f"{root}: contains no pairs; expected files such as train/flow/001/001_00001.npz and "
            "train/img/001/001_00001.png"
        )
    return pairs


def _list_sequence(folder: ReleasePath, sequence: str) -> list[PairFiles]:
    flows, frames = folder / "flow" / sequence, folder / "img" / sequence
    names = list_names(frames) if frames.is_dir() else []
    images = {name.rpartition(".")[0]: name for name in names if name.endswith((".png", ".jpg"))}
    pairs = []
    for match in filter(None, map(FLOW.fullmatch, list_names(flows))):
        first, second = f"{match[1]}_{match[2]}", f"{match[1]}_{int(match[2]) + 1:05}"
        if first in images and second in images:
            pairs.append(
                PairFiles(
                    name=f"{folder.name}/{first}",
                    image1=frames / images[first],
                    image2=frames / images[second],
                    flow=flows / match[0],
                    flow_limit=UNKNOWN,
                    held_out=folder.name == "val",
                )
            )
    return pairs


VIPER = Dataset("VIPER", list_pairs)
