"""MPI-Sintel: 1,041 training pairs in 23 scenes, rendered twice, as the clean and the final pass.

training/{clean,final}/SCENE/frame_0001.png, training/flow/SCENE/frame_0001.flo, and, where they
were downloaded too, training/{invalid,occlusions}/SCENE/frame_0001.png. Source:
http://sintel.is.tue.mpg.de
"""

import os
import re

from launch.errors import UserError
from prep.datasets import PairFiles, check_folder, check_present, check_run, find_folder, missing_files

TITLE = "MPI-Sintel"
PAIRS = 1041
VALIDATION = "sintel_val.txt"
PARTS = ("clean", "final")
FRAME = re.compile(r"frame_(\d{4})\.png")


def list_pairs(root, part):
    """The pairs of one pass, scenes in name order, then frames in order, named
    PASS/SCENE/frame_NNNN.

    `root` is the release's folder or its training folder.
    """
    training = find_folder(root, "training", "the MPI-Sintel release (with training/ in it) or its training folder")
    images = os.path.join(training, part)
    check_folder(images, f"the {part} pass, SCENE/frame_NNNN.png")
    check_folder(os.path.join(training, "flow"), "the flow, SCENE/frame_NNNN.flo")
    scenes = sorted(e.name for e in os.scandir(images) if e.is_dir())
    pairs = [p for scene in scenes for p in _list_scene(training, part, scene)]
    if not pairs:
        raise UserError(f"{images}: no pair in it; expected SCENE/frame_0001.png and so on")
    check_present([p.flow for p in pairs], "every frame but a scene's last needs its flow")
    return pairs


def _list_scene(training, part, scene):
    folder = os.path.join(training, part, scene)
    numbers = sorted(int(m[1]) for m in map(FRAME.fullmatch, os.listdir(folder)) if m)
    if len(numbers) < 2:
        raise UserError(f"{folder}: {len(numbers)} frames, expected at least 2 as frame_0001.png")
    check_run(numbers, lambda number: os.path.join(folder, f"frame_{number:04}.png"))
    flows = os.path.join(training, "flow", scene)
    if len(os.listdir(flows) if os.path.isdir(flows) else []) >= len(numbers):
        # Only frames at a scene's end can be missing here, and the flow tells that they are.
        last = os.path.join(folder, f"frame_{numbers[-1] + 1:04}.png")
        raise missing_files([last], "the scene has as many flow files as frames, expected one fewer")

    def mask(kind, frame):
        path = os.path.join(training, kind, scene, frame + ".png")
        return path if os.path.exists(path) else None

    pairs = []
    for number in numbers[:-1]:
        frame = f"frame_{number:04}"
        pairs.append(
            PairFiles(
                name=f"{part}/{scene}/{frame}",
                image1=os.path.join(folder, frame + ".png"),
                image2=os.path.join(folder, f"frame_{number + 1:04}.png"),
                flow=os.path.join(flows, frame + ".flo"),
                invalid=mask("invalid", frame),
                occluded=mask("occlusions", frame),
            )
        )
    return pairs
