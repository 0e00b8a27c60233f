"""Spring: 19,852 pairs of an animated film, 1920x1080, by both cameras, forward and backward.

train/SCENE/frame_left/frame_left_0001.png and train/SCENE/flow_FW_left/flow_FW_left_0001.flo5, or
right for left and BW (backward) for FW; of the four flows, those that were downloaded are taken.

The flow has two rows and two columns for each of the frames', in the frames' pixels; the first of
each is taken, as the benchmark's own loader does. Source: https://spring-benchmark.org
"""

import os
import re

from launch.errors import UserError
from prep.datasets import PairFiles, check_present, check_run, find_folder

TITLE = "Spring"
PAIRS = 19852
VALIDATION = None
PARTS = ("",)
# The scenes that the benchmark's makers hold out when they train on the rest.
HELD_OUT = ("0012", "0015", "0017", "0024", "0032", "0039", "0044")
DIRECTIONS = (("FW", 1), ("BW", -1))


def list_pairs(root, part):
    """The pairs by scene, camera, direction and frame, named SCENE/FW_left/NNNN.

    `root` is the release's folder or its train folder.
    """
    train = find_folder(root, "train", "the Spring release (with train/ in it) or its train folder")
    scenes = sorted(e.name for e in os.scandir(train) if e.is_dir() and e.name.isdigit())
    pairs = [
        pair
        for scene in scenes
        for camera in ("left", "right")
        for direction, step in DIRECTIONS
        for pair in _list_scene(train, scene, camera, direction, step)
    ]
    if not pairs:
        raise UserError(f"{train}: no pair in it; expected 0001/frame_left and 0001/flow_FW_left and so on")
    check_present([pair.flow for pair in pairs], "every frame but a scene's last (BW: first) needs its flow")
    return pairs


def _list_scene(train, scene, camera, direction, step):
    frames = os.path.join(train, scene, f"frame_{camera}")
    flows = os.path.join(train, scene, f"flow_{direction}_{camera}")
    if not (os.path.isdir(frames) and os.path.isdir(flows)):
        return []

    def frame(number):
        return os.path.join(frames, f"frame_{camera}_{number:04}.png")

    pattern = re.compile(rf"frame_{camera}_(\d{{4}})\.png")
    numbers = sorted(int(m[1]) for m in map(pattern.fullmatch, os.listdir(frames)) if m)
    check_run(numbers, frame)
    return [
        PairFiles(
            name=f"{scene}/{direction}_{camera}/{number:04}",
            image1=frame(number),
            image2=frame(number + step),
            flow=os.path.join(flows, f"flow_{direction}_{camera}_{number:04}.flo5"),
            flow_step=2,
            held_out=scene in HELD_OUT,
        )
        for number in numbers
        if number + step in numbers
    ]
