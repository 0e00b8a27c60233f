"""Flow files: read optical flow bit for bit (.flo, .pfm, KITTI's .png, Spring's .flo5); write two.

A flow is a float32 array (H, W, 2): the displacement in pixels, right and down, that takes each
pixel of the first image to its place in the second.
"""

import io
import itertools
import math
import os
import re
import struct
import zlib

import cv2
import numpy as np

from launch.errors import UserError, one_line
from launch.files import write_bytes

# Middlebury .flo: the float 202021.25 as a little-endian tag, int32 width, int32 height, then the
# rows of (u, v) float32. Source: https://vision.middlebury.edu/flow/code/flow-code/README.txt
FLO_TAG = b"PIEH"
FLO_HEADER = struct.Struct("<4sii")

# The same source: larger values (Sintel writes 1e10) mean that the flow is not known there. Some
# write the limit itself, which is no more of a motion.
UNKNOWN_FLOW = 1e9

# "PF" (three channels; "Pf" has one), width, height and a scale whose sign is the byte order, then
# the rows of float32 from the bottom up. Source: https://www.pauldebevec.com/Research/HDR/PFM
PFM_HEADER = re.compile(rb"P([Ff])\s+(\d{1,9})\s+(\d{1,9})\s+([-+]?[\d.]{1,20}(?:[eE][-+]?\d{1,3})?)\s")

# KITTI: a 16-bit RGB PNG of 64 u + 2^15, 64 v + 2^15 and, where these are known, a number that is
# not 0. Source: the development kit of https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_IHDR = struct.Struct(">IIBBBBB")  # width, height, depth, colour, compression, filter, interlace
PNG_HEADER = struct.Struct(f">8sI4s{PNG_IHDR.size}s")  # signature; length, name, data of IHDR
PNG_RGB = 2
PNG_FILTERS = 5  # how a row may be predicted, 0 to 4
PNG_SIDE = 10**6  # the longest that libpng takes

# Deflate packs at most 1,032 bytes into one, so a file that says it holds more is damaged, and must
# not be given the memory that it asks for.
MAX_EXPANSION = 1100

# Of one picture or flow: no more than a shard's page has room for (prep/shards.py). Some kilobytes
# of deflate may claim far more.
MAX_PIXELS = 1 << 26


def read_flow(path):
    """Read a flow file by its suffix: float32 (H, W, 2) and uint8 (H, W), 1 where it is known."""
    parse, _ = format_of(path)
    with open(path, "rb") as file:
        flow = parse(file.read(), path)
    return flow, known(flow)


def flow_size(path):
    """(H, W) of a flow file from its header and its length; UserError if they don't fit."""
    _, size = format_of(path)
    with open(path, "rb") as file:
        return size(file, os.fstat(file.fileno()).st_size, path)


def format_of(path):
    """The (parse, size) functions for a flow file's suffix; UserError for an unknown one."""
    suffix = os.path.splitext(path)[1]
    if suffix not in FORMATS:
        raise UserError(f"{path}: not a flow file that is known here; expected {', '.join(FORMATS)}")
    return FORMATS[suffix]


def known(flow):
    """uint8 (H, W): 1 where the flow is known, 0 where it is NaN or from `UNKNOWN_FLOW` on."""
    # Nearly every flow is known everywhere, and its extremes say so in a tenth of the time.
    if flow.min() > -UNKNOWN_FLOW and flow.max() < UNKNOWN_FLOW:
        return np.ones(flow.shape[:2], np.uint8)
    with np.errstate(invalid="ignore"):
        return (np.abs(flow) < UNKNOWN_FLOW).all(axis=2).astype(np.uint8)


def check_size(name, width, height, expected, length) -> None:
    """UserError unless a file has the `length` that is `expected` for its width and height."""
    if width < 1 or height < 1:
        raise UserError(f"{name}: says it is {width} wide and {height} high; the file is damaged")
    if length != expected:
        raise UserError(
            f"{name}: {length} bytes, expected {expected} for {width}x{height} flow; the file is "
            f"{'cut short' if length < expected else 'too long'}, copy or unpack it again"
        )


# --- .flo: Middlebury, FlyingChairs, Sintel -------------------------------------------------------


