#!/usr/bin/env python3
"""Prediction: the flow of two images, of a folder's consecutive frames or of a video.

python model/predict.py IMAGE1 IMAGE2 --ckpt FILE --out DIR [--overlay] [--warp]
python model/predict.py FOLDER        --ckpt FILE --out DIR [--batch N]
python model/predict.py VIDEO         --ckpt FILE --out DIR [--batch N]

Of each pair NAME.flo holds the flow in pixels, at the first image's size, and NAME_flow.png shows
it in colours. NAME is the first image's, or the video's and the number of its frame, from 0.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import collections
import concurrent.futures
import dataclasses
import hashlib
import pathlib
import re
import signal

import numpy as np

from launch import session
from launch.arguments import Parser
from launch.errors import UserError, run

IMAGE_SUFFIXES = (".png", ".ppm", ".jpg", ".jpeg", ".bmp")
WRITERS = 2  # threads


@dataclasses.dataclass
class FramePair:
    """Two frames, uint8 (H, W, 3), RGB, the name of their outputs, and a hash of all of these."""

    name: str
    image1: np.ndarray
    image2: np.ndarray
    key: str = ""


# --- Where frames come from -----------------------------------------------------------------------


def open_frames(inputs):
    """The frames that the command line names: see `open_images` and `open_video`."""
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    first = inputs[0]
    if len(inputs) == 2:
        for path in inputs:
            if path.is_dir():
                raise UserError(f"{path}: a folder; expected two images, or one folder alone")
        return open_images(inputs)
    if first.is_dir():
        paths = frames_of(first)
        if len(paths) < 2:
            raise UserError(f"{first}: has {len(paths)} frames ({', '.join(IMAGE_SUFFIXES)}), expected two at least")
        return open_images(paths)
    if first.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{first}: one image; expected a second one after it, a folder of frames or a video")
    return open_video(first)


def frames_of(folder):
    """The images of a folder by name, numbers in the names by their value: 9 before 10."""

    def order(path):
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if part.isdecimal() else part for part in parts], path.name

    return sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")),
        key=order,
    )


def open_images(paths):
    """The number of frames in image files and an iterator of their (name, frame).

    UserError if their headers say that they are of several sizes, or two have one name.
    """
    from prep.formats.image import image_size, read_image

    (height, width), names = image_size(paths[0]), {}
    for path in paths:
        if image_size(path) != (height, width):
            found = "x".join(map(str, image_size(path)[::-1]))
            raise UserError(
                f"{path}: {found} pixels, expected {width}x{height} as {paths[0]} has; "
                "both images of a pair must be of one size, so crop or resize one, or "
                "put the frames of each size into a folder of their own"
            )
        if len(paths) > 2 and path.stem in names:
            raise UserError(f"{path}: its flow would have the name of that of {names[path.stem]}; rename one of them")
        names[path.stem] = path
    return len(paths), ((path.stem, read_image(path)) for path in paths)


def open_video(path):
    """The number of frames that a video says it has, 0 if unknown, and an iterator of these.

    Each comes as (name, frame), decoded when asked for. UserError if OpenCV can't decode it.
    """
    import cv2

    # What they say about a broken file is for programmers; the error below is for users.
    cv2.setLogLevel(0)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    decoded, frame = video.read()
    if not decoded:
        raise UserError(
            f"{path}: not a video that OpenCV can decode; expected an image, a folder "
            "of frames or a video, such as .mp4 or .avi"
        )

    def frames(frame):
        number, decoded = 0, True
        while decoded:
            yield f"{path.stem}_{number:06}", cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            decoded, frame = video.read()
            number += 1
        video.release()

    return max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT))), frames(frame)


def pairs_of(frames, salt):
    """Consecutive frames as pairs; `salt`, bytes, is what else their outputs depend on."""
    before = None
    for name, frame in frames:
        if before:
            if frame.shape != before[1].shape:
                raise UserError(
                    f"{name}: a frame of {frame.shape[1]}x{frame.shape[0]} pixels after one of "
                    f"{before[1].shape[1]}x{before[1].shape[0]}; expected all of one size"
                )
            key = hashlib.blake2b(salt, digest_size=16)
            key.update(np.ascontiguousarray(before[1]))
            key.update(np.ascontiguousarray(frame))
            yield FramePair(before[0], before[1], frame, key.hexdigest())
        before = name, frame


# --- What is written ------------------------------------------------------------------------------


class Outputs:
    """The files of each pair, in a folder: flow, its picture and more pictures as wanted.

    Each is written whole or not at all. The pictures carry the pair's key, so that a run that was
    interrupted can tell what is already there from what was made of other images, other weights or
    with another scale.

    Args:
        folder: where to write; it exists.
        overlay, warp: whether these pictures are wanted too.
        max_flow: pixels per frame at full saturation; None for each picture's own scale.
    """

    def __init__(self, folder, *, overlay=False, warp=False, max_flow=None) -> None:
        self.folder = folder
        self.pictures = ["flow"] + ["overlay"] * overlay + ["warp"] * warp
        self.max_flow = max_flow

    def present(self, pair):
        """Whether everything that is wanted of a pair is there."""
        from prep.flow_viz import png_note

        return (self.folder / f"{pair.name}.flo").is_file() and all(
            png_note(self.path(pair, kind)) == pair.key for kind in self.pictures
        )

    def write(self, pair, flow) -> None:
        """Write the files of a pair; flow is float32 (H, W, 2) in pixels."""
        from prep import flow_viz
        from prep.formats.flow import write_flo

        write_flo(self.folder / f"{pair.name}.flo", flow)
        longest = self.max_flow or flow_viz.typical_max_flow(flow)
        for kind in self.pictures:
            if kind == "flow":
                image = flow_viz.flow_to_color(flow, longest)
            elif kind == "overlay":
                image = flow_viz.overlay_flow(pair.image1, flow, longest)
            else:
                image = flow_viz.draw_warp_check(pair.image1, pair.image2, flow)
            flow_viz.save_png(self.path(pair, kind), image, note=pair.key)

    def path(self, pair, kind):
        return self.folder / f"{pair.name}_{kind}.png"


# --- The run --------------------------------------------------------------------------------------


def predict(predictor, pairs, outputs, *, batch=1, overwrite=False, on_pairs=None):
    """Predict and write the flow of many pairs, reading and writing while the network computes.

    Args:
        predictor: a `model.pwcnet.FlowPredictor`; its graph is compiled once, as the last batch is
            filled up.
        pairs: iterable of `FramePair`, all of one size; read in another thread.
        outputs: where they go, an `Outputs`.
        batch: pairs at a time.
        overwrite: whether pairs whose outputs are present are computed again.
        on_pairs: called with the number of pairs after each batch.

    Returns:
        How many pairs were written, and how many were present.
    """
    import mindspore

    written = present = 0
    waiting, writing = [], collections.deque()

    def compute() -> None:
        filled = waiting + waiting[-1:] * (batch - len(waiting))
        images = [mindspore.Tensor(np.stack([getattr(pair, name) for pair in filled])) for name in ("image1", "image2")]
        flow = predictor(*images).asnumpy()
        writing.extend(writers.submit(outputs.write, *done) for done in zip(waiting, flow))
        waiting.clear()

    def finish(at_most) -> None:
        """Wait until at most so many pairs are yet to be written; raises what writing raised."""
        nonlocal written
        while len(writing) > at_most:
            writing.popleft().result()
            written += 1
            on_pairs and on_pairs(1)

    marked = ((pair, not overwrite and outputs.present(pair)) for pair in pairs)
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as writers:
        for pair, is_present in ahead(marked, 2 * batch):
            if is_present:
                present += 1
                on_pairs and on_pairs(1)
                continue
            waiting.append(pair)
            if len(waiting) == batch:
                compute()
                finish(2 * batch)
        if waiting:
            compute()
        finish(0)
    return written, present


def ahead(values, count):
    """Iterate over values, `count` of them made in a thread before they are asked for."""
    values = iter(values)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        coming = collections.deque(thread.submit(next, values, None) for _ in range(count))
        while (value := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, values, None))
            yield value


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "input", nargs="+", type=pathlib.Path, help="two images of one size, a folder of frames or a video"
    )
    parser.add_argument(
        "--ckpt", required=True, type=pathlib.Path, metavar="FILE", help="a checkpoint of a run, or network weights"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        help="for the flow and the pictures; pairs already there are left out",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pairs at a time (default 1)")
    parser.add_argument(
        "--overlay", action="store_true", help="also NAME_overlay.png: image 1 in the colours of its flow"
    )
    parser.add_argument(
        "--warp", action="store_true", help="also NAME_warp.png: image 2 brought back onto image 1 by the flow"
    )
    parser.add_argument(
        "--max-flow",
        type=float,
        metavar="PX",
        help="pixels at full colour, for pictures of one scale; default: each its own",
    )
    parser.add_argument("--overwrite", action="store_true", help="compute also what is already there")
    parser.add_argument("--device", default="cpu", type=str.lower, choices=("cpu", "gpu"))
    args = parser.parse_args()
    if len(args.input) > 2:
        raise UserError(f"{len(args.input)} inputs; expected two images, one folder or one video")
    if args.batch < 1 or (args.max_flow is not None and not args.max_flow > 0):
        raise UserError("--batch must be at least 1 and --max-flow above 0")
    if not args.ckpt.is_file():
        raise UserError(f"{args.ckpt}: no such checkpoint file")
    count, frames = open_frames(args.input)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: a file; expected a folder to write into")
    if args.out.is_dir() and args.input[0].is_dir() and args.out.samefile(args.input[0]):
        raise UserError(
            f"{args.out}: holds the frames, and the pictures of their flow would be "
            "taken for more of them; choose another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)

    with session.start(lambda: ({}, None), args.device):
        report(args, count, frames)


def report(args, count, frames) -> None:
    """Predict as the command line says, with a progress bar, and print what was done."""
    from launch import progress
    from model.pwcnet import FlowPredictor
    from model.weights import load_network

    predictor = FlowPredictor(load_network(args.ckpt))
    predictor.set_train(False)
    salt = hashlib.blake2b(args.ckpt.read_bytes()).digest() + repr(args.max_flow).encode()
    outputs = Outputs(args.out, overlay=args.overlay, warp=args.warp, max_flow=args.max_flow)
    # While a graph runs, MindSpore answers Ctrl-C by SIGTERM to this process; what is being written
    # shall be finished first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with progress.bar(total=max(0, count - 1) or None, unit="pair") as bar:
            written, present = predict(
                predictor,
                pairs_of(frames, salt),
                outputs,
                batch=args.batch,
                overwrite=args.overwrite,
                on_pairs=bar.update,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from here") from None
    if written + present == 0:
        raise UserError(f"{args.input[0]}: one frame; expected two at least")
    skipped = f", {present} skipped as already there" if present else ""
    print(f"{args.out}: flow of {written} pair{'s' * (written != 1)}{skipped}")
    if written + present < count - 1:
        print(
            f"note: {args.input[0]} says it has {count} frames; {written + present + 1} could be "
            "decoded, it may be cut short",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
