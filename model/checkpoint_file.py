"""MindSpore's checkpoint format, read here so that a file is checked before it is used.

`mindspore.load_checkpoint` logs damage in lines of its own and accepts whatever protobuf can parse. A checkpoint is a
protobuf message, a sequence of values:

    Checkpoint {value (1): Value {tag (1): name, tensor (2): TensorProto}}
    TensorProto {dims (1): integers, tensor_type (2): text, tensor_content (3): bytes}

A large parameter is several values of one name, and text is UTF-32 of the type "str". At the end, unless it was left
out, come "crc_num" and the CRC-32 of everything before, in ten bytes.
"""

import math
import mmap
import os
import pathlib
import typing
import zlib

import numpy as np

from launch.errors import UserError

TYPES = {
    name: np.dtype(name.lower()).newbyteorder("<")
    for name in (
        "Int8",
        "UInt8",
        "Int16",
        "UInt16",
        "Int32",
        "UInt32",
        "Int64",
        "UInt64",
        "Float16",
        "Float32",
        "Float64",
        "Bool",
    )
}
CRC_MARK, CRC_BYTES = b"crc_num", 10
MAX_VALUES = 10_000
"""Values in a file at most; the trainer's checkpoints have a few hundred."""
MAX_DIMENSIONS, MAX_SIDE = 8, 2**31
CHUNK = 2**24
VARINT, BYTES = 0, 2
"""Protobuf wire types."""
ZIP_MAGIC = b"PK\3\4"
TORCH_MAGIC = (ZIP_MAGIC, b"\x80\2\x8a\x0a")
"""First bytes of a PyTorch file, in the zip format and in the older one."""


class Damaged(Exception):
    """What is wrong with a file; `read_values` makes a UserError of it."""


class Part(typing.NamedTuple):
    """A value of the message."""

    name: str
    kind: str
    shape: tuple[int, ...]
    content: memoryview


def is_torch_file(path: str | pathlib.Path) -> bool:
    """Whether a file begins as PyTorch's do; False if there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in TORCH_MAGIC
    except OSError:
        return False


def read_values(path: str | pathlib.Path, only: str | None = None) -> dict[str, np.ndarray | str]:
    """The values in a checkpoint by name, numbers as arrays.

    Takes no more memory than the file and the values.

    Args:
        path: of the file.
        only: the name of the only value to return; None for all.

    Raises:
        UserError: there is no such file, or it is not a complete MindSpore checkpoint.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise Damaged("it is empty")
            return parse(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), only)
    except Damaged as error:
        raise UserError(f"{path}: damaged or not a MindSpore checkpoint ({error}); use another file") from None


def parse(data: memoryview, only: str | None) -> dict[str, np.ndarray | str]:
    """The values in a checkpoint's bytes, copied; raises Damaged if it has none."""
    if data[:4] in TORCH_MAGIC:
        raise Damaged("it is a PyTorch file, which model/import_torch.py converts")
    end = len(data) - len(CRC_MARK) - CRC_BYTES
    crc = None
    if end >= 0 and data[end : end + len(CRC_MARK)] == CRC_MARK:
        crc = int.from_bytes(data[-CRC_BYTES:], "big")
        data = data[:end]
    by_name: dict[str, list[Part]] = {}
    last = None
    for number, value in enumerate(fields(data, {1: BYTES})):
        if number == MAX_VALUES:
            raise Damaged(f"it has more than {MAX_VALUES} values")
        part = parse_value(as_bytes(value[1]))
        if part.name in by_name and part.name != last:
            raise Damaged(f"it has {part.name[:80]!r} twice")
        by_name.setdefault(part.name, []).append(part)
        last = part.name
    if not by_name:
        raise Damaged("it has no values")
    if crc is not None and crc != checksum(data):
        raise Damaged("its checksum does not match")
    return {name: join(parts) for name, parts in by_name.items() if only in (None, name)}


def parse_value(data: memoryview) -> Part:
    """One value of a checkpoint, whose size is not checked yet."""
    entry = dict(fields(data, {1: BYTES, 2: BYTES}))
    if entry.keys() != {1, 2}:
        raise Damaged("a value has no name or no tensor")
    shape, kind, content = [], None, None
    for number, value in fields(as_bytes(entry[2]), {1: VARINT, 2: BYTES, 3: BYTES}):
        if isinstance(value, int):
            shape.append(value)
        elif number == 2:
            kind = to_text(value, "utf-8")
        else:
            content = value
        if len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_SIDE:
            raise Damaged(f"a tensor has the shape {shape}")
    if kind is None or content is None:
        raise Damaged("a tensor has no type or no content")
    return Part(to_text(as_bytes(entry[1]), "utf-8"), kind, tuple(shape), content)


def join(parts: list[Part]) -> np.ndarray | str:
    """The value that the parts hold together, copied."""
    name, kind, shape, _ = parts[0]
    if any(part[:3] != parts[0][:3] for part in parts):
        raise Damaged(f"{name[:80]!r} has parts of different shapes or types")
    if kind == "str":
        return to_text(b"".join(part.content for part in parts), "utf-32-le").rstrip("\0")
    if kind not in TYPES:
        raise Damaged(f"{name[:80]!r} has the type {kind[:20]!r}, expected one of {', '.join(TYPES)}")
    shape = () if shape == (0,) else shape  # so MindSpore reads it
    size, expected = sum(len(part.content) for part in parts), math.prod(shape) * TYPES[kind].itemsize
    if size != expected:
        raise Damaged(f"{name[:80]!r} has {size} bytes, expected {expected} for {kind} {shape}")
    value = np.empty(shape, TYPES[kind])
    rest = value.reshape(-1).view(np.uint8)
    for part in parts:
        rest[: len(part.content)] = np.frombuffer(part.content, np.uint8)
        rest = rest[len(part.content) :]
    return value


def fields(data: memoryview, known: dict[int, int]) -> typing.Iterator[tuple[int, int | memoryview]]:
    """Iterate over a protobuf message as (field number, integer or bytes).

    Args:
        data: the message.
        known: the wire type of each field that the message may have.
    """
    position = 0
    while position < len(data):
        key, position = varint(data, position)
        number, wire = key >> 3, key & 7
        if known.get(number) != wire:
            raise Damaged(f"it has an unknown field {number} of wire type {wire}")
        value, position = varint(data, position)
        if wire == BYTES:
            if value > len(data) - position:
                raise Damaged("it ends too early")
            position += value
            value = data[position - value : position]
        yield number, value


def as_bytes(value: int | memoryview) -> memoryview:
    """The bytes of a field that `fields` has checked to hold bytes."""
    assert isinstance(value, memoryview)
    return value


def varint(data: memoryview, position: int) -> tuple[int, int]:
    """A non-negative protobuf integer and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        if position == len(data):
            raise Damaged("it ends too early")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise Damaged("it has a number of more than ten bytes")


def to_text(data: memoryview | bytes, encoding: str) -> str:
    """Decode text; raises Damaged if it is not in this encoding."""
    try:
        return str(data, encoding)
    except UnicodeDecodeError:
        raise Damaged("it has a name or text that is not text") from None


def checksum(data: memoryview) -> int:
    """CRC-32, in chunks, so that a signal does not wait for the whole file."""
    crc = 0
    for start in range(0, len(data), CHUNK):
        crc = zlib.crc32(data[start : start + CHUNK], crc)
    return crc
