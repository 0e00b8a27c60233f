#!/usr/bin/env python3
"""Export a trained network for one image size as a MindIR or ONNX file, and check that the file agrees with it.

python model/export.py --ckpt FILE --size H W --format mindir|onnx --out FILE [--batch N]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from launch import session
from launch.arguments import Parser
from launch.errors import UserError, run
from prep.formats import MAX_PIXELS

if TYPE_CHECKING:
    from mindspore import nn

    from model.backend import Backend
    from model.inference import FlowPredictor

SUFFIXES = {"mindir": ".mindir", "onnx": ".onnx"}
BACKENDS: "dict[str, Backend]" = {"mindir": "mindspore", "onnx": "exportable"}
"""The operators that each format can hold."""
INPUTS, OUTPUTS = ["image1", "image2"], ["flow"]
TOLERANCE = 1e-3
"""Pixels by which an exported file's flow may differ from the network's, on average.

Each library rounds its sums in another order. Single pixels may differ by more, where rounding moves a position in
image 2 across its edge.
"""


class Difference(NamedTuple):
    """How far an exported file's flow is from the network's, in pixels."""

    mean: float
    largest: float
    max_flow: float
    """The network's largest displacement."""


def export(
    graph: "nn.Cell", size: tuple[int, int], path: pathlib.Path, *, batch: int = 1, format: str = "mindir"
) -> None:
    """Write a network's predictions for images of one size to a file.

    The file takes two images, uint8 (batch, H, W, 3), RGB, and gives the flow, float32 (batch, H, W, 2), in pixels; in
    ONNX they are named image1, image2 and flow. Like `FlowPredictor`, it resizes sides that are not multiples of 64.

    Args:
        graph: a `model.inference.PredictionGraph` whose network has the format's backend, `BACKENDS`.
        size: (H, W) of the images in pixels.
        path: of the file, which appears when it is complete.
        batch: pairs at a time.
        format: "mindir" or "onnx".

    Raises:
        UserError: MindSpore cannot express the network in this format.
    """
    import mindspore

    from launch.files import write_bytes

    images = [mindspore.Tensor(np.zeros((batch, *size, 3), np.uint8)) for _ in INPUTS]
    with tempfile.TemporaryDirectory() as folder:
        partial = pathlib.Path(folder, "network" + SUFFIXES[format])
        try:
            if format == "onnx":
                mindspore.onnx.export(graph, *images, file_name=str(partial), input_names=INPUTS, output_names=OUTPUTS)
                correct_onnx(partial)
            else:
                mindspore.export(graph, *images, file_name=str(partial), file_format="MINDIR")
        except RuntimeError as error:  # an operator that the exporter does not know
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"MindSpore {mindspore.__version__} cannot write this network as {format} ({reason}); "
                "try the other format"
            ) from None
        write_bytes(path, partial.read_bytes())


def correct_onnx(path: pathlib.Path) -> None:
    """Remove from an ONNX file what MindSpore 2.8.0 writes wrongly.

    It gives transposed convolutions an `output_shape` of four sides where ONNX wants the two spatial ones. They need
    none: their size follows from stride and padding.
    """
    import onnx

    network = onnx.load(path)
    for node in network.graph.node:
        if node.op_type == "ConvTranspose":
            kept = [field for field in node.attribute if field.name != "output_shape"]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.checker.check_model(network)
    onnx.save(network, path)


