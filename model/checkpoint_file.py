"""MindSpore's checkpoint format, read here so that what a file says is checked before it is believed.

`mindspore.load_checkpoint` reports a damaged file in log lines of its own and makes of it what protobuf
allows. A checkpoint is a protobuf message of values in a row, each of them

    Checkpoint {value (1): Value {tag (1): name, tensor (2): TensorProto}}
    TensorProto {dims (1): integers, tensor_type (2): text, tensor_content (3): bytes}

where a large parameter is several values of the same name, and text is UTF-32 of the type "str". After
these, unless it was left out, comes "crc_num" and the CRC-32 of all before, in ten bytes.
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
MOST_VALUES = 10_000
"""The trainer's checkpoints have some hundred."""
MOST_DIMENSIONS, LONGEST_SIDE = 8, 2**31
CHUNK = 2**24
VARINT, BYTES = 0, 2
"""Wire types of protobuf."""


class Damaged(Exception):
    """What is wrong with a file, for `read_values` to make a UserError of."""


class Part(typing.NamedTuple):
    """A value of the message: its name, and type, shape and bytes of what it holds."""

    name: str
    kind: str
    shape: tuple[int, ...]
    content: memoryview


def read_values(path: str | pathlib.Path, only: str | None = None) -> dict[str, np.ndarray | str]:
    """The values in a checkpoint by name, those of numbers as arrays.

    Takes no more memory than the file's size and that of the values.

    Args:
        path: of the file.
        only: the name of the one value that is wanted; None for all.

    Raises:
        UserError: no such file, or none that MindSpore wrote whole.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise Damaged("is empty")
            return parse(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), only)
    except Damaged as error:
        raise UserError(f"{path}: damaged or no MindSpore checkpoint ({error}); use another one") from None


def parse(data: memoryview, only: str | None) -> dict[str, np.ndarray | str]:
    """The values in a checkpoint's bytes, copied; Damaged if it has none."""
    if data[:4] in (b"PK\3\4", b"\x80\2\x8a\x0a"):
        raise Damaged("looks like PyTorch's, which model/import_torch.py converts")
    end = len(data) - len(CRC_MARK) - CRC_BYTES
    crc = None
    if end >= 0 and data[end : end + len(CRC_MARK)] == CRC_MARK:
        crc = int.from_bytes(data[-CRC_BYTES:], "big")
        data = data[:end]
    by_name: dict[str, list[Part]] = {}
    last = None
    for number, value in enumerate(fields(data, {1: BYTES})):
        if number == MOST_VALUES:
            raise Damaged(f"has more than {MOST_VALUES} values")
        part = parse_value(value[1])
        if part.name in by_name and part.name != last:
            raise Damaged(f"has {part.name[:80]!r} twice")
        by_name.setdefault(part.name, []).append(part)
        last = part.name
    if not by_name:
        raise Damaged("holds nothing")
    if crc is not None and crc != checksum(data):
        raise Damaged("its checksum is of other bytes")
    return {name: join(parts) for name, parts in by_name.items() if only in (None, name)}


def parse_value(data: memoryview) -> Part:
    """One value of a checkpoint, whose size is not checked yet."""
    found = dict(fields(data, {1: BYTES, 2: BYTES}))
    if found.keys() != {1, 2}:
        raise Damaged("a value has no name or no tensor")
    shape, kind, content = [], None, None
    for number, value in fields(found[2], {1: VARINT, 2: BYTES, 3: BYTES}):
        if number == 1:
            shape.append(value)
        elif number == 2:
            kind = to_text(value, "utf-8")
        else:
            content = value
        if len(shape) > MOST_DIMENSIONS or max(shape, default=0) > LONGEST_SIDE:
            raise Damaged(f"a tensor is of the shape {shape}")
    if kind is None or content is None:
        raise Damaged("a tensor has no type or no content")
    return Part(to_text(found[1], "utf-8"), kind, tuple(shape), content)


def join(parts: list[Part]) -> np.ndarray | str:
    """What the parts of a value hold together, copied."""
    name, kind, shape, _ = parts[0]
    if any(part[:3] != parts[0][:3] for part in parts):
        raise Damaged(f"{name[:80]!r} has parts of several shapes or types")
    if kind == "str":
        return to_text(b"".join(part.content for part in parts), "utf-32-le").rstrip("\0")
    if kind not in TYPES:
        raise Damaged(f"{name[:80]!r} is of the type {kind[:20]!r}, expected one of {', '.join(TYPES)}")
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
        known: the wire type of each field that it may have.
    """
    position = 0
    while position < len(data):
        key, position = varint(data, position)
        number, wire = key >> 3, key & 7
        if known.get(number) != wire:
            raise Damaged(f"an unknown field {number} of type {wire}")
        value, position = varint(data, position)
        if wire == BYTES:
            if value > len(data) - position:
                raise Damaged("ends too early")
            position += value
            value = data[position - value : position]
        yield number, value


def varint(data: memoryview, position: int) -> tuple[int, int]:
    """(a non-negative integer of protobuf, where it ends)."""
    value = 0
    for shift in range(0, 64, 7):
        if position == len(data):
            raise Damaged("ends too early")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise Damaged("a number of more than ten bytes")


def to_text(data: memoryview | bytes, encoding: str) -> str:
    try:
        return str(data, encoding)
    except UnicodeDecodeError:
        raise Damaged("a name or text that is none") from None


def checksum(data: memoryview) -> int:
    """CRC-32, in chunks: a signal need not wait for all of a file."""
    crc = 0
    for start in range(0, len(data), CHUNK):
        crc = zlib.crc32(data[start : start + CHUNK], crc)
    return crc
