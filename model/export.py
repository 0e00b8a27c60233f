#!/usr/bin/env python3
"""Export: a trained network as a MindIR or ONNX file, for one image size, and proof that it agrees.

python model/export.py --ckpt FILE --size H W --format mindir|onnx --out FILE [--batch N]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import contextlib
import importlib.util
import pathlib
import tempfile

import numpy as np

from launch import session
from launch.arguments import Parser
from launch.errors import UserError, run

SUFFIXES = {"mindir": ".mindir", "onnx": ".onnx"}
INPUTS, OUTPUTS = ["image1", "image2"], ["flow"]
TOLERANCE = 1e-3
"""Pixels by which an exported file's flow may differ from the network's, on average.

Each library rounds its sums in another order. Single pixels may differ by more, where that
puts a place in image 2 on the other side of its edge.
"""


def export(predictor, size, path, *, batch=1, format="mindir") -> None:
    """Write a predictor for images of one size to a file.

    The file takes two images, uint8 (batch, H, W, 3), RGB, and gives the flow, float32
    (batch, H, W, 2), in pixels; in ONNX they are named image1, image2 and flow. Like the predictor
    it resizes sides that are no multiples of 64 itself.

    Args:
        predictor: a `model.pwcnet.FlowPredictor`, portable as `load` makes it.
        size: (H, W) of the images in pixels.
        path: of the file, which appears when it is whole.
        batch: pairs at a time.
        format: "mindir" or "onnx".

    Raises:
        UserError: MindSpore can't express the network in this format.
    """
    import mindspore

    from launch.files import write_bytes

    images = [mindspore.Tensor(np.zeros((batch, *size, 3), np.uint8)) for _ in INPUTS]
    with tempfile.TemporaryDirectory() as folder:
        made = pathlib.Path(folder, "network" + SUFFIXES[format])
        try:
            with operators_for(format):
                if format == "onnx":
                    mindspore.onnx.export(
                        predictor, *images, file_name=str(made), input_names=INPUTS, output_names=OUTPUTS
                    )
                    correct_onnx(made)
                else:
                    mindspore.export(predictor, *images, file_name=str(made), file_format="MINDIR")
        except RuntimeError as error:  # an operator that the exporter does not know
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{path}: MindSpore {mindspore.__version__} can't write this network "
                f"as {format} ({reason}); try the other format"
            ) from None
        write_bytes(path, made.read_bytes())


@contextlib.contextmanager
def operators_for(format):
    """Have what is compiled meanwhile made of operators that the format can hold."""
    from model import onnx_ops, ops, pwcnet

    names = ("warp", "resize", "normalize_pair") if format == "onnx" else ()
    usual = [
        (module, name, getattr(module, name)) for module in (ops, pwcnet) for name in names if hasattr(module, name)
    ]
    try:
        for module, name, _ in usual:
            setattr(module, name, getattr(onnx_ops, name))
        yield
    finally:
        for module, name, function in usual:
            setattr(module, name, function)


def correct_onnx(path) -> None:
    """Take from an ONNX file what MindSpore 2.8.0 says wrongly.

    It gives transposed convolutions an `output_shape` of four sides where ONNX wants the two
    spatial ones; their size follows from stride and padding, so that they need none.
    """
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "ConvTranspose":
            kept = [field for field in node.attribute if field.name != "output_shape"]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def load_exported(path, format):
    """A function of two uint8 images (N, H, W, 3) that gives an exported file's flow.

    The flow is float32 (N, H, W, 2) in pixels; the images must be of the file's size and batch.
    """
    import mindspore

    if format == "mindir":
        graph = mindspore.nn.GraphCell(mindspore.load(str(path)))
        return lambda *images: graph(*map(mindspore.Tensor, images)).asnumpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda *images: session.run(OUTPUTS, dict(zip(INPUTS, images)))[0]


def compare(predictor, path, size, *, batch=1, format="mindir"):
    """How far an exported file is from the network that it was made of.

    Args:
        predictor: of the same weights; it may have the project's own operators.
        path, size, batch, format: as of `export`.

    Returns:
        (mean difference, largest difference, largest displacement) in pixels, over a synthetic pair
        and noise.

    Raises:
        UserError: the file's flow is of another shape.
    """
    import mindspore

    from prep.synthesize import make_pair

    exported = load_exported(path, format)
    rng = np.random.default_rng(0)
    pairs = [
        [np.stack(images) for images in zip(*(make_pair(rng, *size)[:2] for _ in range(batch)))],
        rng.integers(0, 256, (2, batch, *size, 3), np.uint8),
    ]
    differences, longest = [], 0.0
    for image1, image2 in pairs:
        expected = predictor(mindspore.Tensor(image1), mindspore.Tensor(image2)).asnumpy()
        found = exported(image1, image2)
        if found.shape != expected.shape:
            raise UserError(
                f"{path}: gives flow of shape {found.shape}, the network {expected.shape}; don't use the file"
            )
        differences.append(np.abs(found - expected))
        longest = max(longest, float(np.abs(expected).max()))
    return float(np.mean(differences)), float(np.max(differences)), longest


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ckpt", required=True, type=pathlib.Path, metavar="FILE", help="a checkpoint of a run, or network weights"
    )
    parser.add_argument(
        "--size",
        required=True,
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of the images in pixels; any, the file resizes to multiples of 64",
    )
    parser.add_argument(
        "--format", required=True, choices=SUFFIXES, help="mindir is MindSpore's own; onnx needs the extra of that name"
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="FILE", help="the file to write")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pairs at a time (default 1)")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the file again and compare it with the network (the default)",
    )
    args = parser.parse_args()
    if args.batch < 1 or min(args.size) < 1:
        raise UserError("--batch and both sides of --size must be at least 1")
    if args.out.suffix != SUFFIXES[args.format]:
        raise UserError(f"{args.out}: {args.format} files are named *{SUFFIXES[args.format]}; change --out or --format")
    if not args.ckpt.is_file():
        raise UserError(f"{args.ckpt}: no such checkpoint file")
    if args.format == "onnx":
        need("onnx")
        if args.check:
            need("onnxruntime")
    args.out.parent.mkdir(parents=True, exist_ok=True)

    with session.start(lambda: ({}, None)):
        report(args)


def need(package) -> None:
    """UserError if a package of the extra `onnx` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--format onnx needs the package {package}; install it with `pip install onnx onnxruntime`")


