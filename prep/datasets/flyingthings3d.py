"""FlyingThings3D, the full release: both passes, both cameras, flow forward and backward in time, as .pfm.

frames_cleanpass (or frames_finalpass)/TRAIN/A/0000/left/0006.png and
optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm; TEST is held out.

The authors exclude frames that are too hard, listed in all_unused_files.txt: put that file beside the folders.
Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html
"""

import os
import re
from pathlib import Path

from launch.errors import UserError
from launch.logs import print_note
from prep.datasets import PairFiles, check_folder

TITLE = "FlyingThings3D"
PAIRS = None  # depends on the list of excluded frames
VALIDATION = None
PASSES = ("clean", "final")
EXCLUDED_FRAMES = "all_unused_files.txt"
DIRECTIONS = {"into_future": ("IntoFuture", 1), "into_past": ("IntoPast", -1)}
"""By folder: the word in its files' names, and the step from the first frame's number to the second's."""


def list_pairs(root: Path, render_pass: str) -> list[PairFiles]:
    """The pairs of one pass by scene, camera, direction and frame, TRAIN before TEST.

    Named PASS/TRAIN/A/0000/left/into_future/0006. A flow without a second frame makes no pair. The final pass may be
    absent.
    """
    flows = root / "optical_flow"
    check_folder(flows, "the flow of the FlyingThings3D release, TRAIN/A/0000/into_future/left/*.pfm")
    frames = root / f"frames_{render_pass}pass"
    if render_pass == "final" and not frames.is_dir():
        return []
    check_folder(frames, f"the {render_pass} pass, TRAIN/A/0000/left/0006.png")
    excluded = read_excluded_frames(root / EXCLUDED_FRAMES)
    scenes = [str(scene.relative_to(flows)) for scene in flows.glob("T*/*/*")]
    pairs = [
        pair
        for scene in sorted(scenes, key=lambda scene: (scene.startswith("TE"), scene))
        for camera in ("left", "right")
        for direction in DIRECTIONS
        for pair in _list_scene(root, render_pass, scene, camera, direction)
        if not excluded & {str(path.relative_to(frames)) for path in (pair.image1, pair.image2)}
    ]
    if not pairs:
        raise UserError(f"{flows}: contains no pairs; expected TRAIN/A/0000/into_future/left/*.pfm")
    return pairs


def _list_scene(root: Path, render_pass: str, scene: str, camera: str, direction: str) -> list[PairFiles]:
    flows = root / "optical_flow" / scene / direction / camera
    frames = root / f"frames_{render_pass}pass" / scene / camera
    word, step = DIRECTIONS[direction]
    pattern, pairs = re.compile(rf"OpticalFlow{word}_(\d{{4}})_[LR]\.pfm"), []
    for match in map(pattern.fullmatch, sorted(os.listdir(flows)) if flows.is_dir() else []):
        if match:
            second = frames / f"{int(match[1]) + step:04}.png"
            # A scene's last frame has flow too, to a frame that was not rendered.
            if second.exists():
                pairs.append(
                    PairFiles(
                        name=f"{render_pass}/{scene}/{camera}/{direction}/{match[1]}",
                        image1=frames / f"{match[1]}.png",
                        image2=second,
                        flow=flows / match[0],
                        held_out=scene.startswith("TEST"),
                    )
                )
    return pairs


def read_excluded_frames(path: Path) -> set[str]:
    """The frames that the authors exclude, as TRAIN/A/0000/left/0006.png; none if there is no such file."""
    if not path.exists():
        print_note(f"{path}: not found, so no hard frames are excluded")
        return set()
    return {line.strip() for line in path.read_text("utf-8", "replace").splitlines()}
