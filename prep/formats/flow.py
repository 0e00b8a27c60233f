"""Flow files: read .flo, .pfm, KITTI's and Kubric's .png, Spring's .flo5, .npy and .npz; write .flo and .png.

Flow is a float32 array (H, W, 2): the displacement in pixels, right and down, from each pixel of the first image to
its position in the second. It is read bit for bit, unless an .npy or .npz file has a different type from float32.
"""

import io
import itertools
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import cv2
import numpy as np

from launch.errors import UserError, one_line
from launch.files import write_bytes
from prep.archive import file_length, open_file, read_file
from prep.formats import MAX_EXPANSION, MAX_PIXELS, StrPath, npy

if TYPE_CHECKING:
    import h5py  # optional at run time

Result = TypeVar("Result")

# Middlebury .flo: the float 202021.25 as a little-endian tag, int32 width, int32 height, then rows of float32 (u, v).
# Source: https://vision.middlebury.edu/flow/code/flow-code/README.txt
FLO_TAG = b"PIEH"
FLO_HEADER = struct.Struct("<4sii")

# From the same source: larger values mean unknown flow (Sintel writes 1e10). Some files contain the limit itself, which
# cannot be a real displacement either.
UNKNOWN_FLOW = 1e9

# .pfm: "PF" (three channels; "Pf" has one), width, height, and a scale whose sign gives the byte order, then rows of
# float32 from bottom to top. Source: https://www.pauldebevec.com/Research/HDR/PFM
PFM_HEADER = re.compile(rb"P([Ff])\s+(\d{1,9})\s+(\d{1,9})\s+([-+]?[\d.]{1,20}(?:[eE][-+]?\d{1,3})?)\s")

# KITTI: a 16-bit RGB PNG of 64 u + 2^15, 64 v + 2^15 and a value that is nonzero where these are known.
# Source: the development kit of https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_IHDR = struct.Struct(">IIBBBBB")  # width, height, depth, colour, compression, filter, interlace
PNG_HEADER = struct.Struct(f">8sI4s{PNG_IHDR.size}s")  # signature; length, name, data of IHDR
PNG_RGB = 2
PNG_FILTERS = 5  # valid row filters are 0 to 4
PNG_SIDE = 10**6  # the longest side that libpng accepts

Parser = Callable[[bytes, StrPath], np.ndarray]
"""(bytes of a file, its name for errors) -> flow."""
SizeReader = Callable[[BinaryIO, int, StrPath], tuple[int, int]]
"""(open file, its length in bytes, its name for errors) -> (H, W)."""