def load(ckpt, portable=False):
    """The predictor of a checkpoint; a portable one has none of the project's own operators."""
    from model import native
    from model.pwcnet import FlowPredictor
    from model.weights import load_network

    with native.disabled() if portable else contextlib.nullcontext():
        predictor = FlowPredictor(load_network(ckpt))
    predictor.set_train(False)
    return predictor


def report(args) -> None:
    """Export as the command line says, check the file and print what is in it."""
    export(load(args.ckpt, portable=True), args.size, args.out, batch=args.batch, format=args.format)
    height, width = args.size
    print(
        f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB; two images uint8 "
        f"({args.batch}, {height}, {width}, 3) to flow float32 "
        f"({args.batch}, {height}, {width}, 2) in pixels"
    )
    if args.check:
        mean, largest, longest = compare(load(args.ckpt), args.out, args.size, batch=args.batch, format=args.format)
        if not mean <= TOLERANCE:
            raise UserError(
                f"{args.out}: its flow differs from the network's by {mean:.2g} px on "
                f"average, expected at most {TOLERANCE:g}; don't use it"
            )
        print(
            f"checked: differs from the network by {mean:.2g} px on average, {largest:.2g} px at "
            f"most, where the flow reaches {longest:.1f} px"
        )


if __name__ == "__main__":
    run(main)
