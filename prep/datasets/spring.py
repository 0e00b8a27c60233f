"""Spring: 19,852 pairs of an animated film, 1920x1080, from both cameras, forward and backward.

train/SCENE/frame_left/frame_left_0001.png and train/SCENE/flow_FW_left/flow_FW_left_0001.flo5; likewise with right
and BW (backward). Any of the four kinds of flow may be absent.

The flow has twice the frames' resolution, in units of the frames' pixels; the top left of each 2x2 block is taken, as
in the benchmark's own loader. Source: https://spring-benchmark.org
"""

import re

from prep.archive import ReleasePath, list_folders, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_consecutive, check_present, find_folder

# The scenes that the benchmark's authors hold out when they train on the rest.
HELD_OUT = ("0012", "0015", "0017", "0024", "0032", "0039", "0044")
DIRECTIONS = {"FW": 1, "BW": -1}
"""Step from the first frame's number to the second's."""


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs by scene, camera, direction and frame, named SCENE/FW_left/NNNN.

    `root` is the release's folder or its train folder.
    """
    train = find_folder(root, "train", "the Spring release (containing train/) or its train folder")
    pairs = [
        pair
        for scene in filter(str.isdigit, list_folders(train))
        for camera in ("left", "right")
        for direction in DIRECTIONS
        for pair in _list_scene(train / scene, camera, direction)
    ]
    if not pairs:
        raise NoRelease(f"{train}: contains no pairs; expected folders such as 0001/frame_left and 0001/flow_FW_left")
    check_present([pair.flow for pair in pairs], "every frame except a scene's last (BW: first) needs a flow file")
    return pairs


def _list_scene(scene: ReleasePath, camera: str, direction: str) -> list[PairFiles]:
    frames, flows = scene / f"frame_{camera}", scene / f"flow_{direction}_{camera}"
    if not (frames.is_dir() and flows.is_dir()):
        return []

    def frame(number: int) -> ReleasePath:
        return frames / f"frame_{camera}_{number:04}.png"

    pattern, step = re.compile(rf"frame_{camera}_(\d{{4}})\.png"), DIRECTIONS[direction]
    numbers = sorted(int(match[1]) for match in map(pattern.fullmatch, list_names(frames)) if match)
    check_consecutive(numbers, frame)
    return [
        PairFiles(
            name=f"{scene.name}/{direction}_{camera}/{number:04}",
            image1=frame(number),
            image2=frame(number + step),
            flow=flows / f"flow_{direction}_{camera}_{number:04}.flo5",
            flow_step=2,
            held_out=scene.name in HELD_OUT,
        )
        for number in numbers
        if number + step in numbers
    ]


SPRING = Dataset("Spring", list_pairs, pairs=19852)
