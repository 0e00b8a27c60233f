"""Middlebury: the eight pairs with published flow, for evaluation; all are held out.

other-data/SCENE/frame10.png, frame11.png and other-gt-flow/SCENE/flow10.flo. Source: https://vision.middlebury.edu/flow
"""

from prep.archive import ReleasePath, list_folders
from prep.datasets import Dataset, NoRelease, PairFiles, check_complete, check_folder


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs by scene, named as the scenes."""
    frames, flows = root / "other-data", root / "other-gt-flow"
    check_folder(flows, "the flow, SCENE/flow10.flo")
    check_folder(frames, "the frames, SCENE/frame10.png and frame11.png")
    pairs = [
        PairFiles(
            name=scene,
            image1=frames / scene / "frame10.png",
            image2=frames / scene / "frame11.png",
            flow=flows / scene / "flow10.flo",
            held_out=True,
        )
        for scene in list_folders(flows)
    ]
    if not pairs:
        raise NoRelease(f"{flows}: contains no pairs; expected files such as RubberWhale/flow10.flo")
    check_complete(pairs)
    return pairs


MIDDLEBURY = Dataset("Middlebury", list_pairs, pairs=8)
