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
import struct
import urllib.parse

from prep import codec
from prep.datasets import pair_size, read_pair
from prep.errors import UserError
from prep.flowio import write_whole

SCHEMA_VERSION = 1
FIELDS = ("image1", "image2", "flow", "valid", "occluded")
# One column for all: of several, MindRecord stores the lengths among the data and reads them back
# unchecked, so that one flipped bit there ends the process (segmentation fault).
SCHEMA = {"name": {"type": "string"}, "pair": {"type": "bytes"}}
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard: sizes and SHA-256 of its file, of the header there and of its .db index; its
    pairs.

    names are in the records' order, sizes are runs of it: (number of pairs, height, width).
    """

    file: str
    bytes: int
    sha256: str
    header_bytes: int
    header_sha256: str
    index_bytes: int
    index_sha256: str
    names: list
    sizes: list

    @classmethod
    def from_dict(cls, fields):
        """The shard that `dataclasses.asdict` wrote; KeyError or TypeError if it is not one."""
        return cls(**{**fields, "sizes": [tuple(run) for run in fields["sizes"]]})

    def check_files(self, folder):
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

    def check_structure(self, folder):
        """UserError unless the sizes fit and header and index are what was written.

        MindSpore trusts both: a wrong byte there could end the process. It takes milliseconds; the
        rest of the shard is records, whose payloads are checked when they are decoded.
        """
        self.check_files(folder)
        check_hash(os.path.join(folder, self.file), self.header_bytes, self.header_sha256)
        check_hash(os.path.join(folder, self.file + ".db"), self.index_bytes, self.index_sha256)

    def check_bytes(self, folder):
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
        path = os.path.join(folder, self.file)
        with open(path, "rb") as file:
            # A MindRecord file: the header's length (uint64), the header as JSON, then from
            # header_bytes on the pages. The index has each row's page and place in it. A row begins
            # with its length (uint64), which nobody reads, as the index has it too.
            (length,) = struct.unpack("<Q", file.read(8))
            page_size = json.loads(file.read(length))["page_size"]
            columns = "PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END"
            uri = f"file:{urllib.parse.quote(os.path.abspath(path))}.db?mode=ro&immutable=1"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as index:
                rows = index.execute(f"SELECT {columns} FROM INDEXES ORDER BY ROW_ID").fetchall()
            for page, start, end in rows if indices is None else [rows[i] for i in indices]:
                offset = self.header_bytes + page * page_size + start
                file.seek(offset + 8)
                yield offset, file.read(end - start - 8)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted set holds and how it was made.

    shards: by file name; splits: for each split its shards' file names in order, so a shard may be
    in several (Sintel's val-clean is a part of val); validation: the split file's name and SHA-256,
    None if the data set itself holds pairs out. The file ends with a SHA-256 of all else in it.
    """

    dataset: str
    schema_version: int
    splits: dict
    shards: dict
    validation: dict
    made: dict

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
                fields = json.load(file)
            version = int(fields["schema_version"])
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"{path}: schema version {version}, this toolkit knows up to {SCHEMA_VERSION}; "
                    "update the toolkit or convert the set with this one"
                )
            if fields.pop("sha256") != hash_fields(fields):
                raise ValueError("its SHA-256 is not the one in it")
            shards = {s["file"]: Shard.from_dict(s) for s in fields["shards"]}
            manifest = cls(**{**fields, "shards": shards})
            for files in manifest.splits.values():
                for shard in (shards[file] for file in files):
                    if sum(run[0] for run in shard.sizes) != len(shard.names):
                        raise ValueError("the numbers of names and sizes differ")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: damaged ({type(error).__name__}: {error}); restore it from a copy or "
                "convert the set again"
            ) from None
        return manifest

    def save(self, folder):
        """Write the manifest into `folder`; it appears only when it is whole."""
        fields = {**vars(self), "shards": [dataclasses.asdict(s) for s in self.shards.values()]}
        write_json(os.path.join(folder, MANIFEST), {**fields, "sha256": hash_fields(fields)})

    def split(self, name, folder):
        """The shards of a split, in order; UserError, naming `folder`, if there is no such one."""
        if name not in self.splits:
            raise UserError(
                f"{folder}: has no split {name!r}; it has {', '.join(sorted(self.splits))}"
            )
        return [self.shards[file] for file in self.splits[name]]


