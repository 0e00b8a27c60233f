"""The layout that FlyingThings3D, Monkaa and Driving share: two passes, two cameras, flow forward and backward in time.

frames_cleanpass (or frames_finalpass)/SCENE/left/0006.png and
optical_flow/SCENE/into_future/left/OpticalFlowIntoFuture_0006_L.pfm; likewise with right and into_past. A scene is one
or more folders deep. The frames are also offered as WebP, in frames_cleanpass_webp. Monkaa and Driving have no
validation split; `flyingthings3d.py` adds that of FlyingThings3D.
Source: https://lmb.informatik.uni-freiburg.de/resources/datasets/SceneFlowDatasets.en.html
"""

import re
from functools import partial

from prep.archive import ReleasePath, list_folders, list_names
from prep.datasets import RENDER_PASSES, Dataset, NoRelease, PairFiles, check_folder

DIRECTIONS = {"into_future": ("IntoFuture", 1), "into_past": ("IntoPast", -1)}
"""The word in the files' names, and the step from the first frame's number to the second's, by folder."""


def list_pairs(root: ReleasePath, render_pass: str, *, example: str) -> list[PairFiles]:
    """The pairs of one pass by scene, camera, direction and frame, named PASS/SCENE/left/into_future/0006.

    A flow without a second frame makes no pair. The final pass may be absent. `example` is a scene for errors.
    """
    flows = root / "optical_flow"
    check_folder(flows, f"the flow of the release, {example}/into_future/left/*.pfm")
    frames = root / f"frames_{render_pass}pass"
    suffix = ".png"
    if not frames.is_dir() and (webp := root / f"{frames.name}_webp").is_dir():
        frames, suffix = webp, ".webp"
    if render_pass == "final" and not frames.is_dir():
        return []
    check_folder(frames, f"the {render_pass} pass, {example}/left/0006.png")
    pairs = [
        pair
        for scene in find_scenes(flows)
        for camera in ("left", "right")
        for direction in DIRECTIONS
        for pair in _list_flows(frames, suffix, flows, scene, camera, direction, f"{render_pass}/{scene}")
    ]
    if not pairs:
        raise NoRelease(f"{flows}: contains no pairs; expected {example}/into_future/left/*.pfm")
    return pairs


def find_scenes(folder: ReleasePath) -> list[str]:
    """The paths of the scenes below a folder, in order of their names: the folders that contain flow."""
    scenes = []
    for name in list_folders(folder):
        inner = list_folders(folder / name)
        if set(inner) & set(DIRECTIONS):
            scenes.append(name)
        else:
            scenes += [f"{name}/{scene}" for scene in find_scenes(folder / name)]
    return scenes


def _list_flows(
    frames: ReleasePath, suffix: str, flows: ReleasePath, scene: str, camera: str, direction: str, name: str
) -> list[PairFiles]:
    folder, images = flows / scene / direction / camera, frames / scene / camera
    if not (folder.is_dir() and images.is_dir()):
        return []
    word, step = DIRECTIONS[direction]
    pattern, present = re.compile(rf"OpticalFlow{word}_(\d{{4}})_[LR]\.pfm"), set(list_names(images))
    pairs = []
    for match in filter(None, map(pattern.fullmatch, list_names(folder))):
        second = f"{int(match[1]) + step:04}{suffix}"
        # A scene's last frame has flow too, to a frame that was not rendered.
        if second in present:
            pairs.append(
                PairFiles(
                    name=f"{name}/{camera}/{direction}/{match[1]}",
                    image1=images / f"{match[1]}{suffix}",
                    image2=images / second,
                    flow=folder / match[0],
                )
            )
    return pairs


MONKAA = Dataset("Monkaa", partial(list_pairs, example="a_rain_of_stones_x2"), passes=RENDER_PASSES)
DRIVING = Dataset("Driving", partial(list_pairs, example="35mm_focallength/scene_forwards/fast"), passes=RENDER_PASSES)
