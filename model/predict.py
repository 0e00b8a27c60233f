#!/usr/bin/env python3
"""Predict the flow of two images, of a folder's consecutive frames, or of a video.

python model/predict.py IMAGE1 IMAGE2 --ckpt FILE --out DIR [--overlay] [--warp]
python model/predict.py FOLDER        --ckpt FILE --out DIR [--batch N]
python model/predict.py VIDEO         --ckpt FILE --out DIR [--batch N]

For each pair, NAME.flo holds the flow in pixels at the size of the images, and NAME_flow.png shows it in colours. NAME
is the first image's, or the video's and the frame number, from 0.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import math
import pathlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from launch import session
from launch.arguments import Parser
from launch.errors import UserError, counted, run
from launch.logs import print_note
from model.backend import add_backend_option
from model.precision import add_precision_option
from prep.datasets.frames import IMAGE_SUFFIXES, image_names
from prep.prefetch import prefetch

if TYPE_CHECKING:
    from model.inference import FlowPredictor

WRITERS = 2  # threads
MIN_MAX_FLOW = 0.001  # pixels
WARP_LIMIT = 32766
"""Pixels in a side that OpenCV can still warp."""


class Frame(NamedTuple):
    """One frame, uint8 (H, W, 3) RGB."""

    name: str
    image: np.ndarray


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames of an input."""

    count: int
    """Number of frames that the input says it has; 0 if unknown."""
    size: tuple[int, int]
    """(H, W) in pixels."""
    frames: Iterator[Frame]


@dataclasses.dataclass
class FramePair:
    """Two frames, uint8 (H, W, 3) RGB, the name of their outputs, and a hash of everything these depend on."""

    name: str
    image1: np.ndarray
    image2: np.ndarray
    key: str = ""


# --- Input ----------------------------------------------------------------------------------------


def open_frames(inputs: Sequence[pathlib.Path]) -> Frames:
    """The frames that the command line names.

    Args:
        inputs: two images, or one folder or video.

    Raises:
        UserError: there are no such frames; see `open_images` and `open_video`.
    """
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    first = inputs[0]
    if len(inputs) == 2:
        for path in inputs:
            if path.is_dir():
                raise UserError(f"{path}: is a folder; expected two images, or one folder alone")
        return open_images(inputs)
    if first.is_dir():
        paths = [first / name for name in image_names(first)]
        if len(paths) < 2:
            raise UserError(
                f"{first}: has {counted(len(paths), 'frame')} ({', '.join(IMAGE_SUFFIXES)}), expected at least two"
            )
        return open_images(paths)
    if first.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{first}: is one image; expected a second image, a folder of frames, or a video")
    return open_video(first)


def open_images(paths: Sequence[pathlib.Path]) -> Frames:
    """The frames in image files, read when needed.

    Raises:
        UserError: their headers show different sizes, or two outputs would have one name.
    """
    from prep.formats.image import image_size, read_image

    height, width = image_size(paths[0])
    names: dict[str, pathlib.Path] = {}
    for path in paths:
        if image_size(path) != (height, width):
            found = "x".join(map(str, image_size(path)))
            raise UserError(
                f"{path}: has {found} pixels (height x width), expected {height}x{width} as {paths[0]} has; crop or "
                "resize one of them, or put the frames of each size into their own folder"
            )
        if len(paths) > 2 and path.stem in names:
            raise UserError(f"{path}: its flow would have the same name as that of {names[path.stem]}; rename one")
        names[path.stem] = path
    return Frames(len(paths), (height, width), (Frame(path.stem, read_image(path)) for path in paths))


def open_video(path: pathlib.Path) -> Frames:
    """The frames of a video, decoded when needed; raises UserError if OpenCV cannot decode it."""
    import cv2

    from prep.formats import video as video_format

    video = video_format.open_video(path)

    def frames() -> Iterator[Frame]:
        number, grabbed = 0, True
        while grabbed:
            _, frame = video.retrieve()
            yield Frame(f"{path.stem}_{number:06}", cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            grabbed = video.grab()
            number += 1
        video.release()

    size = int(video.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(video.get(cv2.CAP_PROP_FRAME_WIDTH))
    return Frames(max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))), size, frames())


def make_pairs(frames: Iterable[Frame], salt: bytes) -> Iterator[FramePair]:
    """Consecutive frames as pairs; `salt` is everything else that their outputs depend on."""
    previous = None
    for frame in frames:
        if previous:
            (height, width, _), (expected_height, expected_width, _) = frame.image.shape, previous.image.shape
            if (height, width) != (expected_height, expected_width):
                raise UserError(
                    f"{frame.name}: has {height}x{width} pixels (height x width), expected {expected_height}x"
                    f"{expected_width}, the size of the previous frame; use a video with a constant frame size"
                )
            key = hashlib.blake2b(salt, digest_size=16)
            key.update(np.ascontiguousarray(previous.image).data)
            key.update(np.ascontiguousarray(frame.image).data)
            yield FramePair(previous.name, previous.image, frame.image, key.hexdigest())
        previous = frame


