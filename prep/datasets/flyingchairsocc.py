"""FlyingChairsOcc: FlyingChairs rendered anew, with flow in both directions and occlusions.

data/00001_img1.png (or .ppm), _img2.png, _flow.flo, _occ1.png (occlusions) and backward, optionally, _flow_b.flo and
_occ2.png. FlyingChairs' validation pairs are held out, as in the code of its authors (Hur and Roth, CVPR 2019).
Source: https://github.com/visinf/irr
"""

import re

from prep.archive import ReleasePath, list_names
from prep.datasets import Dataset, NoRelease, PairFiles, check_present, find_folder, splits

SPLIT = "flyingchairs_val.txt"
FLOW = re.compile(r"(\d{5})_flow(_b)?\.flo")


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs by number and direction, named NNNNN/forward. `root` is the release's folder or its data folder."""
    folder = find_folder(root, "data", "the FlyingChairsOcc release (containing data/) or its data folder")
    validation = set(splits.read_split_file(splits.FOLDER / SPLIT).indices)
    names = list_names(folder)
    present, pairs = set(names), []
    for match in filter(None, map(FLOW.fullmatch, names)):
        number, backward = match[1], bool(match[2])
        images = [
            folder / (ppm if (ppm := f"{number}_img{i}.ppm") in present else f"{number}_img{i}.png") for i in (1, 2)
        ]
        mask = f"{number}_occ{2 if backward else 1}.png"
        pairs.append(
            PairFiles(
                name=f"{number}/{'backward' if backward else 'forward'}",
                image1=images[backward],
                image2=images[not backward],
                flow=folder / match[0],
                occluded=folder / mask if mask in present else None,
                held_out=int(number) - 1 in validation,
            )
        )
    if not pairs:
        raise NoRelease(f"{folder}: contains no pairs; expected files such as 00001_flow.flo")
    check_present(
        [path for pair in pairs for path in (pair.image1, pair.image2) if path.name not in present],
        "every flow file needs two images; restore the missing file",
    )
    return pairs


# Without `pairs`: one direction of the flow is optional.
FLYINGCHAIRSOCC = Dataset("FlyingChairsOcc", list_pairs)
