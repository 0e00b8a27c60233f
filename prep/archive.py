"""Archives: the files in a .zip, .tar or .tar.gz, read in place as if they were unpacked.

An `ArchivePath` is a file or folder in one or more archives, with the part of pathlib.Path's interface that the
datasets use. The members are listed once, when an archive is opened, and then read at their offsets. Nothing has a
position in the file, so worker processes share what was opened before they were forked.
"""

import bisect
import collections
import io
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from isal import isal_zlib

from launch.errors import UserError, one_line
from prep.formats import MAX_EXPANSION, StrPath

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
OTHER_SUFFIXES = (".bz2", ".tbz2", ".xz", ".txz", ".zst", ".gz", ".7z", ".rar")
"""Archives that cannot be read in place."""

HEAD = 1 << 13
"""Bytes at the beginning of a compressed member that are read without the rest: enough for a header."""
ZIP_LOCAL_HEADER = 30
"""Bytes, followed by the name and the extra field, whose lengths are its last two numbers."""
MAX_TAR_HEADER = 1 << 20
"""Bytes of the longest header in a .tar: longer ones would only fill the memory."""
IGNORED = ["__MACOSX"]
"""Folders that are not part of the data: macOS adds its metadata to each .zip."""


# --- Paths ----------------------------------------------------------------------------------------


class ArchivePath(os.PathLike[str]):
    """A file or folder in archives. As a string, it is the archive's path followed by the path in it."""

    __slots__ = ("_tree", "inner")

    def __init__(self, tree: "Tree", inner: str = "") -> None:
        self._tree = tree
        self.inner = inner
        """The path in the archives; "" for all of them."""

    def __truediv__(self, name: StrPath) -> "ArchivePath":
        inner = posixpath.normpath(posixpath.join(self.inner, os.fspath(name)))  # a user's list may say ./name
        return ArchivePath(self._tree, "" if inner == "." else inner)

    def __fspath__(self) -> str:
        """A path for messages and os.path, which cannot be opened."""
        member = self._tree.files.get(self.inner)
        label = member.archive.path if member else self._tree.label
        return f"{label}/{self.inner}" if self.inner else label

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"ArchivePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArchivePath) and (self._tree, self.inner) == (other._tree, other.inner)

    def __hash__(self) -> int:
        return hash((id(self._tree), self.inner))

    @property
    def name(self) -> str:
        """The last part."""
        return os.path.basename(str(self))

    @property
    def suffix(self) -> str:
        """The suffix of the name, with its dot."""
        return os.path.splitext(self.name)[1]

    def is_dir(self) -> bool:
        return self.inner in self._tree.folders

    def is_file(self) -> bool:
        return self.inner in self._tree.files

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self) -> "Status":
        """Length, and the archive's time of modification."""
        member = self._tree.find(self)
        return Status(member.length, member.archive.modified)

    def open(self) -> BinaryIO:
        """Open the file for reading, unbuffered."""
        return MemberFile(self._tree.find(self))  # type: ignore[return-value]  # RawIOBase is all that BinaryIO needs

    def read_bytes(self) -> bytes:
        """All of the file. Raises UserError if it is damaged."""
        return self._tree.find(self).read()

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """All of the file as text."""
        return self.read_bytes().decode(encoding, errors)


ReleasePath = Path | ArchivePath
"""A file or folder of a dataset's release."""


class Status(NamedTuple):
    """The fields of os.stat_result that are used here."""

    st_size: int
    st_mtime_ns: int


def open_file(path: StrPath) -> BinaryIO:
    """Open a file for reading, wherever it is."""
    return path.open() if isinstance(path, ArchivePath) else open(path, "rb")


def read_file(path: StrPath) -> bytes:
    """All bytes of a file, wherever it is."""
    if isinstance(path, ArchivePath):
        return path.read_bytes()
    with open(path, "rb") as file:
        return file.read()


def file_length(path: StrPath) -> int:
    """Length of a file in bytes, wherever it is."""
    return path.stat().st_size if isinstance(path, ArchivePath) else os.stat(path).st_size


def list_names(folder: ReleasePath) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(folder._tree.list(folder) if isinstance(folder, ArchivePath) else os.listdir(folder))


def list_folders(folder: ReleasePath) -> list[str]:
    """The names of the folders in a folder, sorted."""
    if isinstance(folder, ArchivePath):
        return [name for name in list_names(folder) if (folder / name).is_dir()]
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


# --- Trees ----------------------------------------------------------------------------------------


