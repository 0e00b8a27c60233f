"""Kubric: rendered scenes such as MOVi-F, written as PNG, with flow forward and backward in time.

SCENE/rgba_00000.png, forward_flow_00000.png, backward_flow_00001.png and data_ranges.json. In early renderings x and y
of the flow are swapped. Source: https://github.com/google-research/kubric

backward_flow is the motion since the previous frame and has the same sign as forward_flow (Kubric's issue 152 and its
test/test_postprocessing.py); the flow to the previous frame is its negative.
"""

import json
import re
from functools import partial

from launch.errors import UserError, one_line
from prep.archive import ReleasePath, list_folders, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_complete, check_folder, check_present
from prep.formats.flow import KubricScale

FLOW = re.compile(r"(forward|backward)_flow_(\d{5})\.png")
DIRECTIONS = {"forward": 1, "backward": -1}
"""Step from the first frame's number to the second's, and sign of the flow."""
RANGES = "data_ranges.json"


def list_pairs(root: ReleasePath, render_pass: str, *, swapped: bool) -> list[PairFiles]:
    """The pairs by scene, direction and frame, named SCENE/forward/NNNNN. A flow without a second frame makes no pair.

    Args:
        swapped: whether x and y of the flow are swapped.
    """
    check_folder(root, "scenes rendered by Kubric, SCENE/rgba_00000.png and SCENE/forward_flow_00000.png")
    pairs = [pair for scene in list_folders(root) for pair in _list_scene(root / scene, swapped)]
    if not pairs:
        raise NoRelease(f"{root}: contains no pairs; expected files such as SCENE/forward_flow_00000.png")
    check_complete(pairs)
    return pairs


def _list_scene(folder: ReleasePath, swapped: bool) -> list[PairFiles]:
    names = list_names(folder)
    matches = sorted(filter(None, map(FLOW.fullmatch, names)), key=lambda match: (match[1] == "backward", match[2]))
    if not matches:
        return []
    present, scales = set(names), _read_scales(folder / RANGES, {match[1] for match in matches}, swapped)
    pairs = []
    for match in matches:
        direction, second = match[1], f"rgba_{int(match[2]) + DIRECTIONS[match[1]]:05}.png"
        if second in present:
            pairs.append(
                PairFiles(
                    name=f"{folder.name}/{direction}/{match[2]}",
                    image1=folder / f"rgba_{match[2]}.png",
                    image2=folder / second,
                    flow=folder / match[0],
                    flow_scale=scales[direction],
                )
            )
    return pairs


def _read_scales(path: ReleasePath, directions: set[str], swapped: bool) -> dict[str, KubricScale]:
    """The scale of each direction's flow; UserError if the file does not contain them."""
    check_present([path], "it has the scale of the flow; restore the missing file")
    try:
        ranges = json.loads(path.read_bytes())
        extremes = {d: (float(ranges[f"{d}_flow"]["min"]), float(ranges[f"{d}_flow"]["max"])) for d in directions}
        if not all(-1e9 < smallest <= largest < 1e9 for smallest, largest in extremes.values()):
            raise ValueError("the smallest flow is not below the largest")
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{path}: expected the numbers min and max of forward_flow and backward_flow ({type(error).__name__}: "
            f"{one_line(error)}); copy the file again"
        ) from None
    return {
        direction: KubricScale(DIRECTIONS[direction] * smallest, DIRECTIONS[direction] * largest, swapped)
        for direction, (smallest, largest) in extremes.items()
    }


KUBRIC = Dataset("Kubric", partial(list_pairs, swapped=False))
KUBRIC_SWAPPED = Dataset("Kubric (x and y of the flow swapped)", partial(list_pairs, swapped=True))