# --- Output ---------------------------------------------------------------------------------------


class Outputs:
    """The files of each pair in a folder: the flow, and pictures of it.

    Each appears when it is complete. The pictures carry the pair's key, by which an interrupted run tells existing
    outputs from those of other images, weights, operators or number formats, of another scale, and from others' files.

    Args:
        folder: where to write; it exists.
        overlay, warp: whether to draw these pictures too.
        max_flow: pixels at full saturation; None for each picture's own scale.
    """

    def __init__(
        self, folder: pathlib.Path, *, overlay: bool = False, warp: bool = False, max_flow: float | None = None
    ) -> None:
        self.folder = folder
        self.pictures = ["flow"] + ["overlay"] * overlay + ["warp"] * warp
        self.max_flow = max_flow

    def exist(self, pair: FramePair) -> bool:
        """Whether all outputs of a pair exist.

        Raises:
            UserError: a file has the name of an output, but was not written by this command.
        """
        from prep.flow_viz import png_note

        paths = [self.picture_path(pair, kind) for kind in self.pictures]
        notes = [png_note(path) for path in paths]
        flow = self.flow_path(pair)
        # The first picture is that of the flow, and was written before it.
        for path, note in [(flow, notes[0]), *zip(paths, notes, strict=True)]:
            if note is None and path.is_file():
                raise UserError(
                    f"{path}: already exists and was not written by this command; choose another --out, or replace it "
                    "with --overwrite"
                )
        return flow.is_file() and all(note == pair.key for note in notes)

    def write(self, pair: FramePair, flow: np.ndarray) -> None:
        """Write the files of a pair; the flow is float32 (H, W, 2) in pixels."""
        from prep import flow_viz
        from prep.formats.flow import write_flo

        # The flow comes last, so that one without a picture is not from here, and one with a new picture is not old.
        self.flow_path(pair).unlink(missing_ok=True)
        max_flow = self.max_flow or flow_viz.typical_max_flow(flow)
        for kind in self.pictures:
            if kind == "flow":
                image = flow_viz.flow_to_color(flow, max_flow)
            elif kind == "overlay":
                image = flow_viz.overlay_flow(pair.image1, flow, max_flow)
            else:
                image = flow_viz.draw_warp_check(pair.image1, pair.image2, flow)
            flow_viz.save_png(self.picture_path(pair, kind), image, note=pair.key)
        write_flo(self.flow_path(pair), flow)

    def flow_path(self, pair: FramePair) -> pathlib.Path:
        """The path of the flow."""
        return self.folder / f"{pair.name}.flo"

    def picture_path(self, pair: FramePair, kind: str) -> pathlib.Path:
        """The path of a picture: "flow", "overlay" or "warp"."""
        return self.folder / f"{pair.name}_{kind}.png"


# --- The run --------------------------------------------------------------------------------------


class PairCounts(NamedTuple):
    """What `predict` did with the pairs."""

    written: int
    skipped: int
    """Pairs whose outputs existed."""


def predict(
    predictor: "FlowPredictor",
    pairs: Iterable[FramePair],
    write: Callable[[FramePair, np.ndarray], None],
    *,
    batch: int = 1,
    is_done: Callable[[FramePair], bool] = lambda pair: False,
    on_pairs: Callable[[int], object] = lambda count: None,
) -> PairCounts:
    """Predict and write the flow of many pairs, reading and writing while the network computes.

    Args:
        predictor: computes the flow; its graph is compiled once, as the last batch is filled up.
        pairs: all of one size; read in another thread.
        write: writes the flow of a pair, float32 (H, W, 2) in pixels; called in threads.
        batch: pairs at a time.
        is_done: whether to skip a pair, as its outputs exist.
        on_pairs: called with the number of pairs after each step.
    """
    written = skipped = 0
    waiting: list[FramePair] = []
    writing: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def compute() -> None:
        filled = waiting + waiting[-1:] * (batch - len(waiting))
        flows = predictor.flow_batch(
            np.stack([pair.image1 for pair in filled]), np.stack([pair.image2 for pair in filled])
        )
        writing.extend(writers.submit(write, pair, flow) for pair, flow in zip(waiting, flows, strict=False))
        waiting.clear()

    def finish(limit: int) -> None:
        """Wait until at most `limit` pairs remain to be written; raises what writing raised."""
        nonlocal written
        while len(writing) > limit:
            writing.popleft().result()
            written += 1
            on_pairs(1)

    marked = ((pair, is_done(pair)) for pair in pairs)
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as writers:
        for pair, done in prefetch(marked, 2 * batch):
            if done:
                skipped += 1
                on_pairs(1)
                continue
            waiting.append(pair)
            if len(waiting) == batch:
                compute()
                finish(2 * batch)
        if waiting:
            compute()
        finish(0)
    return PairCounts(written, skipped)


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "input", nargs="+", type=pathlib.Path, help="two images of one size, a folder of frames, or a video"
    )
    parser.add_argument(
        "--ckpt",
        required=True,
        type=pathlib.Path,
        metavar="FILE",
        help="a run's checkpoint, network weights, or a published network's PyTorch file (required)",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        help="folder for flow and pictures; pairs whose outputs exist are skipped (required)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pairs at a time")
    parser.add_argument(
        "--overlay",
        action="store_true",
        help="also write NAME_overlay.png: image 1 in the colours of its flow (default: off)",
    )
    parser.add_argument(
        "--warp", action="store_true", help="also write NAME_warp.png: image 2 warped onto image 1 (default: off)"
    )
    parser.add_argument(
        "--max-flow",
        type=float,
        metavar="PX",
        help="pixels at full saturation, the same in all pictures (default: each picture's own)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="also compute pairs whose outputs exist (default: off)"
    )
    parser.add_argument(
        "--device", default="cpu", type=str.lower, choices=("cpu", "gpu"), help="where the network runs"
    )
    add_backend_option(parser)
    add_precision_option(parser)
    args = parser.parse_args()
    frames = check_options(args)
    args.out.mkdir(parents=True, exist_ok=True)

    with session.start(lambda: ({}, None), args.device):
        predict_frames(args, frames)


