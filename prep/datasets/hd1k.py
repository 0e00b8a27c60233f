"""HD1K: drives along one street, 2560x1080, with measured flow where the authors trust it.

hd1k_flow_gt/flow_occ/SSSSSS_FFFF.png (sequence, frame; KITTI's format) and hd1k_input/image_2/SSSSSS_FFFF.png.
Every tenth sequence is held out, as a whole: frames of one sequence are too similar to be split.
Source: http://hci-benchmark.iwr.uni-heidelberg.de
"""

import itertools
import re

from prep.archive import ReleasePath, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_folder, check_present

FRAME = re.compile(r"(\d{6})_\d+\.png")


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """Each frame of a sequence paired with the next one, in order, named SSSSSS_FFFF."""
    flows, frames = root / "hd1k_flow_gt" / "flow_occ", root / "hd1k_input" / "image_2"
    check_folder(flows, "the flow of the HD1K release, SSSSSS_FFFF.png")
    check_folder(frames, "the frames of the HD1K release, SSSSSS_FFFF.png")
    files = sorted(f for f in {*list_names(flows), *list_names(frames)} if FRAME.fullmatch(f))
    check_present(
        [folder / file for file in files for folder in (frames, flows)],
        "every frame needs a flow file and every flow file its frame; restore the missing file",
    )
    pairs = [
        PairFiles(
            name=file.removesuffix(".png"),
            image1=frames / file,
            image2=frames / following,
            flow=flows / file,
            held_out=int(file[:6]) % 10 == 9,
        )
        for file, following in itertools.pairwise(files)
        if file[:6] == following[:6]
    ]
    if not pairs:
        raise NoRelease(f"{frames}: contains no pairs; expected files such as 000000_0010.png")
    return pairs


HD1K = Dataset("HD1K", list_pairs)
