"""GPU code inside CUDA libraries: which architectures it is for, and how to blank what a GPU never runs.

A CUDA library holds the same kernels once for each GPU architecture, and as PTX that the driver can compile for newer
ones. They are kept in fat binaries: a header (magic number, version, header size, payload size) followed by entries
(kind, header size, payload size, architecture). NVIDIA does not document the format; `cuobjdump --list-elf` shows the
same entries. Blanked code stays at its place, so nothing else in the library changes, and compresses to nothing.

A driver compiles PTX when the library is loaded, which takes minutes for libraries with hundreds of kernels.
`compile_ptx` puts machine code in its place beforehand.
"""

import concurrent.futures
import dataclasses
import importlib
import os
import pathlib
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator

HEADER = struct.Struct("<IHHQ")
"""Magic number, version, header size, bytes that follow."""
ENTRY = struct.Struct("<HHIQIIHHI")
"""Kind, version, header size, payload bytes, compressed bytes, ..., architecture as the last."""
MAGIC = 0xBA55ED50
PTX, CUBIN = 1, 2
DETAILS = struct.Struct("<QQQQ")
"""Fields after `ENTRY` in an entry's header: name, flags, ..., bytes when decompressed."""
LZ4 = 0x2000
"""Flag of compressed code."""
CUBIN_VERSION = (7, 1)
"""Version in the `ENTRY` of machine code that CUDA 11 compiled."""
CUBIN_FLAGS = 0x11
"""Flags in that entry: 64 bits, Linux."""
ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Entry:
    """One piece of GPU code."""

    kind: int
    """PTX or CUBIN."""
    architecture: int
    """Ten times the compute capability: 90 for 9.0."""
    header: int
    """Offset of the entry in the file."""
    start: int
    """Offset of the payload in the file."""
    size: int
    """Bytes of the payload."""


def fat_binaries(data: bytes | bytearray) -> Iterator[list[Entry]]:
    """Yield the entries of each fat binary in a library; what does not parse as one is skipped."""
    magic = MAGIC.to_bytes(4, "little")
    position = data.find(magic)
    while position >= 0:
        entries = read_entries(data, position)
        if entries:
            yield entries
            position = entries[-1].start + entries[-1].size
        else:
            position += len(magic)
        position = data.find(magic, position)


def read_entries(data: bytes | bytearray, position: int) -> list[Entry]:
    """The entries of the fat binary at an offset; none if there is no well-formed one."""
    if position + HEADER.size > len(data):
        return []
    _, version, header_size, size = HEADER.unpack_from(data, position)
    end = position + header_size + size
    if version != 1 or header_size != HEADER.size or end > len(data):
        return []
    entries, position = [], position + header_size
    while position < end:
        if position + ENTRY.size > end:
            return []
        kind, _, entry_header, payload, *_, architecture = ENTRY.unpack_from(data, position)
        start = position + entry_header
        if kind not in (PTX, CUBIN) or entry_header < ENTRY.size or start + payload > end:
            return []
        entries.append(Entry(kind, architecture, position, start, payload))
        position = start + payload
    return entries