def read_flo(path):
    """Read a .flo file: float32 (H, W, 2), pixels. UserError if it is not a whole one."""
    with open(path, "rb") as file:
        return parse_flo(file.read(), path)


def parse_flo(data, name):
    """The flow in the bytes of a .flo file, float32 (H, W, 2); `name` is for the error.

    The array is read-only and shares the memory of `data`.
    """
    height, width = flo_size(io.BytesIO(data), len(data), name)
    return np.frombuffer(data, "<f4", offset=FLO_HEADER.size).reshape(height, width, 2)


def flo_size(file, length, name):
    """(H, W) of an open .flo file of `length` bytes; UserError if it is damaged."""
    header = file.read(FLO_HEADER.size)
    if len(header) < FLO_HEADER.size:
        raise UserError(
            f"{name}: {length} bytes, expected a .flo file (its header alone has "
            f"{FLO_HEADER.size}); copy or unpack the file again"
        )
    tag, width, height = FLO_HEADER.unpack(header)
    if tag != FLO_TAG:
        raise UserError(f"{name}: begins with {tag!r}, expected a .flo file, which begins {FLO_TAG!r}")
    check_size(name, width, height, FLO_HEADER.size + 8 * width * height, length)
    return height, width


def write_flo(path, flow) -> None:
    """Write float32 (H, W, 2) as a Middlebury .flo file, bit for bit."""
    if flow.ndim != 3 or flow.shape[2] != 2 or flow.dtype != np.float32:
        raise ValueError(f"flow is {flow.dtype} {flow.shape}, expected float32 (H, W, 2)")
    height, width, _ = flow.shape
    write_bytes(path, FLO_HEADER.pack(FLO_TAG, width, height) + flow.astype("<f4").tobytes())


# --- .pfm: FlyingThings3D -------------------------------------------------------------------------


def parse_pfm(data, name):
    """The flow in the bytes of a three-channel .pfm, float32 (H, W, 2); the third is always 0."""
    height, width = pfm_size(io.BytesIO(data), len(data), name)
    header = PFM_HEADER.match(data[:100])
    order = "<" if float(header[4]) < 0 else ">"
    rows = np.frombuffer(data, order + "f4", offset=header.end()).reshape(height, width, 3)
    return rows[::-1, :, :2].astype(np.float32)


def pfm_size(file, length, name):
    """(H, W) of an open .pfm file of `length` bytes; UserError if it is damaged or not of flow."""
    start = file.read(100)
    header = PFM_HEADER.match(start)
    if not header:
        raise UserError(f"{name}: begins with {start[:8]!r}, expected a .pfm file, which begins b'PF', width, height")
    width, height = int(header[2]), int(header[3])
    try:
        scale = float(header[4])
    except ValueError:
        scale = 0.0
    if header[1] != b"F" or scale == 0:
        raise UserError(
            f"{name}: a .pfm file of one channel or with a scale of 0; expected flow, which has "
            "three channels (PF) and a scale of 1 or -1"
        )
    check_size(name, width, height, header.end() + 12 * width * height, length)
    return height, width


# --- .png: KITTI, HD1K ----------------------------------------------------------------------------


def parse_kitti_png(data, name):
    """The flow in the bytes of a KITTI flow .png, float32 (H, W, 2); NaN where it has none."""
    height, width = kitti_png_size(io.BytesIO(data), len(data), name)
    # libpng allocates what a chunk's length says and prints its errors itself, so it gets rows that
    # are known to be right, in a file made here.
    try:
        rows = inflate(png_data(data), height * (1 + 6 * width))
    except (ValueError, zlib.error) as error:
        raise UserError(
            f"{name}: a PNG file that can't be decoded ({one_line(error)}); copy or unpack it again"
        ) from None
    if np.frombuffer(rows, np.uint8)[:: 1 + 6 * width].max() >= PNG_FILTERS:
        raise UserError(f"{name}: a PNG file that can't be decoded (a row's filter); copy or unpack it again")
    pixels = cv2.imdecode(np.frombuffer(make_png(rows, height, width), np.uint8), cv2.IMREAD_UNCHANGED)
    del rows
    # OpenCV's order of channels is blue, green, red. The numbers are all exact in float32.
    flow = pixels[..., :0:-1].astype(np.float32)
    flow -= 2**15
    flow /= 64
    flow[pixels[..., 0] == 0] = np.nan
    return flow


