"""The operators that a network is built from: the project's own, MindSpore's, or those that ONNX can express."""

import argparse
import functools
import os
from typing import Literal, get_args

from launch.logs import print_note
from model import native

Backend = Literal["native", "mindspore", "exportable"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
NATIVE_VARIABLE = "PWCNET_NATIVE"
"""Environment variable that, set to 0, stands for the backend mindspore; `--backend` replaces it."""


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """Add `--backend`, whose value `resolve_backend` and `model.pwcnet.PWCNet` take."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="native",
        help="operators of the network: native, the project's own in C++ and CUDA, compiled on first use; mindspore, "
        "MindSpore's, slower; exportable, those that ONNX has (default: native, mindspore if they cannot be compiled)",
    )


def resolve_backend(backend: Backend) -> Backend:
    """The backend to use on MindSpore's current device: "mindspore" in place of an unavailable "native".

    Why it is unavailable is printed once, as a note.

    Raises:
        ValueError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "native" and (disabled_by_environment() or not native.available()):
        return "mindspore"
    return backend


@functools.cache
def disabled_by_environment() -> bool:
    """Whether NATIVE_VARIABLE forbids the native operators; says once that the variable is deprecated."""
    if os.environ.get(NATIVE_VARIABLE) != "0":
        return False
    print_note(f"{NATIVE_VARIABLE}=0 works in this release only; use --backend mindspore")
    return True