def read_flow(
    path: StrPath, *, limit: float = UNKNOWN_FLOW, scale: "KubricScale | None" = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a flow file of any supported format: flow float32 (H, W, 2) and valid uint8 (H, W), 1 where it is known.

    Args:
        path: the file; its suffix tells the format.
        limit: flow of this magnitude or more is unknown.
        scale: makes a .png one of Kubric's instead of KITTI's.

    Raises:
        UserError: the file is damaged, or its suffix is not supported.
    """
    parse, _ = format_of(path)
    data = read_file(path)
    flow = parse_kubric_png(data, path, scale) if scale else parse(data, path)
    return flow, find_known(flow, limit)


def flow_size(path: StrPath) -> tuple[int, int]:
    """(H, W) of a flow file from its header; UserError if the header is damaged or contradicts the file's length."""
    _, size = format_of(path)
    with open_file(path) as file:
        return size(file, file_length(path), path)


def format_of(path: StrPath) -> tuple[Parser, SizeReader]:
    """The functions (parse, size) for a flow file's suffix; UserError if it is not supported."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: not a supported flow format; expected {', '.join(FORMATS)}")
    return FORMATS[suffix]


def find_known(flow: np.ndarray, limit: float = UNKNOWN_FLOW) -> np.ndarray:
    """Mask of known flow, uint8 (H, W): 0 where a component is NaN or its magnitude is at least `limit`."""
    # Most flow is known everywhere, which its extremes tell in a tenth of the time.
    if flow.min() > -limit and flow.max() < limit:
        return np.ones(flow.shape[:2], np.uint8)
    with np.errstate(invalid="ignore"):
        return (np.abs(flow) < limit).all(axis=2).astype(np.uint8)


def check_length(name: StrPath, size: tuple[int, int], length: int, expected: int) -> None:
    """Raise UserError unless a file of flow of this (H, W) has the expected length in bytes."""
    height, width = size
    if width < 1 or height < 1:
        raise UserError(f"{name}: its header says {width}x{height} pixels; the file is damaged, download it again")
    if length != expected:
        raise UserError(
            f"{name}: {length} bytes, expected {expected} for {width}x{height} flow; the file is "
            f"{'truncated' if length < expected else 'too long'}, copy or unpack it again"
        )


def check_array(flow: np.ndarray) -> None:
    """Raise ValueError unless an array is flow."""
    if flow.ndim != 3 or flow.shape[2] != 2 or flow.dtype != np.float32:
        raise ValueError(f"flow is {flow.dtype} {flow.shape}, expected float32 (H, W, 2)")


# --- .flo: Middlebury, FlyingChairs, Sintel -------------------------------------------------------


def read_flo(path: StrPath) -> np.ndarray:
    """Read a .flo file: float32 (H, W, 2) in pixels, read-only. Raises UserError if it is damaged."""
    return parse_flo(read_file(path), path)


def parse_flo(data: bytes, name: StrPath) -> np.ndarray:
    """Parse the bytes of a .flo file: float32 (H, W, 2), a read-only view of `data`; `name` is for errors."""
    height, width = flo_size(io.BytesIO(data), len(data), name)
    return np.frombuffer(data, "<f4", offset=FLO_HEADER.size).reshape(height, width, 2)


def flo_size(file: BinaryIO, length: int, name: StrPath) -> tuple[int, int]:
    """(H, W) of an open .flo file of `length` bytes; UserError if it is damaged."""
    header = file.read(FLO_HEADER.size)
    if len(header) < FLO_HEADER.size:
        raise UserError(
            f"{name}: {length} bytes, expected a .flo file, whose header alone has "
            f"{FLO_HEADER.size}; copy or unpack the file again"
        )
    tag, width, height = FLO_HEADER.unpack(header)
    if tag != FLO_TAG:
        raise UserError(f"{name}: begins with {tag!r}, expected a .flo file, which begins with {FLO_TAG!r}")
    check_length(name, (height, width), length, FLO_HEADER.size + 8 * width * height)
    return height, width


def write_flo(path: StrPath, flow: np.ndarray) -> None:
    """Write float32 (H, W, 2) as a Middlebury .flo file, bit for bit."""
    check_array(flow)
    height, width, _ = flow.shape
    write_bytes(path, FLO_HEADER.pack(FLO_TAG, width, height) + flow.astype("<f4").tobytes())


# --- .pfm: FlyingThings3D -------------------------------------------------------------------------


def parse_pfm(data: bytes, name: StrPath) -> np.ndarray:
    """Parse the bytes of a three-channel .pfm file: float32 (H, W, 2); the third channel is always 0."""
    (height, width), order, start = parse_pfm_header(data[:100], len(data), name)
    rows = np.frombuffer(data, f"{order}f4", offset=start).reshape(height, width, 3)
    return rows[::-1, :, :2].astype(np.float32)


def pfm_size(file: BinaryIO, length: int, name: StrPath) -> tuple[int, int]:
    """(H, W) of an open .pfm file of `length` bytes; UserError if it is damaged or contains no flow."""
    return parse_pfm_header(file.read(100), length, name).size


class PfmHeader(NamedTuple):
    """The header of a .pfm file."""

    size: tuple[int, int]
    """(H, W)."""
    order: str
    """Byte order, "<" or ">"."""
    length: int
    """Length of the header in bytes."""


def parse_pfm_header(start: bytes, length: int, name: StrPath) -> PfmHeader:
    """Parse the first 100 bytes of a .pfm file of `length` bytes; UserError if it is damaged or contains no flow."""
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
            f"{name}: a .pfm file with one channel or a scale of 0; expected flow, which has three channels (PF) and "
            "a scale of 1 or -1"
        )
    check_length(name, (height, width), length, header.end() + 12 * width * height)
    return PfmHeader((height, width), "<" if scale < 0 else ">", header.end())


# --- .png: KITTI, HD1K, Kubric --------------------------------------------------------------------


def parse_kitti_png(data: bytes, name: StrPath) -> np.ndarray:
    """Parse the bytes of a KITTI flow .png: float32 (H, W, 2), NaN where the flow is unknown."""
    pixels = parse_flow_png(data, name)
    # OpenCV orders channels as blue, green, red. All values are exact in float32.
    flow = pixels[..., :0:-1].astype(np.float32)
    flow -= 2**15
    flow /= 64
    flow[pixels[..., 0] == 0] = np.nan
    return flow


class KubricScale(NamedTuple):
    """What the values of Kubric's flow .png files stand for."""

    at_0: float
    """The flow in pixels that 0 stands for."""
    at_65535: float
    """The flow in pixels that 65535 stands for."""
    swapped: bool = False
    """Whether red is the flow to the right and green downwards, as in early renderings, and not the reverse."""


def parse_kubric_png(data: bytes, name: StrPath, scale: KubricScale) -> np.ndarray:
    """Parse the bytes of a Kubric flow .png: float32 (H, W, 2).

    Sources: kubric/file_io.py in https://github.com/google-research/kubric, which writes it, and ptlflow's reader.
    """
    pixels = parse_flow_png(data, name)  # blue, unused, then green, red
    flow = (pixels[..., :0:-1] if scale.swapped else pixels[..., 1:]).astype(np.float32)
    flow *= np.float32((scale.at_65535 - scale.at_0) / (2**16 - 1))
    flow += np.float32(scale.at_0)
    return flow


def parse_flow_png(data: bytes, name: StrPath) -> np.ndarray:
    """Decode a 16-bit RGB .png: uint16 (H, W, 3) in OpenCV's order: blue, green, red."""
    height, width = kitti_png_size(io.BytesIO(data), len(data), name)
    # libpng allocates whatever a chunk's length claims, and prints its errors itself: give it only verified rows, in a
    # file made here.
    try:
        rows = inflate(png_data(data), height * (1 + 6 * width))
    except (ValueError, zlib.error) as error:
        raise UserError(f"{name}: cannot decode this PNG file ({one_line(error)}); copy or unpack it again") from None
    if np.frombuffer(rows, np.uint8)[:: 1 + 6 * width].max() >= PNG_FILTERS:
        raise UserError(f"{name}: cannot decode this PNG file (invalid row filter); copy or unpack it again")
    return cv2.imdecode(np.frombuffer(make_png(rows, height, width), np.uint8), cv2.IMREAD_UNCHANGED)


def kitti_png_size(file: BinaryIO, length: int, name: StrPath) -> tuple[int, int]:
    """(H, W) of an open KITTI or Kubric flow .png of `length` bytes; UserError if it is not one."""
    header = file.read(PNG_HEADER.size)
    if len(header) < PNG_HEADER.size or not header.startswith(PNG_SIGNATURE):
        raise UserError(f"{name}: {length} bytes, beginning with {header[:8]!r}; expected a PNG file")
    _, size, chunk, fields = PNG_HEADER.unpack(header)
    width, height, depth, colour, _, _, interlace = PNG_IHDR.unpack(fields)
    if (size, chunk, depth, colour) != (PNG_IHDR.size, b"IHDR", 16, PNG_RGB):
        raise UserError(
            f"{name}: a PNG of {depth} bits and colour type {colour}; expected flow in KITTI's format, "
            f"16-bit RGB (type {PNG_RGB})"
        )
    if interlace:
        raise UserError(f"{name}: an interlaced PNG, which is not supported; save it without interlacing")
    if (
        not 0 < 6 * width * height <= MAX_EXPANSION * length
        or width * height > MAX_PIXELS
        or max(width, height) > PNG_SIDE
    ):
        raise UserError(
            f"{name}: its header says {width}x{height} pixels, too many for its {length} bytes; the file is damaged, "
            "copy or unpack it again"
        )
    return height, width


def png_data(data: bytes) -> list[memoryview]:
    """The IDAT chunks of a PNG file; ValueError unless all chunks up to IEND are complete and match their checksums."""
    view, start, parts = memoryview(data), len(PNG_SIGNATURE), []
    while start + 12 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, start)
        end = start + 8 + length
        if end + 4 > len(view):
            raise ValueError(f"a chunk claims {length} bytes, {len(view) - start - 12} are left")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("a chunk's checksum does not match")
        if kind == b"IDAT":
            parts.append(view[start + 8 : end])
        elif kind == b"IEND":
            return parts
        start = end + 4
    raise ValueError("its end is missing")


