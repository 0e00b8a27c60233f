"""Shards and manifest: what a converted set is on disk, and how it is written.

A set is a folder with MindRecord shards (each with the .db index that MindSpore reads beside it)
and manifest.json, which names every shard with its bytes, hashes and pairs. A record is one pair:
its name, and packed in one column the payloads (prep/codec.py) of FIELDS.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sqlite3
import urllib.parse
from typing import Annotated, TypedDict

import numpy as np

from launch.errors import UserError, one_line
from launch.files import sync, write_json
from prep import codec, schema
from prep.datasets import read_pair

SCHEMA_VERSION = 1
# The payloads of a pair in a record's order: the numpy type and the channels of each.
FIELDS = {
    "image1": (np.uint8, 3),
    "image2": (np.uint8, 3),
    "flow": (np.float32, 2),
    "valid": (np.uint8, 1),
    "occluded": (np.uint8, 1),
}
PIXEL_BYTES = 16  # of a pair, no less than all of its fields take uncompressed
# One column for all: of several, MindRecord stores the lengths among the data and reads them back
# unchecked, so that one flipped bit there ends the process (segmentation fault).
SCHEMA = {"name": {"type": "string"}, "pair": {"type": "bytes"}}
MANIFEST = "manifest.json"
MAX_PAGE = 1 << 28  # bytes

# What manifest.json may hold (prep/schema.py checks it against these): a set may come from anyone,
# and its hashes prove only that it is whole. Control characters could rewrite a terminal, and lone
# surrogates, which Python makes of bytes that are not UTF-8, can't be written.
Count = Annotated[int, schema.Whole(1, 2**53)]
Version = Annotated[int, schema.Whole(1, 2**31)]
TEXT = schema.Text(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,10000}", "text without control characters")
Words = Annotated[str, TEXT]
Sha256 = Annotated[str, schema.Text("[0-9a-f]{64}", "a SHA-256 as 64 hexadecimal digits")]
ShardFile = Annotated[str, schema.Text(r"[A-Za-z0-9_-]{1,200}\.mindrecord", "a plain file name as train.mindrecord")]


class Validation(TypedDict):
    """The split file's name and SHA-256; None if the data set itself holds pairs out."""

    file: Words | None
    sha256: Sha256 | None


