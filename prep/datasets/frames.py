"""Your own frames: folders of images and videos, whose frames become pairs without ground truth."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from launch.errors import UserError, counted
from launch.logs import print_note
from prep.archive import ReleasePath, list_folders, list_names
from prep.datasets import NoRelease, PairFiles
from prep.formats import video

IMAGE_SUFFIXES = (".png", ".ppm", ".pgm", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class FrameSequences:
    """How the frames of each folder and video are paired."""

    step: int = 1
    """The second frame of a pair is this many frames after the first."""
    stride: int = 1
    """The first frame of a pair is this many frames after that of the pair before."""
    noted: set[str] = field(default_factory=set, compare=False)
    """What was already said: folders with archives are listed twice."""

    def list_pairs(self, root: ReleasePath, render_pass: str) -> list[PairFiles]:
        """The pairs of a video, or of the folder `root` and all folders and videos in it, by path, then by frame.

        Raises:
            NoRelease: there are no frames.
            UserError: two frames of a folder have the same name, or a video is damaged.
        """
        if not root.exists():
            raise UserError(f"{root}: does not exist; expected a folder of frames or a video")
        others: list[ReleasePath] = []
        pairs = self._pair_folder(root, "", (), others) if root.is_dir() else self._pair_video(root, root.name)
        if not pairs:
            raise NoRelease(
                f"{root}: contains no pairs of frames; expected folders with more than {self.step} images "
                f"({', '.join(IMAGE_SUFFIXES)}), or videos ({', '.join(video.SUFFIXES)})"
            )
        if others:
            number = counted(len(others), "file")
            self._note(f"{root}: {number} of no known image or video format left out, the first {others[0]}")
        return pairs

    def _note(self, message: str) -> None:
        if message not in self.noted:
            print_note(message)
            self.noted.add(message)

    def _pair_folder(
        self, folder: ReleasePath, prefix: str, above: tuple[str, ...], others: list[ReleasePath]
    ) -> list[PairFiles]:
        """The pairs of a folder's images, then those of its videos and folders by name.

        Args:
            folder: need not contain any.
            prefix: begins the names of the pairs.
            above: the folders around it, without links.
            others: is extended by the files that are neither images nor videos.
        """
        here = os.path.realpath(folder)
        if here in above:
            self._note(f"{folder}: a link to a folder around it; left out")
            return []
        names, folders = list_names(folder), set(list_folders(folder))
        images = select_images(names, folders)
        check_unique(folder, images)
        for path in (folder / name for name in images):
            if not path.exists():
                raise UserError(f"{path}: a broken link; restore the file that it leads to, or remove the link")
        pairs = [
            PairFiles(
                prefix + os.path.splitext(images[first])[0], folder / images[first], folder / images[second], flow=None
            )
            for first, second in self._choose(len(images))
        ]
        for name in sorted({*names} - {*images}):
            path = folder / name
            if name.startswith("."):
                continue
            if name in folders:
                pairs += self._pair_folder(path, f"{prefix}{name}/", (*above, here), others)
            elif name.lower().endswith(video.SUFFIXES):
                pairs += self._pair_video(path, f"{prefix}{name}")
            elif not path.exists():
                self._note(f"{path}: a broken link; left out")
            else:
                others.append(path)
        return pairs

    def _pair_video(self, path: ReleasePath, name: str) -> list[PairFiles]:
        if not isinstance(path, Path):
            raise UserError(f"{path}: a video cannot be read in an archive; unpack it")
        found = video.scan_video(path)
        return [
            PairFiles(f"{name}/{first:06}", path, path, flow=None, frames=video.VideoFrames(first, second, found.size))
            for first, second in self._choose(found.frames)
        ]

    def _choose(self, frames: int) -> list[tuple[int, int]]:
        """The numbers of both frames of each pair, of a sequence of `frames`."""
        return [(first, first + self.step) for first in range(0, frames - self.step, self.stride)]


def check_unique(folder: ReleasePath, names: list[str]) -> None:
    """Raise UserError if two images of a folder differ only in their suffix: they are hardly two frames."""
    found: dict[str, str] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise UserError(f"{folder / name}: {found[stem]} has the same name; remove or rename one of them")
        found[stem] = name


def image_names(folder: ReleasePath) -> list[str]:
    """The names of the images in a folder, in order, numbers by value: 9 before 10."""
    return select_images(list_names(folder), set(list_folders(folder)))


def select_images(names: list[str], folders: set[str]) -> list[str]:
    """`image_names` of a folder that contains these names, some of them of folders."""

    def order(name: str) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"(\d+)", name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name

    visible = [name for name in names if not name.startswith(".") and name not in folders]
    return sorted((name for name in visible if name.lower().endswith(IMAGE_SUFFIXES)), key=order)