class Tree:
    """The files and folders of archives, as if these were unpacked into one folder.

    Raises:
        UserError: an archive cannot be read, two files have the same name, or a file is outside of its archive.
    """

    def __init__(self, label: str, paths: list[str]) -> None:
        self.label = label
        self.files: dict[str, ZipMember | TarMember] = {}
        self.folders: dict[str, set[str]] = {"": set()}
        """The names in each folder."""
        for path in paths:
            archive = ZipArchive(path) if path.lower().endswith(".zip") else TarArchive(path)
            for member in archive.members():
                self._add(member)

    def _add(self, member: "ZipMember | TarMember") -> None:
        archive, name = member.archive.path, member.name
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if parts[:1] == IGNORED:
            return
        inner = "/".join(parts)
        if inner in self.files or inner in self.folders:
            raise bad_member(archive, name, "the archive contains this name twice")
        self.files[inner] = member
        while inner:
            folder, _, last = inner.rpartition("/")
            if folder in self.files:
                raise bad_member(archive, name, f"the archive contains {folder} as a file and as a folder")
            if folder in self.folders:
                self.folders[folder].add(last)
                break
            self.folders[folder] = {last}
            inner = folder

    def find(self, path: ArchivePath) -> "ZipMember | TarMember":
        """The file at a path; FileNotFoundError if there is none."""
        if path.inner not in self.files:
            raise FileNotFoundError(2, "No such file in the archive", str(path))
        return self.files[path.inner]

    def list(self, path: ArchivePath) -> set[str]:
        """The names in the folder at a path; FileNotFoundError if there is none."""
        if path.inner not in self.folders:
            raise FileNotFoundError(2, "No such folder in the archive", str(path))
        return self.folders[path.inner]


def is_archive(path: StrPath) -> bool:
    """Whether a path is that of an archive, by its suffix."""
    return os.fspath(path).lower().endswith(SUFFIXES + OTHER_SUFFIXES)


def open_archives(path: Path) -> ArchivePath:
    """Open an archive, or all archives in a folder as if they were unpacked there.

    Raises:
        UserError: one cannot be read in place.
    """
    paths = [str(path / name) for name in list_names(path) if is_archive(name)] if path.is_dir() else [str(path)]
    for archive in paths:
        if archive.lower().endswith(OTHER_SUFFIXES) and not archive.lower().endswith(SUFFIXES):
            raise UserError(
                f"{archive}: only {', '.join(SUFFIXES)} files are read in place; unpack it, or if it is a compressed "
                ".tar, decompress it to a .tar"
            )
    return ArchivePath(Tree(str(path), paths))


class MemberFile(io.RawIOBase):
    """A file in an archive, opened for reading."""

    def __init__(self, member: "ZipMember | TarMember") -> None:
        self._member = member
        self._position = 0
        self._content: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._member.length}[whence]
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        start, end = self._position, min(self._position + len(buffer), self._member.length)
        if start >= end:
            return 0
        if self._content is None and end > HEAD and self._member.is_packed():
            self._content = self._member.read()
        data = self._member.read(start, end - start) if self._content is None else self._content[start:end]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


# --- Zip ------------------------------------------------------------------------------------------


