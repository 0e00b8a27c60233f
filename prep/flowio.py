"""Flow files: read and write optical flow bit for bit.

A flow is a float32 array (H, W, 2): the displacement in pixels, right and down, that takes each
pixel of the first image to its place in the second.
"""

import os
import struct

import numpy as np

from prep.errors import UserError

# Middlebury .flo: the float 202021.25 as a little-endian tag, int32 width, int32 height, then the
# rows of (u, v) float32. Source: https://vision.middlebury.edu/flow/code/flow-code/README.txt
FLO_TAG = b"PIEH"
FLO_HEADER = struct.Struct("<4sii")

# The same source: a larger value (Sintel writes 1e10) means that the flow is not known there.
UNKNOWN_FLOW = 1e9


def read_flow(path):
    """Read a flow file by its suffix: float32 (H, W, 2) and uint8 (H, W), 1 where it is known."""
    flow = read_flo(path)
    return flow, known(flow)


def flow_size(path):
    """(H, W) of a flow file from its header and its length; UserError if they don't fit."""
    with open(path, "rb") as file:
        return parse_flo_header(file.read(FLO_HEADER.size), os.fstat(file.fileno()).st_size, path)


def read_flo(path):
    """Read a Middlebury .flo file: float32 (H, W, 2), pixels. UserError if it is not a whole one."""
    with open(path, "rb") as file:
        return parse_flo(file.read(), path)


def parse_flo(data, name):
    """The flow in the bytes of a .flo file, float32 (H, W, 2); `name` is for the error.

    The array is read-only and shares the memory of `data`.
    """
    height, width = parse_flo_header(data[: FLO_HEADER.size], len(data), name)
    return np.frombuffer(data, "<f4", offset=FLO_HEADER.size).reshape(height, width, 2)


def parse_flo_header(header, length, name):
    """(H, W) from the first 12 bytes of a .flo file of `length` bytes; UserError if it is damaged."""
    if length < FLO_HEADER.size:
        raise UserError(
            f"{name}: {length} bytes, expected a .flo file (its header alone has "
            f"{FLO_HEADER.size}); copy or unpack the file again"
        )
    tag, width, height = FLO_HEADER.unpack(header)
    if tag != FLO_TAG:
        raise UserError(f"{name}: begins with {tag!r}, expected a .flo file, which begins {FLO_TAG!r}")
    if width < 1 or height < 1:
        raise UserError(f"{name}: says it is {width} wide and {height} high; the file is damaged")
    expected = FLO_HEADER.size + 8 * width * height
    if length != expected:
        raise UserError(
            f"{name}: {length} bytes, expected {expected} for {width}x{height} flow; the file is "
            f"{'cut short' if length < expected else 'too long'}, copy or unpack it again"
        )
    return height, width


def write_flo(path, flow):
    """Write float32 (H, W, 2) as a Middlebury .flo file, bit for bit."""
    height, width, _ = check_flow(flow).shape
    write_whole(path, FLO_HEADER.pack(FLO_TAG, width, height) + flow.astype("<f4").tobytes())


def check_flow(flow):
    """`flow` itself if it is float32 (H, W, 2), else ValueError (a caller's bug)."""
    if flow.ndim != 3 or flow.shape[2] != 2 or flow.dtype != np.float32:
        raise ValueError(f"flow is {flow.dtype} {flow.shape}, expected float32 (H, W, 2)")
    return flow


def known(flow):
    """uint8 (H, W): 1 where the flow is known, 0 where it is NaN or beyond `UNKNOWN_FLOW`."""
    # Nearly every flow is known everywhere, and its extremes say so in a tenth of the time.
    if -UNKNOWN_FLOW <= flow.min() and flow.max() <= UNKNOWN_FLOW:
        return np.ones(flow.shape[:2], np.uint8)
    with np.errstate(invalid="ignore"):
        return (np.abs(flow) <= UNKNOWN_FLOW).all(axis=2).astype(np.uint8)


def write_whole(path, data):
    """Write bytes to a file that appears under its name only when it is whole."""
    partial = f"{path}.partial-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