def inflate(parts: Iterable[bytes | memoryview], size: int) -> bytes:
    """Decompress a zlib stream of exactly `size` bytes, using no more memory than that.

    Raises ValueError or zlib.error if it is damaged or of another size.
    """
    inflater, found, pieces = zlib.decompressobj(), 0, []
    for part in parts:
        # The limit is one byte beyond the expected size, to detect excess data; a limit of 0 would mean none.
        pieces.append(inflater.decompress(part, size + 1 - found))
        found += len(pieces[-1])
        if found > size:
            raise ValueError("it contains too many rows")
    if found < size or not inflater.eof:
        raise ValueError("its data is truncated")
    return b"".join(pieces)


def make_png(rows: bytes, height: int, width: int) -> bytes:
    """A 16-bit RGB PNG file of these filtered rows, stored without compression."""
    fields = PNG_IHDR.pack(width, height, 16, PNG_RGB, 0, 0, 0)
    chunks = [(b"IHDR", fields), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    parts = [PNG_SIGNATURE]
    for kind, body in chunks:
        crc = zlib.crc32(body, zlib.crc32(kind))
        parts += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", crc)]
    return b"".join(parts)


def write_kitti_png(path: StrPath, flow: np.ndarray) -> None:
    """Write float32 (H, W, 2) as a KITTI flow .png; unknown flow becomes invalid pixels.

    The format rounds to 1/64 px and clips to -512 and 511.98 px.
    """
    check_array(flow)
    valid = find_known(flow)
    values = np.clip(np.rint(64 * np.where(valid[..., None], flow, 0)) + 2**15, 0, 2**16 - 1)
    # OpenCV orders channels as blue, green, red.
    pixels = np.dstack([valid, values[..., 1], values[..., 0]]) * valid[..., None]
    written, data = cv2.imencode(".png", pixels.astype(np.uint16))
    assert written
    write_bytes(path, data.tobytes())


# --- .flo5: Spring --------------------------------------------------------------------------------


def parse_flo5(data: bytes, name: StrPath) -> np.ndarray:
    """Parse the bytes of a .flo5 file: float32 (H, W, 2), NaN where the flow is unknown.

    An HDF5 file with one dataset, "flow". Source: https://spring-benchmark.org and its flow_IO.
    """
    return use_flo5(io.BytesIO(data), len(data), name, lambda flow: read_chunks(flow, data))


def flo5_size(file: BinaryIO, length: int, name: StrPath) -> tuple[int, int]:
    """(H, W) of an open .flo5 file of `length` bytes; UserError if it is not one."""
    return use_flo5(file, length, name, lambda flow: (flow.shape[0], flow.shape[1]))


def use_flo5(file: BinaryIO, length: int, name: StrPath, use: "Callable[[h5py.Dataset], Result]") -> Result:
    """Call `use` on the dataset "flow" of an open HDF5 file; UserError if there is none."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{name}: reading HDF5 files requires h5py; install it with `pip install h5py`") from None
    try:
        with h5py.File(file, "r") as opened:
            flow = opened["flow"]
            if not isinstance(flow, h5py.Dataset):
                raise ValueError("'flow' is not a dataset")
            found = f"{flow.dtype} {flow.shape}"
            sound = flow.dtype == np.float32 and flow.ndim == 3 and flow.shape[2] == 2 and flow.size
            # A chunk is decompressed as a whole, however little of it belongs to the dataset.
            values = max(flow.size, np.prod(flow.chunks or 0, dtype=float))
            if sound and 4 * values <= MAX_EXPANSION * length and values <= 2 * MAX_PIXELS:
                # HDF5 follows links into any other file.
                if not isinstance(opened.get("flow", getlink=True), h5py.HardLink) or flow.is_virtual:
                    raise ValueError("its data is in another file")
                return use(flow)
    except Exception as error:  # h5py raises a dozen types of exceptions for damaged files
        raise UserError(f"{name}: not a readable .flo5 file ({one_line(error)}); copy or unpack it again") from None
    raise UserError(f"{name}: contains {found}, expected float32 (H, W, 2) of a size that fits in {length} bytes")


def read_chunks(flow: "h5py.Dataset", data: bytes) -> np.ndarray:
    """Read an h5py dataset, float32 (H, W, 2), from the bytes of its file.

    HDF5 only locates the data: its own reader may open other files, load plugins, and crash on damaged files. Raises
    ValueError or zlib.error.
    """
    import h5py

    created = flow.id.get_create_plist()
    filters = [created.get_filter(i)[0] for i in range(created.get_nfilters())]
    if flow.external or not set(filters) <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}:
        raise ValueError("its data is in another file or not compressed by deflate")
    if not flow.chunks:
        offset = flow.id.get_offset()
        if offset is None or created.get_layout() != h5py.h5d.CONTIGUOUS:
            raise ValueError("its data is missing")
        return np.frombuffer(data, np.float32, math.prod(flow.shape), offset).reshape(flow.shape)
    values, size = np.zeros(flow.shape, np.float32), 4 * math.prod(flow.chunks)
    starts = [range(0, side, step) for side, step in zip(flow.shape, flow.chunks, strict=True)]
    if math.prod(map(len, starts)) > len(data) // 8:
        raise ValueError("it has more chunks than fit in its bytes")
    for start in itertools.product(*starts):
        found = flow.id.get_chunk_info_by_coord(start)
        if found.byte_offset is None:
            raise ValueError("a chunk is missing")
        chunk = data[found.byte_offset : found.byte_offset + found.size]
        for i, number in reversed(list(enumerate(filters))):
            if found.filter_mask >> i & 1:  # not applied to this chunk
                continue
            if number == h5py.h5z.FILTER_DEFLATE:
                chunk = inflate([chunk], size)
            elif len(chunk) == size:  # the first bytes of all values, then the second bytes, ...
                chunk = np.frombuffer(chunk, np.uint8).reshape(4, -1).T.tobytes()
        block = np.frombuffer(chunk, np.float32).reshape(flow.chunks)
        place = tuple(slice(at, at + step) for at, step in zip(start, flow.chunks, strict=True))
        part = values[place]
        part[:] = block[tuple(map(slice, part.shape))]
    return values


# --- .npy, .npz: TartanAir, VIPER, and many programs ----------------------------------------------


def parse_npy(data: bytes, name: StrPath) -> np.ndarray:
    """Parse the bytes of an .npy file of (H, W, 2) floats: float32 (H, W, 2)."""
    check_shape(npy.parse_header(data[: npy.HEADER_START + npy.MAX_HEADER], name), 3, name)
    return to_float32(npy.parse_array(data, name))


def npy_size(file: BinaryIO, length: int, name: StrPath) -> tuple[int, int]:
    """(H, W) of an open .npy file of `length` bytes; UserError if it contains no flow."""
    return check_shape(npy.read_header(file, length, name), 3, name)


def parse_npz(data: bytes, name: StrPath) -> np.ndarray:
    """Parse the bytes of an .npz file: float32 (H, W, 2).

    It contains either u and v, floats (H, W), as VIPER does, or (H, W, 2) floats as its only array or named flow.
    """
    archive = npy.ArrayArchive(io.BytesIO(data), name)
    names = flow_arrays(archive, name)
    npz_header_size(archive, names, name)
    arrays = [archive.read(array) for array in names]
    return to_float32(np.dstack(arrays) if len(arrays) == 2 else arrays[0])


def npz_size(file: BinaryIO, length: int, name: StrPath) -> tuple[int, int]:
    """(H, W) of an open .npz file; UserError if it contains no flow."""
    archive = npy.ArrayArchive(file, name)
    return npz_header_size(archive, flow_arrays(archive, name), name)


def flow_arrays(archive: npy.ArrayArchive, name: StrPath) -> list[str]:
    """The names of the arrays that hold the flow: two components, or both in one."""
    if {"u", "v"} <= set(archive.arrays):
        return ["u", "v"]
    if "flow" in archive.arrays or len(archive.arrays) == 1:
        return ["flow" if "flow" in archive.arrays else archive.arrays[0]]
    found = one_line(", ".join(archive.arrays)) or "no arrays"
    raise UserError(f"{name}: contains {found}; expected u and v, or one array, or one named flow")


def npz_header_size(archive: npy.ArrayArchive, names: list[str], name: StrPath) -> tuple[int, int]:
    """(H, W) of these arrays; UserError unless they are flow."""
    dimensions = 4 - len(names)
    sizes = [check_shape(archive.read_header(array), dimensions, archive.label(array)) for array in names]
    if sizes[0] != sizes[-1]:
        raise UserError(f"{name}: u is {sizes[0]} and v is {sizes[-1]}; expected the same size")
    return sizes[0]


def check_shape(header: npy.Header, dimensions: int, name: StrPath) -> tuple[int, int]:
    """(H, W) of an array; UserError unless it is floats (H, W, 2), or (H, W) for one component."""
    shape = header.shape
    if header.dtype.kind != "f" or len(shape) != dimensions or shape[2:] not in ((), (2,)):
        expected = "(H, W, 2), right and down" if dimensions == 3 else "(H, W)"
        raise UserError(f"{name}: contains {header.dtype} {shape}, expected floats {expected}; transpose or convert it")
    height, width = shape[:2]
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise UserError(f"{name}: {width}x{height} pixels, expected 1 to {MAX_PIXELS} in total")
    return height, width


def to_float32(array: np.ndarray) -> np.ndarray:
    """A C-contiguous float32 array; values beyond float32 become infinite, which is unknown flow."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


FORMATS: dict[str, tuple[Parser, SizeReader]] = {
    ".flo": (parse_flo, flo_size),
    ".pfm": (parse_pfm, pfm_size),
    ".png": (parse_kitti_png, kitti_png_size),
    ".flo5": (parse_flo5, flo5_size),
    ".npy": (parse_npy, npy_size),
    ".npz": (parse_npz, npz_size),
}