def check_options(args: argparse.Namespace) -> Frames:
    """Check all that can be checked before MindSpore starts; returns the frames of the input.

    Raises:
        UserError: an option is invalid, a file is missing or damaged, or the output folder cannot be used.
    """
    if len(args.input) > 2:
        raise UserError(f"{len(args.input)} inputs; expected two images, one folder or one video")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: expected at least 1")
    if args.max_flow is not None and not MIN_MAX_FLOW <= args.max_flow < math.inf:
        raise UserError(f"--max-flow {args.max_flow}: expected a finite number of at least {MIN_MAX_FLOW} pixels")
    if not args.ckpt.is_file():
        raise UserError(f"{args.ckpt}: no such checkpoint file")
    frames = open_frames(args.input)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is a file; expected a folder to write into")
    if args.warp and max(frames.size) > WARP_LIMIT:
        height, width = frames.size
        raise UserError(
            f"{args.input[0]}: has {height}x{width} pixels (height x width), and --warp takes sides of at most "
            f"{WARP_LIMIT:,}; leave out --warp, or resize the images"
        )
    folders = [path.parent for path in args.input] if len(args.input) == 2 else args.input  # or a video
    for folder in folders:
        if args.out.is_dir() and args.out.samefile(folder):
            raise UserError(
                f"{args.out}: holds the input images, which pictures of their flow could replace or be taken for; "
                "choose another --out"
            )
    return frames


def predict_frames(args: argparse.Namespace, frames: Frames) -> None:
    """Predict as the command line says, with a progress bar, and print where the results are."""
    from launch import progress
    from model.inference import load_predictor

    predictor = load_predictor(args.ckpt, args.backend, args.precision)
    settings = args.max_flow, predictor.network.backend, predictor.network.precision
    salt = hashlib.blake2b(args.ckpt.read_bytes()).digest() + repr(settings).encode()
    outputs = Outputs(args.out, overlay=args.overlay, warp=args.warp, max_flow=args.max_flow)
    # While a graph runs, MindSpore turns Ctrl-C into SIGTERM to this process; files being written must be finished.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with progress.bar(total=max(0, frames.count - 1) or None, unit="pair") as bar:
            counts = predict(
                predictor,
                make_pairs(frames.frames, salt),
                outputs.write,
                batch=args.batch,
                is_done=lambda pair: not args.overwrite and outputs.exist(pair),
                on_pairs=bar.update,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command resumes from here") from None
    total = sum(counts)
    if total == 0 and frames.count > 1:
        raise UserError(
            f"{args.input[0]}: says it has {frames.count} frames, but only the first could be decoded; it is damaged "
            "or cut short: copy it again"
        )
    if total == 0:
        raise UserError(f"{args.input[0]}: has one frame; expected at least two")
    if total < frames.count - 1:
        print_note(
            f"{args.input[0]} says it has {frames.count} frames, but only {total + 1} could be decoded; it may be cut "
            "short"
        )
    skipped = f", {counts.skipped} skipped as their outputs exist" if counts.skipped else ""
    print(
        f"{args.out}: flow of {counts.written} pair{'s' * (counts.written != 1)}{skipped}; "
        "look at *_flow.png, and read *.flo with prep.formats.flow.read_flo"
    )


if __name__ == "__main__":
    run(main)
