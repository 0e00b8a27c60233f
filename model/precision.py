"""The number format that a network's convolutions compute in."""

import argparse
from typing import TYPE_CHECKING, Literal, cast, get_args

from launch.errors import UserError
from launch.logs import print_note
from model import native

if TYPE_CHECKING:
    from model.pwcnet import PWCNet

Precision = Literal["float32", "float16", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CHOICES = ("auto", *PRECISIONS)


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    """Add `--precision`, whose value `resolve_precision` takes."""
    parser.add_argument(
        "--precision",
        choices=CHOICES,
        default="float32",
        help="number format of the convolutions; auto: the fastest one known to be correct on this device",
    )


def resolve_precision(precision: str, backend: str) -> Precision:
    """The number format to compute in on MindSpore's current device.

    "auto" is float32 on a GPU, where float16 is not yet known to be right (launch/README.md). On a CPU that can
    multiply bfloat16 numbers, it is bfloat16, else float32. Where bfloat16 would be slower than float32, which takes
    its place, a note says so.

    Args:
        precision: one of `CHOICES`.
        backend: of the network, as `model.backend.resolve_backend` returns it.

    Raises:
        ValueError: there is no such choice.
        UserError: bfloat16 on a GPU.
    """
    import mindspore

    if precision not in CHOICES:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(CHOICES)}")
    device = mindspore.get_context("device_target")
    if device != "CPU":
        if precision == "bfloat16":
            raise UserError(
                f"precision bfloat16: MindSpore's convolutions on {device} do not support bfloat16; use float16 or auto"
            )
        return "float32" if precision == "auto" else cast("Precision", precision)
    if precision not in ("auto", "bfloat16"):
        return cast("Precision", precision)
    reason = ""
    if backend != "native" or not native.has_operator("Convolution3x3"):
        reason = "MindSpore's convolutions on the CPU do not support bfloat16"
    elif not native.has_bfloat16():
        reason = "this processor has neither AVX512-BF16 nor AMX"
    if not reason:
        return "bfloat16"
    if precision == "bfloat16":
        print_note(f"float32 instead of bfloat16: {reason}", each_host=True)
    return "float32"


def set_precision(network: "PWCNet", precision: Precision) -> None:
    """Make a network's convolutions compute in a number format, and leave the rest in float32.

    The convolutions take nearly all the time. Flow, warping, cost volume, loss and weight updates are sums of many
    numbers or differences of close ones, which 16 bits would spoil. With bfloat16, the convolutions that end in a flow
    compute in float32, too.

    Call it before the network's first use: compiled graphs keep the precision that they were compiled with.
    """
    import mindspore

    if precision == "float16" and mindspore.get_context("device_target") == "GPU":
        # Otherwise MindSpore 2.8 changes the layout to NHWC, where it adds biases to rows instead of channels, and the
        # gradients of convolutions take no dilation.
        mindspore.set_context(disable_format_transform=True)
    network.precision = precision
    for _, cell in network.cells_and_names():
        if hasattr(cell, "set_precision"):
            cell.set_precision(precision)
