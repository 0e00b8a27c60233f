"""GPU code inside CUDA libraries: which architectures it is for, and how to blank what a GPU never runs.

A CUDA library holds the same kernels once for each GPU architecture, and as PTX that the driver can compile for newer
ones. They are kept in fat binaries: a header (magic number, version, header size, payload size) followed by entries
(kind, header size, payload size, architecture). NVIDIA does not document the format; `cuobjdump --list-elf` shows the
same entries. Blanked code stays at its place, so nothing else in the library changes, and compresses to nothing.
"""

import dataclasses
import struct
from collections.abc import Iterable, Iterator

HEADER = struct.Struct("<IHHQ")
"""Magic number, version, header size, bytes that follow."""
ENTRY = struct.Struct("<HHIQIIHHI")
"""Kind, version, header size, payload bytes, compressed bytes, ..., architecture as the last."""
MAGIC = 0xBA55ED50
PTX, CUBIN = 1, 2


@dataclasses.dataclass(frozen=True)
class Entry:
    """One piece of GPU code."""

    kind: int
    """PTX or CUBIN."""
    architecture: int
    """For example 90 for compute capability 9.0."""
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
        entries.append(Entry(kind, architecture, start, payload))
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
