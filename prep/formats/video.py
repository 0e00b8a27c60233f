"""Videos: count and read the frames of any video that OpenCV's FFmpeg decodes."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from launch import progress, ranks
from launch.errors import UserError
from prep.formats import StrPath

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
"""Suffixes of the videos that are looked for in folders."""


@dataclass(frozen=True)
class VideoFrames:
    """Two frames of a video."""

    first: int
    """Number of the frame, from 0."""
    second: int
    """The same; later than the first."""
    size: tuple[int, int]
    """(H, W) of the video."""

    def read(self, video: StrPath) -> tuple[np.ndarray, np.ndarray]:
        """Decode both: uint8 (H, W, 3) RGB. Fast if the frames of one pair after another are read in order.

        Raises:
            UserError: the video ends before them, or cannot be decoded.
        """
        decoder = _open_decoder(video, self.second - self.first)
        return decoder.frame(self.first), decoder.frame(self.second)


@dataclass(frozen=True)
class VideoProperties:
    """What a decoded video consists of."""

    frames: int
    size: tuple[int, int]
    """(H, W)."""


class Decoder:
    """Decodes frames in order and keeps the last `window` before the latest.

    It never seeks: FFmpeg may land on a different frame from the one asked for, depending on the container.
    """

    def __init__(self, path: StrPath, window: int) -> None:
        self.path, self.window = path, window
        self.video, self.next = open_video(path), 0
        self.kept: dict[int, np.ndarray] = {}

    def frame(self, number: int) -> np.ndarray:
        """Frame `number`, from 0: uint8 (H, W, 3) RGB."""
        if number < self.next and number not in self.kept:
            self.video, self.next, self.kept = open_video(self.path), 0, {}
        while self.next <= number:
            # `open_video` has already grabbed frame 0.
            if self.next and not self.video.grab():
                raise UserError(f"{self.path}: ends before frame {number}; has the video changed? Convert it again")
            if self.next >= number - self.window:
                _, frame = self.video.retrieve()
                self.kept[self.next] = np.ascontiguousarray(frame[..., ::-1])
            self.next += 1
        for old in [kept for kept in self.kept if kept < number - self.window]:
            del self.kept[old]
        return self.kept[number]


@functools.lru_cache(maxsize=1)
def _open_decoder(path: StrPath, window: int) -> Decoder:
    return Decoder(path, window)


def open_video(path: StrPath) -> cv2.VideoCapture:
    """Open a video and grab its first frame, ready for `retrieve`; UserError if OpenCV cannot decode it."""
    # Their messages about a broken file are for programmers; the error below is for users.
    cv2.setLogLevel(0)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # OpenCV crashes
        raise UserError(f"{os.fspath(path)!a}: the path is not UTF-8; rename it") from None
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not video.grab():
        raise UserError(
            f"{path}: is not a video that OpenCV can decode, or it is truncated; expected an image, a folder of "
            "frames, or a complete video such as .mp4 or .avi"
        )
    return video


def scan_video(path: Path) -> VideoProperties:
    """Decode a whole video to count its frames, which its header may only estimate.

    Raises:
        UserError: OpenCV cannot decode it, or it is truncated.
    """
    video = open_video(path)
    _, frame = video.retrieve()
    height, width = frame.shape[:2]
    announced, rate = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))), video.get(cv2.CAP_PROP_FPS)
    frames, last = 1, 0.0
    hidden = announced < 2000 or ranks.current().rank != 0
    with progress.bar(total=announced, desc=f"counting frames of {path.name}", disable=hidden, leave=False) as bar:
        while video.grab():
            frames, last = frames + 1, video.get(cv2.CAP_PROP_POS_MSEC) / 1000
            bar.update()
    # Where the header has a duration instead of a number of frames, OpenCV computes one, which may be too large for
    # a variable frame rate. So the last frame's time must be missing, too.
    if rate > 0 and frames < announced:
        missing = (announced - 1) / rate - last
        if missing > max(1.5 / rate, 0.01 * announced / rate):
            raise UserError(
                f"{path}: truncated or damaged: {frames} frames can be decoded, its header says {announced}; copy it "
                "again, or save the intact part as a new video"
            )
    return VideoProperties(frames, (height, width))