def needed(entries: list[Entry], architectures: Iterable[int]) -> set[tuple[int, int]]:
    """(kind, architecture) of the code that GPUs of these architectures load from one fat binary.

    A GPU runs the newest machine code of its own major version that is not newer than itself. If there is none, the
    driver compiles the newest PTX that is not newer (CUDA C++ Programming Guide, "Application Compatibility").
    """
    kept = set()
    for target in architectures:
        for kind in (CUBIN, PTX):
            usable = [
                entry.architecture
                for entry in entries
                if entry.kind == kind
                and entry.architecture <= target
                and (kind == PTX or entry.architecture // 10 == target // 10)
            ]
            if usable:
                kept.add((kind, max(usable)))
                break
    return kept


def blank_unused(data: bytearray, architectures: Iterable[int]) -> int:
    """Overwrite the code that GPUs of these architectures never load by zeros; returns how many bytes that were."""
    architectures = tuple(architectures)
    blanked = 0
    for entries in fat_binaries(data):
        kept = needed(entries, architectures)
        for entry in entries:
            if (entry.kind, entry.architecture) not in kept:
                data[entry.start : entry.start + entry.size] = bytes(entry.size)
                blanked += entry.size
    return blanked


def compile_ptx(data: bytearray, architectures: Iterable[int], ptxas: pathlib.Path) -> int:
    """Replace PTX that GPUs of these architectures would compile by machine code, in place.

    Code for other architectures gives way to it. PTX stays if it is to be linked with other PTX, if it is compressed by
    a method other than LZ4, if `ptxas` does not know the architecture, or if there is no room.

    Args:
        ptxas: NVIDIA's assembler.

    Returns:
        how many fat binaries were changed.
    """
    architectures = tuple(architectures)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(entries: list[Entry]) -> bytes | None:
            return compiled_entries(data, entries, architectures, ptxas, pathlib.Path(folder))

        found = list(fat_binaries(data))
        changed = 0
        for entries, body in zip(found, pool.map(compile_one, found), strict=True):
            room = entries[-1].start + entries[-1].size - entries[0].header
            if body is None or len(body) > room:
                continue
            start = entries[0].header - HEADER.size
            data[start : entries[0].header + room] = (
                HEADER.pack(MAGIC, 1, HEADER.size, len(body)) + body + bytes(room - len(body))
            )
            changed += 1
    return changed


def compiled_entries(
    data: bytearray, entries: list[Entry], architectures: tuple[int, ...], ptxas: pathlib.Path, folder: pathlib.Path
) -> bytes | None:
    """The entries of a fat binary with machine code instead of PTX; None if there is nothing to compile."""
    if not any(kind == PTX for kind, _ in needed(entries, architectures)):
        return None
    parts: dict[int, bytes] = {}  # by architecture
    for target in architectures:
        for kind, architecture in needed(entries, [target]):
            entry = next(entry for entry in entries if (entry.kind, entry.architecture) == (kind, architecture))
            if kind == CUBIN:
                parts[architecture] = bytes(data[entry.header : entry.start + entry.size])
                continue
            text = plain_ptx(data, entry)
            code = text and run_ptxas(ptxas, text, target, folder / str(entry.start))
            if not code:
                return None
            code += bytes(-len(code) % ALIGNMENT)
            header = ENTRY.pack(CUBIN, 0x101, ENTRY.size + DETAILS.size, len(code), 0, 0, *CUBIN_VERSION, target)
            parts[target] = header + DETAILS.pack(0, CUBIN_FLAGS, 0, 0) + code
    return b"".join(parts.values())


def plain_ptx(data: bytearray, entry: Entry) -> bytes | None:
    """The text of an entry of PTX; None if it is to be linked, or compressed by an unknown method."""
    if entry.start - entry.header != ENTRY.size + DETAILS.size + 8:
        return None  # has options for the compiler
    compressed = ENTRY.unpack_from(data, entry.header)[4]
    _, flags, _, size = DETAILS.unpack_from(data, entry.header + ENTRY.size)
    if not flags & LZ4:
        return None
    lz4 = importlib.import_module("lz4.block")  # which only machines that collect bundles need
    return lz4.decompress(data[entry.start : entry.start + compressed], uncompressed_size=size).rstrip(b"\0")


def run_ptxas(ptxas: pathlib.Path, text: bytes, architecture: int, path: pathlib.Path) -> bytes | None:
    """Compile PTX to machine code, with files beside `path`; None if `ptxas` cannot."""
    source, result = path.with_suffix(".ptx"), path.with_suffix(f".{architecture}")
    source.write_bytes(text)
    command = [ptxas, f"-arch=sm_{architecture}", "-m64", source, "-o", result]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    return result.read_bytes()