class Made(TypedDict):
    """How a set was made: the command, what it was to write (prep/convert.py), packages."""

    command: Words
    plan: dict
    versions: dict[Words, Words]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard: sizes and SHA-256 of its file, of the header there and of its .db index; its
    pairs.

    names are in the records' order, sizes are runs of it: (number of pairs, height, width).
    ValueError if they are not as many, or of pairs larger than the file can be of.
    """

    file: ShardFile
    bytes: Count
    sha256: Sha256
    header_bytes: Count
    header_sha256: Sha256
    index_bytes: Count
    index_sha256: Sha256
    names: list[Words]
    sizes: list[tuple[Count, Count, Count]]

    def __post_init__(self):
        if sum(number for number, _, _ in self.sizes) != len(self.names):
            raise ValueError("the numbers of names and sizes differ")
        if self.header_bytes > self.bytes:
            raise ValueError("its header is longer than its file")
        # A shard has one page for records at least, with room for four pairs uncompressed or of
        # MAX_PAGE bytes (Layout), which is a quarter of the largest pair.
        for _, height, width in self.sizes:
            if PIXEL_BYTES * height * width > 4 * self.bytes:
                raise ValueError(f"its {self.bytes} bytes can't hold a pair of {width}x{height}")

    def check_files(self, folder) -> None:
        """UserError unless the shard and its index are in `folder` with the right sizes."""
        for file, expected in ((self.file, self.bytes), (self.file + ".db", self.index_bytes)):
            path = os.path.join(folder, file)
            try:
                found = os.path.getsize(path)
            except FileNotFoundError:
                raise UserError(
                    f"{path}: not there, but the set's manifest names it; restore it from a copy "
                    "(a shard must keep its name) or convert the set again"
                ) from None
            if found != expected:
                raise UserError(
                    f"{path}: {found} bytes, expected {expected} as the set's manifest says; "
                    "restore it from a copy or convert the set again"
                )

    def check_structure(self, folder) -> None:
        """UserError unless the sizes fit and header and index are what was written.

        MindSpore trusts both: a wrong byte there could end the process. It takes milliseconds; the
        rest of the shard is records, whose payloads are checked when they are decoded.
        """
        self.check_files(folder)
        check_hash(os.path.join(folder, self.file), self.header_bytes, self.header_sha256)
        check_hash(os.path.join(folder, self.file + ".db"), self.index_bytes, self.index_sha256)
        self.locate(folder)

    def check_bytes(self, folder) -> None:
        """UserError unless every byte of the shard and its index is as written (reads it all)."""
        self.check_structure(folder)
        check_hash(os.path.join(folder, self.file), self.bytes, self.sha256)

    def records(self, folder, indices=None):
        """Yield (offset in the file, record as bytes) of the pairs at `indices` (default: all, in
        order).

        Only for a shard that `check_structure` has passed. It does without MindSpore, which starts
        in seconds and gives up a whole shard for one wrong byte among the names; this reads all the
        others.
        """
        rows = self.locate(folder)
        with open(os.path.join(folder, self.file), "rb") as file:
            for offset, length in rows if indices is None else [rows[i] for i in indices]:
                file.seek(offset)
                yield offset, file.read(length)

    def locate(self, folder) -> list[tuple[int, int]]:
        """(offset, length) of each record in the shard's file, in order, as its index has them.

        UserError unless header and index are such as MindRecord writes, and all that they point to
        is inside the file. No more is read than the manifest justifies.
        """
        path = os.path.join(folder, self.file)
        try:
            # A MindRecord file: the header's length (uint64), the header as JSON, then from
            # header_bytes on the pages. The index has each row's page and place in it, for the name
            # (RAW) and for the record (BLOB), which begins with its length (uint64), which nobody
            # reads, as the index has it too.
            with open(path, "rb") as file:
                start = file.read(self.header_bytes)
            header = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
            page_size = schema.read(Count, header["page_size"], "page_size")
            if header["shard_addresses"] != [self.file]:
                raise ValueError("the header is another shard's")
            rows, places = self._read_index(path + ".db"), []
            for row, *values in rows:
                if row != len(places) or not all(type(v) is int and v >= 0 for v in values):
                    raise ValueError(f"row {len(places)} of the index is not one")
                for page, begin, end, shortest in (values[:3] + [0], values[3:] + [8]):
                    offset = self.header_bytes + page * page_size + begin
                    if end - begin < shortest or offset + end - begin > self.bytes:
                        raise ValueError(f"row {row} of the index points beyond the file")
                places.append((offset + 8, end - begin - 8))
            if len(places) != len(self.names):
                raise ValueError(f"the index has {len(places)} rows")
        except (ValueError, KeyError, TypeError, RecursionError, sqlite3.Error) as error:
            raise UserError(
                f"{path}: not a shard of {len(self.names)} pairs ({type(error).__name__}: "
                f"{one_line(error)}); restore it from a copy or convert the set again"
            ) from None
        return places

    def _read_index(self, path) -> list[tuple]:
        """The index's rows by number: (row, page, begin and end of the name, the same of the
        record), at most one more than there are names."""
        columns = "ROW_ID, " + ", ".join(
            f"PAGE_ID_{kind}, PAGE_OFFSET_{kind}, PAGE_OFFSET_{kind}_END" for kind in ("RAW", "BLOB")
        )
        uri = f"file:{urllib.parse.quote(os.path.abspath(path))}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as index:
            # A view or a computed column could have any amount of work behind it.
            kinds = index.execute("SELECT type FROM sqlite_master WHERE name = 'INDEXES'").fetchall()
            hidden = [column[6] for column in index.execute("PRAGMA table_xinfo(INDEXES)")]
            if kinds != [("table",)] or any(hidden):
                raise ValueError("its index is not a plain table")
            index.set_progress_handler(lambda: 1, 10_000 + 100 * len(self.names))  # 1 ends it
            rows = index.execute(f"SELECT {columns} FROM INDEXES")
            return sorted(rows.fetchmany(len(self.names) + 1), key=lambda row: row[0])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted set holds and how it was made.

    shards: by file name; splits: for each split its shards' file names in order, so a shard may be
    in several (Sintel's val-clean is a part of val); validation: the split file's name and SHA-256,
    None if the data set itself holds pairs out. The file ends with a SHA-256 of all else in it.
    """

    dataset: Words
    schema_version: Version
    splits: dict[Words, list[ShardFile]]
    shards: dict[ShardFile, Shard]
    validation: Validation
    made: Made

    def __post_init__(self):
        for name, files in self.splits.items():
            if len(set(files)) != len(files) or not self.shards.keys() >= set(files):
                raise ValueError(f"split {name} has a shard twice or one that is not there")

    @classmethod
    def load(cls, folder):
        """Read a set's manifest. UserError if there is none, or it is newer or damaged."""
        path = os.path.join(folder, MANIFEST)
        if not os.path.isfile(path):
            unfinished = os.path.isdir(f"{os.path.normpath(folder)}.partial")
            raise UserError(
                f"{path}: not there; expected a folder written by prep/convert.py"
                + (", whose last run was cut short: run it again" if unfinished else "")
            )
        try:
            with open(path, encoding="utf-8") as file:
                fields = schema.read(dict, json.load(file))
            version = schema.read(Version, fields.get("schema_version"), "schema_version")
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"{path}: schema version {version}, this toolkit knows up to {SCHEMA_VERSION}; "
                    "update the toolkit or convert the set with this one"
                )
            if fields.pop("sha256", None) != hash_fields(fields):
                raise ValueError("its SHA-256 is not the one in it")
            shards = schema.read(list[Shard], fields.get("shards"), "shards")
            by_file = {shard.file: shard for shard in shards}
            if len(by_file) != len(shards):
                raise ValueError("two of its shards have one name")
            return schema.read(cls, {**fields, "shards": by_file})
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: damaged ({type(error).__name__}: {error}); restore it from a copy or convert the set again"
            ) from None

    def save(self, folder) -> None:
        """Write the manifest into `folder`; it appears only when it is whole."""
        fields = {**vars(self), "shards": [dataclasses.asdict(s) for s in self.shards.values()]}
        write_json(os.path.join(folder, MANIFEST), {**fields, "sha256": hash_fields(fields)})

    def split(self, name, folder):
        """The shards of a split, in order; UserError, naming `folder`, if there is no such one."""
        if name not in self.splits:
            raise UserError(f"{folder}: has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return [self.shards[file] for file in self.splits[name]]


def decode_record(record, fields, *, size, pair, source):
    """The arrays of `fields` in a record (bytes or uint8 array), as a dict, as `read_pair` gave
    them, for a pair of `size` (H, W).

    Raises UserError with the pair and the file `source` if a bit of the record is wrong, whether or
    not it is decoded, or if an array is of another size or type. Nothing larger is allocated.
    """
    sample = {}
    payloads = codec.unpack(record, len(FIELDS), pair=pair, source=source)
    for field, payload in zip(FIELDS, payloads):
        if field in fields:
            dtype, channels = FIELDS[field]
            shape = tuple(size) if channels == 1 else (*size, channels)
            sample[field] = codec.decode(payload, shape=shape, dtype=dtype, pair=pair, field=field, source=source)
        else:
            codec.check(payload, pair=pair, field=field, source=source)
    return sample


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes in bytes that MindRecord reads several shards together by: they must be equal in all of them."""

    page: int
    header: int

    @classmethod
    def fitting(cls, pixels: int, pairs: int) -> "Layout":
        """The layout for images of up to `pixels` and shards of up to `pairs`."""
        # A record must fit in a page. Four uncompressed ones do here, so a page's unused end stays
        # small.
        page = 1 << 16
        while page < 4 * (PIXEL_BYTES * pixels + 4096):
            page *= 2
        # The header lists the pages, about 200 bytes each, and there is at most one for two pairs.
        return cls(min(page, MAX_PAGE), (1 << 16) * (1 + 128 * pairs // (1 << 16)))


def write_shard(folder, file, pairs, *, codec_name, layout, progress=lambda: None):
    """Write `pairs` as the shard `folder`/`file` in a `Layout` and return its `Shard`.

    The shard and its index appear under their names only when they are whole and on the disk; a
    file FILE.json beside them, written last, says so to a later run. `progress` is called after
    each pair.
    """
    from mindspore.mindrecord import FileWriter  # takes seconds, and is not for those who only load

    work = os.path.join(folder, f"{file}.partial-{os.getpid()}")  # MindRecord keeps the file's name
    os.mkdir(work)
    try:
        path = os.path.join(work, file)
        writer = FileWriter(path, 1, overwrite=True)
        writer.set_page_size(layout.page)
        writer.set_header_size(layout.header)
        writer.add_schema(SCHEMA, "optical flow pair")
        runs, free = [], free_bytes(folder)
        for pair in pairs:
            sample = read_pair(pair)
            size = sample["flow"].shape[:2]
            if not runs or runs[-1][1:] != size:
                runs.append((0, *size))
            runs[-1] = (runs[-1][0] + 1, *size)
            payloads = [codec.encode(sample[field], codec_name, pair=pair.name, field=field) for field in FIELDS]
            writer.write_raw_data([{"name": pair.name, "pair": codec.pack(payloads)}])
            free = min(free, free_bytes(folder))
            progress()
        writer.commit()
        size, index_size = sync(path), sync(path + ".db")
        shard = Shard(
            file=file,
            bytes=size,
            sha256=hash_file(path, size),
            header_bytes=layout.header,
            header_sha256=hash_file(path, layout.header),
            index_bytes=index_size,
            index_sha256=hash_file(path + ".db", index_size),
            names=[pair.name for pair in pairs],
            sizes=runs,
        )
        for suffix in (".db", ""):
            os.chmod(path + suffix, os.stat(work).st_mode & 0o666)  # MindRecord's own is 0600
            os.replace(path + suffix, os.path.join(folder, file + suffix))
        write_json(os.path.join(folder, file + ".json"), dataclasses.asdict(shard))
    except RuntimeError as error:  # MindRecord's own errors; reading's are UserError or OSError
        # MindRecord, or another process at the same moment, may already have removed what filled the
        # disk, so the least that was free counts.
        free = min(free, free_bytes(folder))
        raise UserError(
            f"{os.path.join(folder, file)}: MindRecord could not write it ({free / 1e6:.1f} MB were "
            f"free there; {reason_of(error)}); make room, then run the command again"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return shard


def free_bytes(folder) -> int:
    """What a folder's file system has left for this user."""
    return shutil.disk_usage(folder).free


def reason_of(error) -> str:
    """What an exception of MindSpore's says, in one line without the report around it."""
    lines = [line for line in str(error).splitlines() if line.startswith("[ERROR]")]
    return one_line(" ".join(lines) or error, 200)


def hash_file(path, length):
    """The SHA-256 of a file's first `length` bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while length > 0 and (block := file.read(min(length, 1 << 20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()


def hash_fields(fields):
    """The SHA-256 of what a JSON file holds, however it is laid out, as hexadecimal digits."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_hash(path, length, expected) -> None:
    """UserError unless the first `length` bytes of a file have the SHA-256 `expected`."""
    if hash_file(path, length) != expected:
        raise UserError(
            f"{path}: damaged (its SHA-256 is not the one in the set's manifest); restore it from "
            "a copy or convert the set again"
        )