class ZipMember(NamedTuple):
    """A file in a .zip."""

    archive: "ZipArchive"
    name: str
    length: int
    packed: int
    """Length in the archive."""
    offset: int
    """Offset of its local header."""
    crc: int
    deflated: bool

    def is_packed(self) -> bool:
        """Whether reading a part means to decompress all that precedes it."""
        return self.deflated

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes, by default all.

        Raises:
            UserError: it is damaged. Of a part, this may remain unnoticed.
        """
        source = self.archive.source
        header = source.read(self.offset, ZIP_LOCAL_HEADER)
        if header[:4] != b"PK\3\4" or len(header) < ZIP_LOCAL_HEADER:
            raise self._damaged("its header is not in its place")
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        offset = self.offset + ZIP_LOCAL_HEADER + name + extra
        if length is not None and not self.deflated:
            return source.read(offset + start, length)
        try:
            if length is not None and start + length <= HEAD:
                head = source.read(offset, min(self.packed, 2 * HEAD))
                return zlib.decompressobj(-15).decompress(head, start + length)[start:]
            data = source.read(offset, self.packed)
            if self.deflated:
                data = isal_zlib.decompressobj(-15).decompress(data, self.length + 1)
        except (zlib.error, isal_zlib.error) as error:  # type: ignore[misc]  # its stub is wrong
            raise self._damaged(error) from None
        if len(data) != self.length or isal_zlib.crc32(data) != self.crc:
            raise self._damaged("its CRC-32 is wrong" if len(data) == self.length else "it is truncated")
        return data if length is None else data[start : start + length]

    def _damaged(self, reason: str | Exception) -> UserError:
        return damaged(f"{self.archive.path}/{one_line(self.name)}", reason)


class ZipArchive:
    """A .zip. Its central directory is read by zipfile, its members here: without copies, and from several processes.

    Raises:
        UserError: it is damaged or encrypted.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.source = PlainSource(path)
        self.modified = self.source.modified

    def members(self) -> "Iterator[ZipMember]":
        """The files. Raises UserError if the archive is damaged, or for the first that cannot be read."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
        except Exception as error:  # zipfile raises half a dozen types of exceptions for damaged files
            raise damaged(self.path, error) from None
        for info in infos:
            check_name(self.path, info.filename)
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise bad_member(self.path, info.filename, "it is a link or another special file")
            if info.flag_bits & 1:
                raise bad_member(self.path, info.filename, "it is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise bad_member(self.path, info.filename, "it is neither stored nor compressed by deflate")
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            length, packed = info.file_size, info.compress_size
            end = info.header_offset + ZIP_LOCAL_HEADER + packed
            if length > MAX_EXPANSION * (packed + 1) or (length != packed and not deflated) or end > self.source.length:
                raise bad_member(self.path, info.filename, f"it claims {length} bytes from {packed}")
            yield ZipMember(self, info.filename, length, packed, info.header_offset, info.CRC, deflated)


# --- Tar ------------------------------------------------------------------------------------------


class TarMember(NamedTuple):
    """A file in a .tar."""

    archive: "TarArchive"
    name: str
    length: int
    offset: int
    """Offset of its data."""

    def is_packed(self) -> bool:
        """Any part can be read."""
        return False

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        """`length` bytes, by default all. Raises UserError if the archive is damaged or truncated there."""
        length = self.length if length is None else length
        try:
            data = self.archive.source.read(self.offset + start, length)
            if len(data) != length:
                raise EOFError("it is truncated")
        except (EOFError, zlib.error) as error:
            raise damaged(f"{self.archive.path}/{one_line(self.name)}", error) from None
        return data


class TarArchive:
    """A .tar, or a .tar.gz of which any part can be read, but slowly unless the parts are in order.

    Raises:
        UserError: it is damaged or truncated.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.source = PlainSource(path) if path.lower().endswith(".tar") else GzipSource(path)
        self.modified = self.source.modified

    def members(self) -> Iterator[TarMember]:
        """The files. Raises UserError if the archive is damaged, or for the first that cannot be read."""
        try:
            with tarfile.TarFile(fileobj=TarHeaders(self.source)) as archive:
                while info := archive.next():
                    archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte each
                    check_name(self.path, info.name)
                    if info.isdir():
                        continue
                    if not info.isreg() or info.issparse():
                        raise bad_member(self.path, info.name, "it is a link or another special file")
                    if info.size < 0:
                        raise bad_member(self.path, info.name, f"it claims {info.size} bytes")
                    yield TarMember(self, info.name, info.size, info.offset_data)
                # A damaged header or a missing end looks like the end to tarfile.
                if self.source.read(archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise damaged(self.path, f"it is truncated, or the header at byte {archive.offset} is damaged")
                self.source.check_end()
        except (OSError, UserError):
            raise
        except Exception as error:  # tarfile raises half a dozen types of exceptions for damaged files
            raise damaged(self.path, error) from None


class TarHeaders(io.RawIOBase):
    """A source as the file object that tarfile expects, which refuses to read more than headers."""

    def __init__(self, source: "PlainSource | GzipSource") -> None:
        self._source = source
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_TAR_HEADER:
            raise ValueError(f"a header claims {size} bytes")
        data = self._source.read(self._position, size)
        self._position += len(data)
        return data


class PlainSource:
    """The bytes of a file, by their offset."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  # as long as the process needs it
        status = os.fstat(self._file.fileno())
        self.length, self.modified = status.st_size, status.st_mtime_ns

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes; fewer at the end of the file, and none outside of it."""
        return os.pread(self._file.fileno(), length, offset) if 0 <= offset < self.length else b""

    def check_end(self) -> None:
        """Nothing to check."""


class GzipSource:
    """The bytes of a decompressed .gz file, by their offset.

    Deflate can only be decompressed from the start. So the state of decompression is kept at regular intervals, at most
    MAX_STATES of about 60 kB each, and reading begins at the nearest one.
    """

    BLOCK = 1 << 18
    """Bytes decompressed at a time."""
    MAX_STATES = 1 << 10
    SPACING = 1 << 22
    """Bytes between two states, at first; doubled when there are too many."""
    CURSORS = 8
    """Places at which reading goes on without starting at a state; a pair's files are often in different folders."""

    def __init__(self, path: str) -> None:
        self._packed = PlainSource(path)
        self.modified = self._packed.modified
        self._spacing = self.SPACING
        self._states = [GzipCursor(self._packed)]
        self._cursors: collections.deque[GzipCursor] = collections.deque(maxlen=self.CURSORS)

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes; fewer at the end. Raises zlib.error or EOFError if the file is damaged."""
        cursor = self._find(offset)
        parts = []
        while length > 0:
            if offset < cursor.begin + len(cursor.block):
                at = offset - cursor.begin
                parts.append(cursor.block[at : at + length])
                offset, length = offset + len(parts[-1]), length - len(parts[-1])
            elif not self._advance(cursor):
                break
        return b"".join(parts)

    def check_end(self) -> None:
        """Decompress the rest, which checks its length and CRC-32."""
        cursor = self._find(self._states[-1].begin)
        while self._advance(cursor):
            pass

    def _find(self, offset: int) -> "GzipCursor":
        """The cursor or state from which the least has to be decompressed, as the latest cursor."""
        state = self._states[bisect.bisect_right(self._states, offset, key=lambda state: state.begin) - 1]
        best = max((c for c in self._cursors if c.begin <= offset), key=lambda cursor: cursor.begin, default=state)
        if best.begin <= state.begin:
            best = state.copy()
        else:
            self._cursors.remove(best)
        self._cursors.append(best)
        return best

    def _advance(self, cursor: "GzipCursor") -> bool:
        if not cursor.advance(self.BLOCK):
            return False
        if cursor.begin + len(cursor.block) >= self._states[-1].begin + self._spacing:
            self._states.append(cursor.copy())
            if len(self._states) > self.MAX_STATES:
                del self._states[1::2]
                self._spacing *= 2
        return True


class GzipCursor:
    """A place in a decompressed .gz file: a block of its bytes, and the state that yields the next one."""

    def __init__(self, packed: PlainSource) -> None:
        self._packed = packed
        self._offset = 0
        self._inflater = zlib.decompressobj(31)
        self.begin = 0
        """Offset of the block."""
        self.block = b""

    def copy(self) -> "GzipCursor":
        """A cursor at the end of the block, with an empty one, which takes less memory."""
        copy = GzipCursor(self._packed)
        copy._offset, copy._inflater = self._offset, self._inflater.copy()
        copy.begin = self.begin + len(self.block)
        return copy

    def advance(self, size: int) -> bool:
        """Go to the next block, of at most `size` bytes; False at the end."""
        self.begin += len(self.block)
        self.block = b""
        while not self.block:
            if self._inflater.eof:  # gzip files may be concatenated, and padded with zeros
                rest = self._inflater.unused_data or self._read()
                if not rest.strip(b"\0"):
                    return False
                self._inflater = zlib.decompressobj(31)
            else:
                rest = self._inflater.unconsumed_tail or self._read()
            self.block = self._inflater.decompress(rest, size)
            if not (rest or self.block or self._inflater.eof):
                raise EOFError("it is truncated")
        return True

    def _read(self) -> bytes:
        data = self._packed.read(self._offset, 1 << 14)
        self._offset += len(data)
        return data


# --- Errors ---------------------------------------------------------------------------------------


def check_name(archive: str, name: str) -> None:
    """Raise UserError if a member would be unpacked outside of the folder that its archive is unpacked into."""
    if name.startswith("/") or ".." in name.split("/"):
        raise bad_member(archive, name, "its path leads out of the archive")
    if not name:
        raise bad_member(archive, name, "it has no name")


def bad_member(archive: str, name: str, reason: str) -> UserError:
    """The UserError for a file that an archive of a dataset should not contain."""
    return UserError(f"{archive}: cannot read its member {one_line(name)}: {reason}; unpack it, and pack it again")


def damaged(path: str, reason: str | Exception) -> UserError:
    """The UserError for an archive or a file in it that is damaged."""
    return UserError(f"{path}: damaged ({one_line(reason)}); download or copy the archive again")