def kitti_png_size(file, length, name):
    """(H, W) of an open KITTI flow .png of `length` bytes; UserError if it is not one."""
    header = file.read(PNG_HEADER.size)
    if len(header) < PNG_HEADER.size or not header.startswith(PNG_SIGNATURE):
        raise UserError(f"{name}: {length} bytes, the first {header[:8]!r}; expected a PNG file")
    _, size, chunk, fields = PNG_HEADER.unpack(header)
    width, height, depth, colour, _, _, interlace = PNG_IHDR.unpack(fields)
    if (size, chunk, depth, colour) != (PNG_IHDR.size, b"IHDR", 16, PNG_RGB):
        raise UserError(
            f"{name}: a PNG of {depth} bits and colour type {colour}; expected flow as KITTI has "
            f"it, 16-bit RGB (type {PNG_RGB})"
        )
    if interlace:
        raise UserError(f"{name}: an interlaced PNG; expected one without, save it again so")
    if (
        not 0 < 6 * width * height <= MAX_EXPANSION * length
        or width * height > MAX_PIXELS
        or max(width, height) > PNG_SIDE
    ):
        raise UserError(f"{name}: says it is {width}x{height}, which its {length} bytes can't be; the file is damaged")
    return height, width


def png_data(data) -> list[memoryview]:
    """The parts of a PNG file's compressed data, in order; ValueError unless all its chunks are
    inside the file, with right checksums, to the IEND."""
    data, start, parts = memoryview(data), len(PNG_SIGNATURE), []
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if end + 4 > len(data):
            raise ValueError(f"a chunk says it has {length} bytes, {len(data) - start - 12} are left")
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("a chunk's checksum does not match")
        if kind == b"IDAT":
            parts.append(data[start + 8 : end])
        elif kind == b"IEND":
            return parts
        start = end + 4
    raise ValueError("its end is missing")


def inflate(parts, size: int) -> bytes:
    """The `size` bytes that a zlib stream in several `parts` holds; ValueError or zlib.error if it
    does not, and no more memory than for these."""
    inflater, found, pieces = zlib.decompressobj(), 0, []
    for part in parts:
        # One byte more than is expected would show that there are more. With 0 as the limit all
        # would come.
        pieces.append(inflater.decompress(part, size + 1 - found))
        found += len(pieces[-1])
        if found > size:
            raise ValueError("it holds more rows than it should")
    if found < size or not inflater.eof:
        raise ValueError("its data is cut short")
    return b"".join(pieces)


