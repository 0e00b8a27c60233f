"""MPI-Sintel: 1,041 training pairs in 23 scenes, rendered twice, as clean pass and final pass.

training/{clean,final}/SCENE/frame_0001.png, training/flow/SCENE/frame_0001.flo and, optionally,
training/{invalid,occlusions}/SCENE/frame_0001.png. Source: http://sintel.is.tue.mpg.de
"""

import itertools
import re

from launch.errors import UserError
from prep.archive import ReleasePath, list_folders, list_names
from prep.datasets import (
    RENDER_PASSES,
    Dataset,
    NoRelease,
    PairFiles,
    check_consecutive,
    check_folder,
    check_present,
    find_folder,
    missing_files,
)

FRAME = re.compile(r"frame_(\d{4})\.png")
SCENES = {
    "alley_1": 49, "alley_2": 49, "ambush_2": 20, "ambush_4": 32, "ambush_5": 49, "ambush_6": 19, "ambush_7": 49,
    "bamboo_1": 49, "bamboo_2": 49, "bandage_1": 49, "bandage_2": 49, "cave_2": 49, "cave_4": 49, "market_2": 49,
    "market_5": 49, "market_6": 39, "mountain_1": 49, "shaman_2": 49, "shaman_3": 49, "sleeping_1": 49,
    "sleeping_2": 49, "temple_2": 49, "temple_3": 49,
}  # fmt: skip
"""The scenes in name order, with their numbers of pairs."""
FIRST_PLACES = dict(zip(SCENES, itertools.accumulate(SCENES.values(), initial=0), strict=False))
"""The index of each scene's first pair in the complete release."""


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs of one pass, scenes in name order, then frames in order, named PASS/SCENE/frame_NNNN.

    `root` is the release's folder or its training folder.
    """
    training = find_folder(root, "training", "the MPI-Sintel release (containing training/) or its training folder")
    images = training / render_pass
    check_folder(images, f"the {render_pass} pass, SCENE/frame_NNNN.png")
    check_folder(training / "flow", "the flow, SCENE/frame_NNNN.flo")
    scenes = list_folders(images)
    pairs = [pair for scene in scenes for pair in _list_scene(training, render_pass, scene)]
    if not pairs:
        raise NoRelease(f"{images}: contains no pairs; expected files such as SCENE/frame_0001.png")
    check_present([pair.flow for pair in pairs], "every frame except the last of its scene needs a flow file")
    return pairs


def _list_scene(training: ReleasePath, render_pass: str, scene: str) -> list[PairFiles]:
    folder, flows = training / render_pass / scene, training / "flow" / scene
    numbers = sorted(int(match[1]) for match in map(FRAME.fullmatch, list_names(folder)) if match)
    if len(numbers) < 2:
        raise UserError(f"{folder}: contains {len(numbers)} frames, expected at least 2, such as frame_0001.png")
    check_consecutive(numbers, lambda number: folder / f"frame_{number:04}.png")
    if flows.is_dir() and len(list_names(flows)) >= len(numbers):
        # Missing frames at the end of a scene leave no gap, only too many flow files.
        last = folder / f"frame_{numbers[-1] + 1:04}.png"
        raise missing_files([last], "the scene has as many flow files as frames, expected one fewer")

    def find_mask(kind: str, frame: str) -> ReleasePath | None:
        path = training / kind / scene / f"{frame}.png"
        return path if path.exists() else None

    pairs = []
    for number in numbers[:-1]:
        frame = f"frame_{number:04}"
        pairs.append(
            PairFiles(
                name=f"{render_pass}/{scene}/{frame}",
                image1=folder / f"{frame}.png",
                image2=folder / f"frame_{number + 1:04}.png",
                flow=flows / f"{frame}.flo",
                invalid=find_mask("invalid", frame),
                occluded=find_mask("occlusions", frame),
                place=FIRST_PLACES[scene] + number - 1 if number <= SCENES.get(scene, 0) else None,
            )
        )
    return pairs


SINTEL = Dataset("MPI-Sintel", list_pairs, pairs=1041, validation="sintel_val.txt", passes=RENDER_PASSES)