def load_exported(path: pathlib.Path, format: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of two uint8 images (N, H, W, 3) that returns an exported file's flow.

    The flow is float32 (N, H, W, 2) in pixels; the images must be of the file's size and batch.
    """
    if format == "mindir":
        import mindspore

        graph = mindspore.nn.GraphCell(mindspore.load(str(path)))
        return lambda *images: graph(*map(mindspore.Tensor, images)).asnumpy()
    import onnxruntime

    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda *images: np.asarray(runtime.run(OUTPUTS, dict(zip(INPUTS, images, strict=True)))[0])


def compare(
    predictor: "FlowPredictor", path: pathlib.Path, size: tuple[int, int], *, batch: int = 1, format: str = "mindir"
) -> Difference:
    """How far an exported file is from its network, over a synthetic pair and noise.

    Args:
        predictor: of the same weights; its backend may be another.
        path, size, batch, format: as of `export`.

    Raises:
        UserError: the file's flow has another shape.
    """
    from prep.synthesis.version1 import make_pair

    exported = load_exported(path, format)
    rng = np.random.default_rng(0)
    synthetic = [make_pair(rng, *size) for _ in range(batch)]
    pairs = [
        [np.stack([pair[image] for pair in synthetic]) for image in (0, 1)],
        rng.integers(0, 256, (2, batch, *size, 3), np.uint8),
    ]
    differences, max_flow = [], 0.0
    for image1, image2 in pairs:
        expected = predictor.flow_batch(image1, image2)
        flow = exported(image1, image2)
        if flow.shape != expected.shape:
            raise UserError(
                f"the {format} file gives flow of shape {flow.shape}, expected {expected.shape}, the network's; "
                "try the other format"
            )
        differences.append(np.abs(flow - expected))
        max_flow = max(max_flow, float(np.abs(expected).max()))
    return Difference(float(np.mean(differences)), float(np.max(differences)), max_flow)


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--ckpt",
        required=True,
        type=pathlib.Path,
        metavar="FILE",
        help="a run's checkpoint, network weights, or a published network's PyTorch file (required)",
    )
    parser.add_argument(
        "--size",
        required=True,
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="height and width of the images in pixels; any, as the file resizes to multiples of 64 (required)",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=SUFFIXES,
        help="mindir, MindSpore's own, or onnx, which needs the extra of that name (required)",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="FILE", help="file to write (required)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pairs at a time")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the file and compare it with the network (default: --check)",
    )
    args = parser.parse_args()
    if args.batch < 1 or min(args.size) < 1:
        raise UserError("--batch and both sides of --size must be at least 1")
    if args.out.suffix != SUFFIXES[args.format]:
        raise UserError(f"{args.out}: {args.format} files are named *{SUFFIXES[args.format]}; change --out or --format")
    if not args.ckpt.is_file():
        raise UserError(f"{args.ckpt}: no such checkpoint file")
    if args.format == "onnx":
        require_package("onnx")
        if args.check:
            require_package("onnxruntime")
    args.out.parent.mkdir(parents=True, exist_ok=True)

    with session.start(lambda: ({}, None)):
        export_checkpoint(args)


def require_package(package: str) -> None:
    """Raise UserError if a package of the extra `onnx` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--format onnx needs the package {package}; install it with `pip install onnx onnxruntime`")


def export_checkpoint(args: argparse.Namespace) -> None:
    """Export as the command line says, check the file, and print what it holds."""
    from launch.files import replacing
    from model.inference import PredictionGraph, load_predictor
    from model.pwcnet import round_up

    height, width = size = args.size
    pixels = args.batch * round_up(height) * round_up(width)
    if pixels > MAX_PIXELS:
        raise UserError(
            f"--size {height} {width} --batch {args.batch} makes {pixels:,} pixels, with sides rounded up to multiples "
            f"of 64, expected at most {MAX_PIXELS:,}; choose smaller ones"
        )
    graph = PredictionGraph(load_predictor(args.ckpt, BACKENDS[args.format]).network)
    with replacing(args.out) as partial:  # the file gets its name when it has passed the check
        export(graph, size, partial, batch=args.batch, format=args.format)
        if args.check:
            difference = compare(load_predictor(args.ckpt), partial, size, batch=args.batch, format=args.format)
            if not difference.mean <= TOLERANCE:
                raise UserError(
                    f"{args.out}: not written, as its flow would differ from the network's by {difference.mean:.2g} px "
                    f"on average, expected at most {TOLERANCE:g}; try the other format"
                )
            print(
                f"checked: differs from the network by {difference.mean:.2g} px on average, {difference.largest:.2g} "
                f"px at most; the largest flow is {difference.max_flow:.1f} px"
            )
    shape = f"{args.batch}, {height}, {width}"
    print(
        f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB; two RGB images uint8 ({shape}, 3) to flow float32 "
        f"({shape}, 2) in pixels; load it with {'ONNX Runtime' if args.format == 'onnx' else 'mindspore.load'}"
    )


if __name__ == "__main__":
    run(main)