def make_png(rows, height: int, width: int) -> bytes:
    """A 16-bit RGB PNG file of filtered `rows`, which are stored without compression."""
    fields = PNG_IHDR.pack(width, height, 16, PNG_RGB, 0, 0, 0)
    chunks = [(b"IHDR", fields), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    parts = [PNG_SIGNATURE]
    for kind, body in chunks:
        crc = zlib.crc32(body, zlib.crc32(kind))
        parts += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", crc)]
    return b"".join(parts)


def write_kitti_png(path, flow) -> None:
    """Write float32 (H, W, 2) as a KITTI flow .png; where it is unknown, so it is there.

    The format rounds to 1/64 px and ends at -512 and 511.98 px: what is beyond becomes that.
    """
    if flow.ndim != 3 or flow.shape[2] != 2 or flow.dtype != np.float32:
        raise ValueError(f"flow is {flow.dtype} {flow.shape}, expected float32 (H, W, 2)")
    valid = known(flow)
    values = np.clip(np.rint(64 * np.where(valid[..., None], flow, 0)) + 2**15, 0, 2**16 - 1)
    # OpenCV's order of channels is blue, green, red.
    pixels = np.dstack([valid, values[..., 1], values[..., 0]]) * valid[..., None]
    written, data = cv2.imencode(".png", pixels.astype(np.uint16))
    assert written
    write_bytes(path, data.tobytes())


# --- .flo5: Spring --------------------------------------------------------------------------------


def parse_flo5(data, name):
    """The flow in the bytes of a .flo5 file, float32 (H, W, 2), NaN where it is not known.

    HDF5 with one data set, "flow". Source: https://spring-benchmark.org and its flow_IO.
    """
    return use_flo5(io.BytesIO(data), len(data), name, lambda flow: read_chunks(flow, data))


def flo5_size(file, length, name):
    """(H, W) of an open .flo5 file of `length` bytes; UserError if it is not one."""
    return use_flo5(file, length, name, lambda flow: flow.shape[:2])


def use_flo5(file, length, name, use):
    """`use(flow)` of the data set "flow" in an open HDF5 file; UserError if there is none."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{name}: an HDF5 file; reading it needs h5py, `pip install h5py`") from None
    try:
        with h5py.File(file, "r") as opened:
            flow = opened["flow"]
            found = f"{flow.dtype} {flow.shape}"
            sound = flow.dtype == np.float32 and flow.ndim == 3 and flow.shape[2] == 2 and flow.size
            # A chunk is read as a whole, whatever part of it is in the data set.
            values = max(flow.size, np.prod(flow.chunks or 0, dtype=float))
            if sound and 4 * values <= MAX_EXPANSION * length and values <= 2 * MAX_PIXELS:
                # HDF5 would follow it into any other file that this one names.
                if not isinstance(opened.get("flow", getlink=True), h5py.HardLink) or flow.is_virtual:
                    raise ValueError("its data is in another file")
                return use(flow)
    except Exception as error:  # h5py raises a dozen kinds on damaged files
        raise UserError(f"{name}: not a readable .flo5 file ({one_line(error)}); copy or unpack it again") from None
    raise UserError(f"{name}: holds {found}, expected float32 (H, W, 2) that {length} bytes can hold")


def read_chunks(flow, data) -> np.ndarray:
    """The values of an h5py data set, float32 (H, W, 2), in the bytes `data` of its file.

    HDF5 only says where they are: what it reads by itself may be of other files, packed by any
    plugin, and in a damaged file its reading can end the process. Raises ValueError or zlib.error.
    """
    import h5py

    created = flow.id.get_create_plist()
    filters = [created.get_filter(i)[0] for i in range(created.get_nfilters())]
    if flow.external or not set(filters) <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}:
        raise ValueError("its data is in another file or packed otherwise than by deflate")
    if not flow.chunks:
        offset = flow.id.get_offset()
        if offset is None or created.get_layout() != h5py.h5d.CONTIGUOUS:
            raise ValueError("its data is not there")
        return np.frombuffer(data, np.float32, flow.size, offset).reshape(flow.shape)
    values, size = np.zeros(flow.shape, np.float32), 4 * math.prod(flow.chunks)
    starts = [range(0, side, step) for side, step in zip(flow.shape, flow.chunks)]
    if math.prod(map(len, starts)) > len(data) // 8:
        raise ValueError("it has more chunks than its bytes can hold")
    for start in itertools.product(*starts):
        found = flow.id.get_chunk_info_by_coord(start)
        if found.byte_offset is None:
            raise ValueError("a chunk is not there")
        chunk = data[found.byte_offset : found.byte_offset + found.size]
        for i, number in reversed(list(enumerate(filters))):
            if found.filter_mask >> i & 1:  # it was left out for this chunk
                continue
            if number == h5py.h5z.FILTER_DEFLATE:
                chunk = inflate([chunk], size)
            elif len(chunk) == size:  # all first bytes of the numbers, all second ones, ...
                chunk = np.frombuffer(chunk, np.uint8).reshape(4, -1).T.tobytes()
        block = np.frombuffer(chunk, np.float32).reshape(flow.chunks)
        place = tuple(slice(at, at + step) for at, step in zip(start, flow.chunks))
        part = values[place]
        part[:] = block[tuple(map(slice, part.shape))]
    return values


FORMATS = {
    ".flo": (parse_flo, flo_size),
    ".pfm": (parse_pfm, pfm_size),
    ".png": (parse_kitti_png, kitti_png_size),
    ".flo5": (parse_flo5, flo5_size),
}


# --- Writing --------------------------------------------------------------------------------------