def decode_record(record, fields, *, pair, source):
    """The arrays of `fields` in a record (bytes or uint8 array), as a dict, as `read_pair` gave
    them.

    Raises UserError with the pair and the file `source` if a bit of the record is wrong, whether or
    not it is decoded.
    """
    sample = {}
    payloads = codec.unpack(record, len(FIELDS), pair=pair, source=source)
    for field, payload in zip(FIELDS, payloads):
        if field in fields:
            sample[field] = codec.decode(payload, pair=pair, field=field, source=source)
        else:
            codec.check(payload, pair=pair, field=field, source=source)
    return sample


def write_shard(folder, file, pairs, *, codec_name, progress=lambda: None):
    """Write `pairs` as the shard `folder`/`file` and return its `Shard`.

    The shard and its index appear under their names only when they are whole and on the disk; a
    file FILE.json beside them, written last, says so to a later run. `progress` is called after
    each pair.
    """
    from mindspore.mindrecord import FileWriter  # takes seconds, and is not for those who only load

    work = os.path.join(folder, f"{file}.partial-{os.getpid()}")  # MindRecord keeps the file's name
    os.mkdir(work)
    try:
        path = os.path.join(work, file)
        pixels = max(height * width for height, width in map(pair_size, pairs))
        writer, header = _open_writer(FileWriter, path, len(pairs), pixels)
        runs = []
        for pair in pairs:
            sample = read_pair(pair)
            size = sample["flow"].shape[:2]
            if not runs or runs[-1][1:] != size:
                runs.append((0, *size))
            runs[-1] = (runs[-1][0] + 1, *size)
            payloads = [
                codec.encode(sample[field], codec_name, pair=pair.name, field=field)
                for field in FIELDS
            ]
            writer.write_raw_data([{"name": pair.name, "pair": codec.pack(payloads)}])
            progress()
        writer.commit()
        size, index_size = sync(path), sync(path + ".db")
        shard = Shard(
            file=file,
            bytes=size,
            sha256=hash_file(path, size),
            header_bytes=header,
            header_sha256=hash_file(path, header),
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
        free = shutil.disk_usage(folder).free / 1e6
        raise UserError(
            f"{os.path.join(folder, file)}: MindRecord could not write it ({free:.0f} MB are free "
            f"there; {' '.join(str(error).split())[:200]}); make room, then run the command again"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return shard


def _open_writer(FileWriter, path, pairs, pixels):
    """A MindRecord writer and the bytes of its header, for records of images of up to `pixels`."""
    # A record must fit in a page. Four uncompressed ones do here, so a page's unused end stays
    # small.
    page = 1 << 16
    while page < 4 * (16 * pixels + 4096):
        page *= 2
    # The header lists the pages, about 200 bytes each, and there is at most one for two pairs.
    header = (1 << 16) * (1 + 128 * pairs // (1 << 16))
    writer = FileWriter(path, 1, overwrite=True)
    writer.set_page_size(min(page, 1 << 28))
    writer.set_header_size(header)
    writer.add_schema(SCHEMA, "optical flow pair")
    return writer, header


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


def check_hash(path, length, expected):
    """UserError unless the first `length` bytes of a file have the SHA-256 `expected`."""
    if hash_file(path, length) != expected:
        raise UserError(
            f"{path}: damaged (its SHA-256 is not the one in the set's manifest); restore it from "
            "a copy or convert the set again"
        )


def sync(path):
    """See that a file, or the names in a folder, are on the disk; returns the size."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def write_json(path, value):
    """Write a JSON file that appears only when it is whole."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")
