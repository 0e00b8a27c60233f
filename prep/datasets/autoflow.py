"""AutoFlow: 40,000 pairs whose rendering was tuned to a target dataset.

static_40k_png_1_of_4/NAME/im0.png, im1.png, forward.flo; likewise 2 to 4. The 2,000 names in
prep/splits/autoflow_val.txt are held out. Source: https://autoflow-google.github.io
"""

import re

from prep.archive import ReleasePath, list_folders
from prep.datasets import Dataset, NoRelease, PairFiles, check_complete, check_folder, splits

SPLIT = "autoflow_val.txt"
PART = re.compile(r"static_40k_png_\d_of_4")


def list_pairs(root: ReleasePath, render_pass: str) -> list[PairFiles]:
    """The pairs by part and name, named as their folders."""
    check_folder(root, "the AutoFlow release, static_40k_png_1_of_4/NAME/forward.flo")
    validation = set((splits.FOLDER / SPLIT).read_text("utf-8").splitlines())
    parts = [root / name for name in list_folders(root) if PART.fullmatch(name)]
    # Each part may be unpacked into a folder of its own name.
    parts = [inner if (inner := part / part.name).is_dir() else part for part in parts]
    pairs = [
        PairFiles(
            name=name,
            image1=part / name / "im0.png",
            image2=part / name / "im1.png",
            flow=part / name / "forward.flo",
            held_out=name in validation,
        )
        for part in parts
        for name in list_folders(part)
    ]
    if not pairs:
        raise NoRelease(f"{root}: contains no pairs; expected files such as static_40k_png_1_of_4/NAME/forward.flo")
    check_complete(pairs)
    return pairs


AUTOFLOW = Dataset("AutoFlow", list_pairs, pairs=40000)
