"""Your own frames: folders of images and videos, whose frames become pairs without ground truth."""

import os
import re
from collections.abc import Callable, Iterator
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
        if root.is_dir():
            pairs = [pair for files in find_files(root, self._note) for pair in self._pair_files(files, others)]
        else:
            pairs = self._pair_video(root, root.name)
        if not pairs:
            raise NoRelease(
                f"{root}: contains no pairs of frames; expected folders with more than {self.step} images "
                f"({', '.join(IMAGE_SUFFIXES)}), or videos ({', '.join(video.SUFFIXES)})"
            )
        if others:
            number = counted(len(others), "file")
            self._note(f"{root}: skipped {number} in unknown formats; the first is {others[0]}")
        return pairs

    def _note(self, message: str) -> None:
        if message not in self.noted:
            print_note(message)
            self.noted.add(message)

    def _pair_files(self, files: dict[str, ReleasePath], others: list[ReleasePath]) -> list[PairFiles]:
        """The pairs of one result of `find_files`; `others` is extended by a file that is neither image nor video."""
        names, paths = list(files), list(files.values())
        if is_image(names[0]):
            check_unique(files)
            return [
                PairFiles(os.path.splitext(names[first])[0], paths[first], paths[second], flow=None)
                for first, second in self._choose(len(files))
            ]
        if names[0].lower().endswith(video.SUFFIXES):
            return self._pair_video(paths[0], names[0])
        others.append(paths[0])
        return []

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


def find_files(
    folder: ReleasePath, note: Callable[[str], None], prefix: str = "", above: tuple[str, ...] = ()
) -> Iterator[dict[str, ReleasePath]]:
    """Find the files in a folder and all folders in it, without hidden ones.

    Args:
        folder: where to look.
        note: called with a message about what is skipped.
        prefix: begins the names.
        above: the folders around it, without links.

    Yields:
        Paths by their names relative to the first folder: the images of a folder together and in order, then each of
        its other files alone.

    Raises:
        UserError: an image or video is a broken link.
    """

    def is_file(name: str) -> bool:
        path = folder / name
        if path.is_file():
            return True
        if not path.exists() and name.lower().endswith(IMAGE_SUFFIXES + video.SUFFIXES):
            raise UserError(f"{path}: a broken link; restore the file that it leads to, or remove the link")
        note(f"{path}: skipped: {'not a file' if path.exists() else 'a broken link'}")
        return False

    here = os.path.realpath(folder)
    if here in above:
        note(f"{folder}: skipped: a link to one of its parent folders")
        return
    names, folders = list_names(folder), set(list_folders(folder))
    images = list(filter(is_file, select_images(names, folders)))
    if images:
        yield {prefix + name: folder / name for name in images}
    for name in sorted(names):
        if name.startswith("."):
            continue
        if name in folders:
            yield from find_files(folder / name, note, f"{prefix}{name}/", (*above, here))
        elif not is_image(name) and is_file(name):
            yield {prefix + name: folder / name}


def check_unique(images: dict[str, ReleasePath]) -> None:
    """Raise UserError if two images of a folder differ only in their suffix: they are hardly two frames."""
    found: dict[str, ReleasePath] = {}
    for name, path in images.items():
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise UserError(f"{path}: {found[stem].name} has the same name; remove or rename one of them")
        found[stem] = path


def is_image(name: str) -> bool:
    """Whether the name of a file is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def image_names(folder: ReleasePath) -> list[str]:
    """The names of the images in a folder, in order, numbers by value: 9 before 10."""
    return select_images(list_names(folder), set(list_folders(folder)))


def select_images(names: list[str], folders: set[str]) -> list[str]:
    """`image_names` of a folder that contains these names, some of them of folders."""

    def order(name: str) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"(\d+)", name)
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], name

    visible = [name for name in names if not name.startswith(".") and name not in folders]
    return sorted(filter(is_image, visible), key=order)
