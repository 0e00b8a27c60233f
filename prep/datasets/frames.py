"""Your own frames: folders of images and videos, whose frames become pairs without ground truth."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from launch.errors import UserError
from prep.datasets import PairFiles
from prep.formats import video

IMAGE_SUFFIXES = (".png", ".ppm", ".pgm", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class FrameSequences:
    """Pairs of the frames of each folder and video, as a dataset module (`prep.datasets.DatasetModule`)."""

    step: int = 1
    """The second frame of a pair is this many frames after the first."""
    stride: int = 1
    """The first frame of a pair is this many frames after that of the pair before."""

    TITLE = "Frames"
    PAIRS = None
    VALIDATION = None
    PASSES = ("",)

    def list_pairs(self, root: Path, render_pass: str) -> list[PairFiles]:
        """The pairs of a video, or of the folder `root` and all folders and videos in it, by path, then by frame.

        Raises:
            UserError: there are no frames, or a video is damaged.
        """
        if not root.exists():
            raise UserError(f"{root}: does not exist; expected a folder of frames or a video")
        pairs = []
        if root.is_file():
            pairs = self._pair_video(root, root.parent)
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            pairs += self._pair_images(list_images(Path(folder)), root)
            for name in sorted(files):
                if name.lower().endswith(video.SUFFIXES) and not name.startswith("."):
                    pairs += self._pair_video(Path(folder, name), root)
        if not pairs:
            raise UserError(
                f"{root}: contains no pairs of frames; expected folders with more than {self.step} images "
                f"({', '.join(IMAGE_SUFFIXES)}), or videos ({', '.join(video.SUFFIXES)})"
            )
        return pairs

    def _pair_images(self, images: list[Path], root: Path) -> list[PairFiles]:
        names = [str(path.relative_to(root).with_suffix("")) for path in images]
        return [
            PairFiles(names[first], images[first], images[second], flow=None)
            for first, second in self._choose(len(images))
        ]

    def _pair_video(self, path: Path, root: Path) -> list[PairFiles]:
        found = video.scan_video(path)
        name = path.relative_to(root)
        return [
            PairFiles(f"{name}/{first:06}", path, path, flow=None, frames=video.VideoFrames(first, second, found.size))
            for first, second in self._choose(found.frames)
        ]

    def _choose(self, frames: int) -> list[tuple[int, int]]:
        """The numbers of both frames of each pair, of a sequence of `frames`."""
        return [(first, first + self.step) for first in range(0, frames - self.step, self.stride)]


def list_images(folder: Path) -> list[Path]:
    """The images in a folder by name, numbers in names by value: 9 before 10."""

    def order(path: Path) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name

    return sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")),
        key=order,
    )
