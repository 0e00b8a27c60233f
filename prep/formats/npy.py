"""NumPy's array files: .npy (one array) and .npz (a zip file of them), without pickle.

NumPy's own reader evaluates the header as Python and allocates what it claims. Source of the format:
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import math
import os
import re
import zipfile
from typing import BinaryIO, NamedTuple

import numpy as np

from launch.errors import UserError, one_line
from prep.formats import MAX_EXPANSION, MAX_PIXELS, StrPath

# The magic string, the version and the length of the header, which is a Python dict as text.
MAGIC = b"\x93NUMPY"
DESCR = re.compile(rb"['\"]descr['\"]\s*:\s*['\"]([<>|=]?)([a-zA-Z])(\d{1,2})['\"]")
ORDER = re.compile(rb"['\"]fortran_order['\"]\s*:\s*(True|False)")
SHAPE = re.compile(rb"['\"]shape['\"]\s*:\s*\(([\d\s,]{0,100})\)")
KINDS = {b"f": (2, 4, 8), b"u": (1,), b"b": (1,)}
"""The supported types, with their sizes in bytes: floats, uint8 and bool."""
HEADER_START = 12
"""Bytes that precede the header's text, at most."""
MAX_HEADER = 1 << 12
"""Bytes of the longest header; NumPy writes 118 for such arrays."""


class Header(NamedTuple):
    """What an .npy file says about its array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    length: int
    """Length of the header in bytes."""


def parse_header(start: bytes, name: StrPath) -> Header:
    """Parse the first bytes of an .npy file, at most `HEADER_START` + `MAX_HEADER`; `name` is for errors.

    Raises:
        UserError: it is damaged, too large, or its type is not one of `KINDS`.
    """
    if start[:6] != MAGIC or len(start) < HEADER_START or start[6] not in (1, 2, 3):
        raise UserError(f"{name}: begins with {start[:8]!r}, expected a NumPy array, which begins with {MAGIC!r}")
    begin = 10 if start[6] == 1 else 12
    end = begin + int.from_bytes(start[8:begin], "little")
    text = start[begin:end]
    descr, order, shape = DESCR.search(text), ORDER.search(text), SHAPE.search(text)
    if end > len(start) or not (descr and order and shape):
        raise UserError(f"{name}: its NumPy header is damaged or of no plain array; save it again with numpy.save")
    kind, size = descr[2], int(descr[3])
    if size not in KINDS.get(kind, ()):
        raise UserError(
            f"{name}: an array of type {descr[0].decode().partition(':')[2].strip()}; expected floats, uint8 or bool"
        )
    dtype = np.dtype(f"{descr[1].decode() if size > 1 else '|'}{kind.decode()}{size}")
    return Header(dtype, tuple(map(int, re.findall(rb"\d+", shape[1]))), order[1] == b"True", end)


def read_header(file: BinaryIO, length: int, name: StrPath) -> Header:
    """Read the header of an open .npy file of `length` bytes; UserError if it does not fit that length."""
    header = parse_header(file.read(HEADER_START + MAX_HEADER), name)
    _check_length(header, length, name)
    return header


def parse_array(data: bytes, name: StrPath) -> np.ndarray:
    """Parse the bytes of an .npy file: a read-only view of `data`. Raises UserError if it is damaged."""
    header = parse_header(data[: HEADER_START + MAX_HEADER], name)
    _check_length(header, len(data), name)
    array = np.frombuffer(data, header.dtype, offset=header.length)
    return array.reshape(header.shape, order="F" if header.fortran_order else "C")


def _check_length(header: Header, length: int, name: StrPath) -> None:
    expected = header.length + header.dtype.itemsize * math.prod(header.shape)
    if length != expected:
        raise UserError(
            f"{name}: {length} bytes, expected {expected} for an array {header.shape}; the file is damaged, copy or "
            "unpack it again"
        )


class ArrayArchive:
    """An opened .npz file.

    Raises:
        UserError: it is damaged, encrypted, or an array is larger than any flow.
    """

    def __init__(self, file: BinaryIO, name: StrPath) -> None:
        self._name = name
        try:
            self._zip = zipfile.ZipFile(file)
            self._members = {member.filename.removesuffix(".npy"): member for member in self._zip.infolist()}
        except Exception as error:  # zipfile raises half a dozen types of exceptions for damaged files
            raise self._unreadable(error) from None
        self.arrays = sorted(self._members)
        """The names of the arrays."""

    def read(self, array: str) -> np.ndarray:
        """Read an array by its name."""
        return parse_array(self._read(array, None), self.label(array))

    def read_header(self, array: str) -> Header:
        """Read the type and size of an array."""
        header = parse_header(self._read(array, HEADER_START + MAX_HEADER), self.label(array))
        _check_length(header, self._members[array].file_size, self.label(array))
        return header

    def label(self, array: str) -> str:
        """An array's name for errors."""
        return f"{os.fspath(self._name)}: {one_line(array)}"

    def _read(self, array: str, length: int | None) -> bytes:
        """The first `length` bytes of an array's file, or all."""
        member = self._members[array]
        try:
            if member.flag_bits & 1:
                raise ValueError("it is encrypted")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("it is not compressed by deflate")
            if member.file_size > min(MAX_EXPANSION * (member.compress_size + 1), 16 * MAX_PIXELS + MAX_HEADER):
                raise ValueError(f"it claims {member.file_size} bytes")
            with self._zip.open(member) as opened:
                return opened.read() if length is None else opened.read(length)
        except Exception as error:  # as above
            raise self._unreadable(error, array) from None

    def _unreadable(self, error: Exception, array: str | None = None) -> UserError:
        where = f"array {one_line(array)} of this" if array else "this"
        return UserError(
            f"{self._name}: cannot read {where} .npz file ({one_line(error)}); copy it again or save it again with "
            "numpy.savez"
        )
