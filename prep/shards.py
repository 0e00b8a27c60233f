"""Shards and manifest: the format of a converted dataset, and how it is written.

A dataset is a folder with MindRecord shards (each with the .db index that MindSpore reads beside it) and
manifest.json, which lists every shard with its size, hashes and pairs. A record is one pair: its name, and one column
with the payloads (prep/codec.py) of FIELDS. prep/README.md describes the format with an example.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import sqlite3
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np

from launch.errors import UserError, one_line
from launch.files import partial_of, sync, write_json
from prep import codec, schema
from prep.datasets import PairFiles, Sample, read_pair
from prep.formats import StrPath
from prep.prefetch import prefetch

SCHEMA_VERSION = 2
"""The newest version that this toolkit reads. It writes 2 for a dataset with pairs without ground truth, else 1."""
FIELDS = {
    "image1": (np.uint8, 3),
    "image2": (np.uint8, 3),
    "flow": (np.float32, 2),
    "valid": (np.uint8, 1),
    "occluded": (np.uint8, 1),
}
"""The fields of a pair in the order of a record's payloads: dtype and number of channels."""
PIXEL_BYTES = 16  # at least the size of all uncompressed fields of a pixel
RAW_PIXEL_BYTES = 14  # at most their size as codec.py stores them uncompressed: a mask may be one value for all
# All payloads share one column: with several, MindRecord stores their lengths among the data and reads them unchecked,
# so that one flipped bit there ends the process (segmentation fault).
SCHEMA = {"name": {"type": "string"}, "pair": {"type": "bytes"}}
MANIFEST = "manifest.json"
MAX_PAGE = 1 << 28  # bytes
MAX_RECORD = MAX_PAGE - 8  # bytes; its length precedes it in its page

# What manifest.json may contain (checked by prep/schema.py): a dataset may come from anyone, and its hashes only prove
# that it is intact. Control characters could rewrite a terminal; lone surrogates, which Python substitutes for bytes
# that are not UTF-8, cannot be written.
Count = Annotated[int, schema.IntRange(1, 2**53)]
Version = Annotated[int, schema.IntRange(1, 2**31)]
PRINTABLE = schema.Pattern(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,10000}", "text without control characters")
Text = Annotated[str, PRINTABLE]
Sha256 = Annotated[str, schema.Pattern("[0-9a-f]{64}", "a SHA-256 as 64 hexadecimal digits")]
ShardFile = Annotated[
    str, schema.Pattern(r"[A-Za-z0-9_-]{1,200}\.mindrecord", "a plain file name such as train.mindrecord")
]


class Validation(TypedDict):
    """Name and SHA-256 of the split file; None if the dataset itself reserves pairs for validation."""

    file: Text | None
    sha256: Sha256 | None


class Provenance(TypedDict):
    """How a dataset was made: the command, its plan (prep/convert.py), and package versions."""

    command: Text
    plan: dict
    versions: dict[Text, Text]


class Record(NamedTuple):
    """A record as stored."""

    offset: int
    """Offset in the shard's file, in bytes."""
    data: bytes


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard's sizes in bytes and SHA-256 hashes (of its file, that file's header, and its .db index) and its pairs.

    Raises:
        ValueError: the numbers of names and sizes differ, or the pairs cannot fit in the file.
    """

    file: ShardFile
    bytes: Count
    sha256: Sha256
    header_bytes: Count
    header_sha256: Sha256
    index_bytes: Count
    index_sha256: Sha256
    names: list[Text]
    """Names of the pairs, in the order of the records."""
    sizes: list[tuple[Count, Count, Count]]
    """Runs of equal size, in the same order: (number of pairs, height, width)."""
    labelled: bool = True
    """Whether its pairs have ground truth; if not, their flow, valid and occluded are all 0."""

    def __post_init__(self) -> None:
        if sum(number for number, _, _ in self.sizes) != len(self.names):
            raise ValueError("the numbers of names and sizes differ")
        if self.header_bytes > self.bytes:
            raise ValueError("its header is longer than its file")
        # A shard has at least one page of records, with room for four uncompressed pairs or of MAX_PAGE bytes
        # (PageLayout), a quarter of the largest pair.
        for _, height, width in self.sizes:
            if PIXEL_BYTES * height * width > 4 * self.bytes:
                raise ValueError(f"a pair of {width}x{height} does not fit in its {self.bytes} bytes")

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json for it: as in version 1, unless its pairs have no ground truth."""
        fields = dataclasses.asdict(self)
        if self.labelled:
            del fields["labelled"]
        return fields

    def pair_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each pair, in the order of the records."""
        return [(height, width) for number, height, width in self.sizes for _ in range(number)]

    def check_files(self, folder: Path) -> None:
        """Raise UserError unless the shard and its index exist in `folder` and have the right lengths."""
        for file, expected in ((self.file, self.bytes), (self.file + ".db", self.index_bytes)):
            path = folder / file
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                raise UserError(
                    f"{path}: missing, but listed in the manifest; restore it from a copy (under this name) or convert "
                    "the dataset again"
                ) from None
            if found != expected:
                raise UserError(
                    f"{path}: {found} bytes, but {expected} in the manifest; restore it from a copy or convert the "
                    "dataset again"
                )

    def check_structure(self, folder: Path) -> None:
        """Raise UserError unless lengths, header and index are as written. Takes milliseconds.

        MindSpore trusts header and index: a wrong byte there could end the process. The rest of a shard is records,
        whose payloads are checked when they are decoded.
        """
        self.check_files(folder)
        check_hash(folder / self.file, self.header_bytes, self.header_sha256)
        check_hash(folder / f"{self.file}.db", self.index_bytes, self.index_sha256)
        self.locate(folder)

    def check_bytes(self, folder: Path) -> None:
        """Raise UserError unless every byte of the shard and its index is as written. Reads both completely."""
        self.check_structure(folder)
        check_hash(folder / self.file, self.bytes, self.sha256)

    def records(self, folder: Path, indices: Iterable[int] | None = None) -> Iterator[Record]:
        """Yield the records of the pairs at `indices`, by default of all in order. Call `check_structure` first.

        It reads without MindSpore, which takes seconds to start and rejects a whole shard for one wrong byte among the
        names.
        """
        places = self.locate(folder)
        with open(folder / self.file, "rb") as file:
            for offset, length in places if indices is None else [places[i] for i in indices]:
                file.seek(offset)
                yield Record(offset, file.read(length))

    def locate(self, folder: Path) -> list[tuple[int, int]]:
        """(offset, length) of each record in the shard's file, in order, according to its index.

        Reads no more than the manifest justifies.

        Raises:
            UserError: header or index are not as MindRecord writes them, or point outside the file.
        """
        path = folder / self.file
        try:
            # A MindRecord file: the header's length (uint64), the header as JSON, and from header_bytes on the pages.
            # The index has the page of each row and its place there, for the name (RAW) and for the record (BLOB). A
            # record begins with its length (uint64), which nobody reads, because the index has it too.
            with open(path, "rb") as file:
                start = file.read(self.header_bytes)
            header = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
            page_size = schema.read(Count, header["page_size"], "page_size")
            if header["shard_addresses"] != [self.file]:
                raise ValueError("the header belongs to another shard")
            places = []
            for row, *values in self._read_index(Path(f"{path}.db")):
                if row != len(places) or not all(type(value) is int and value >= 0 for value in values):
                    raise ValueError(f"row {len(places)} of the index is invalid")
                for page, begin, end, shortest in (values[:3] + [0], values[3:] + [8]):
                    offset = self.header_bytes + page * page_size + begin
                    if end - begin < shortest or offset + end - begin > self.bytes:
                        raise ValueError(f"row {row} of the index points outside the file")
                places.append((offset + 8, end - begin - 8))
            if len(places) != len(self.names):
                raise ValueError(f"the index has {len(places)} rows")
        except (ValueError, KeyError, TypeError, RecursionError, sqlite3.Error) as error:
            raise UserError(
                f"{path}: not a shard of {len(self.names)} pairs ({type(error).__name__}: {one_line(error)}); "
                "restore it from a copy, or remove the dataset and convert it again"
            ) from None
        return places

    def _read_index(self, path: Path) -> list[tuple[int, ...]]:
        """The index's rows by number, at most one more than there are names.

        Each is (row, page, begin and end of the name, page, begin and end of the record).
        """
        columns = "ROW_ID, " + ", ".join(
            f"PAGE_ID_{kind}, PAGE_OFFSET_{kind}, PAGE_OFFSET_{kind}_END" for kind in ("RAW", "BLOB")
        )
        uri = f"file:{urllib.parse.quote(os.path.abspath(path))}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as index, contextlib.suppress(MemoryError):
            # A view or a computed column could take any amount of work.
            kinds = index.execute("SELECT type FROM sqlite_master WHERE name = 'INDEXES'").fetchall()
            hidden = [column[6] for column in index.execute("PRAGMA table_xinfo(INDEXES)")]
            if kinds != [("table",)] or any(hidden):
                raise ValueError("its index is not a plain table")
            index.set_progress_handler(lambda: 1, 10_000 + 100 * len(self.names))  # 1 aborts the query
            rows = index.execute(f"SELECT {columns} FROM INDEXES")
            return sorted(rows.fetchmany(len(self.names) + 1), key=lambda row: row[0])
        # SQLite calls lengths above its limits a lack of memory, without trying to allocate it.
        raise ValueError("its index contains impossible lengths")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted dataset contains and how it was made. The file ends with a SHA-256 of everything else in it."""

    dataset: Text
    schema_version: Version
    splits: dict[Text, list[ShardFile]]
    """Shard files of each split, in order. A shard may be in several: Sintel's val-clean is part of val."""
    shards: dict[ShardFile, Shard]
    """All shards by their file names."""
    validation: Validation
    made: Provenance

    def __post_init__(self) -> None:
        for name, files in self.splits.items():
            if len(set(files)) != len(files) or not self.shards.keys() >= set(files):
                raise ValueError(f"split {name} lists a shard twice or one that does not exist")

    def __len__(self) -> int:
        """The number of pairs."""
        return sum(len(shard.names) for shard in self.shards.values())

    @property
    def unlabelled(self) -> int:
        """The number of pairs without ground truth."""
        return sum(len(shard.names) for shard in self.shards.values() if not shard.labelled)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a dataset's manifest; UserError if it is missing, damaged or of a newer version."""
        path = folder / MANIFEST
        if not path.is_file():
            unfinished = partial_of(folder).is_dir()
            raise UserError(
                f"{path}: not found; expected a folder written by prep/convert.py"
                + (", whose last run was interrupted: run the same command again to resume" if unfinished else "")
            )
        try:
            fields = schema.read(dict, json.loads(path.read_text("utf-8")))
            version = schema.read(Version, fields.get("schema_version"), "schema_version")
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"{path}: schema version {version}, but this toolkit supports versions up to {SCHEMA_VERSION}; "
                    "update the toolkit, or remove the dataset and convert it again"
                )
            if fields.pop("sha256", None) != hash_fields(fields):
                raise ValueError("its SHA-256 does not match its content")
            shards = schema.read(list[Shard], fields.get("shards"), "shards")
            by_file = {shard.file: shard for shard in shards}
            if len(by_file) != len(shards):
                raise ValueError("two of its shards have the same name")
            return schema.read(cls, {**fields, "shards": by_file})
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: damaged ({type(error).__name__}: {error}); restore it from a copy, or remove the dataset "
                "and convert it again"
            ) from None

    def has_ground_truth(self, split: str) -> bool:
        """Whether a split exists and has pairs with ground truth."""
        return any(self.shards[file].labelled for file in self.splits.get(split, []))

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`, whole or not at all."""
        fields = {**vars(self), "shards": [shard.to_json() for shard in self.shards.values()]}
        write_json(folder / MANIFEST, {**fields, "sha256": hash_fields(fields)})

    def shards_of(self, split: str, folder: Path) -> list[Shard]:
        """The shards of a split, in order; UserError, naming `folder`, if there is no such split."""
        if split not in self.splits:
            raise UserError(f"{folder}: has no split {split!r}; it has {', '.join(sorted(self.splits))}")
        return [self.shards[file] for file in self.splits[split]]


def suggest_training(datasets: Mapping[Path, Manifest]) -> str:
    """How to train on datasets, given by folder, or why that is impossible."""
    if fit := [folder for folder, manifest in datasets.items() if manifest.has_ground_truth("train")]:
        words = " ".join(f"--data {shlex.quote(str(folder))}" for folder in fit)
        return f"to train: launch/train.sh --config RECIPE {words} --out RUN"
    if any(manifest.has_ground_truth("val") for manifest in datasets.values()):
        return "no training pairs with ground truth; suitable for launch/train.sh --validate and train/evaluate.py"
    return "training needs pairs with ground truth, too"


def decode_record(
    record: codec.Payload, fields: Collection[str], *, size: tuple[int, int], pair: str, source: StrPath
) -> Sample:
    """Decode some fields of a record (all fields: `FIELDS`) to the arrays that `read_pair` returned.

    Args:
        size: (H, W) of the pair. Nothing larger is allocated.
        pair: its name.
        source: the file, for errors.

    Raises:
        UserError: a bit is wrong, also in the other fields, or an array is of another size or type.
    """
    sample = {}
    payloads = codec.unpack(record, len(FIELDS), pair=pair, source=source)
    for field, payload in zip(FIELDS, payloads, strict=True):
        if field in fields:
            dtype, channels = FIELDS[field]
            shape = size if channels == 1 else (*size, channels)
            sample[field] = codec.decode(payload, shape=shape, dtype=dtype, pair=pair, field=field, source=source)
        else:
            codec.check(payload, pair=pair, field=field, source=source)
    return sample


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """MindRecord's page and header sizes in bytes. It reads shards together only if these are equal in all of them."""

    page: int
    header: int

    @classmethod
    def fitting(cls, pixels: int, pairs: int) -> "PageLayout":
        """The layout for images of up to `pixels` pixels and shards of up to `pairs` pairs."""
        # A record must fit in a page. With room for four uncompressed ones, little of a page stays unused.
        page = 1 << 16
        while page < 4 * (PIXEL_BYTES * pixels + 4096):
            page *= 2
        # The header lists the pages, with about 200 bytes each; there is at most one page for two pairs.
        return cls(min(page, MAX_PAGE), (1 << 16) * (1 + 128 * pairs // (1 << 16)))


def write_shard(
    path: Path,
    pairs: list[PairFiles],
    *,
    codec_name: str,
    layout: PageLayout,
    progress: Callable[[], object] = lambda: None,
) -> Shard:
    """Write pairs as the shard `path`.

    The shard and its index appear under their names only when they are complete and on disk. `progress` is called after
    each pair.

    Args:
        pairs: all with ground truth, or all without.

    Raises:
        BadPair: a file of a pair is damaged.
        UserError: a record is too long, or MindRecord cannot write the shard.
    """
    work = path.with_name(f"{path.name}.partial-{os.getpid()}")
    work.mkdir()
    try:
        sizes = write_records(work, path, pairs, codec_name, layout, progress)
        # MindRecord stores the file's name, so it is the same in `work`.
        unfinished, index = work / path.name, work / f"{path.name}.db"
        length, index_length = sync(unfinished), sync(index)
        shard = Shard(
            file=path.name,
            bytes=length,
            sha256=hash_file(unfinished, length),
            header_bytes=layout.header,
            header_sha256=hash_file(unfinished, layout.header),
            index_bytes=index_length,
            index_sha256=hash_file(index, index_length),
            names=[pair.name for pair in pairs],
            sizes=sizes,
            labelled=pairs[0].flow is not None,
        )
        for written in (index, unfinished):
            written.chmod(work.stat().st_mode & 0o666)  # MindRecord's own mode is 0600
            written.replace(path.with_name(written.name))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return shard


def write_records(
    work: Path,
    path: Path,
    pairs: list[PairFiles],
    codec_name: str,
    layout: PageLayout,
    progress: Callable[[], object],
) -> list[tuple[int, int, int]]:
    """Write the records of the shard `path` and their index, to the folder `work`; returns `Shard.sizes`."""
    from mindspore.mindrecord import FileWriter  # takes seconds; reading a dataset does not need it

    free = free_bytes(work)
    sizes: list[tuple[int, int, int]] = []
    try:
        writer = FileWriter(str(work / path.name), 1, overwrite=True)
        writer.set_page_size(layout.page)
        writer.set_header_size(layout.header)
        writer.add_schema(SCHEMA, "optical flow pair")
        # The files may be far away or compressed; reading them does not need Python's lock.
        for pair, sample in zip(pairs, prefetch(map(read_pair, pairs), 1), strict=True):
            height, width = sample["valid"].shape
            if sizes and sizes[-1][1:] == (height, width):
                sizes[-1] = (sizes[-1][0] + 1, height, width)
            else:
                sizes.append((1, height, width))
            payloads = [codec.encode(sample[field], codec_name, pair=pair.name, field=field) for field in FIELDS]
            record = codec.pack(payloads)
            check_record(pair, (height, width), len(record), codec_name)
            writer.write_raw_data([{"name": pair.name, "pair": record}])
            free = min(free, free_bytes(work))
            progress()
        writer.commit()
    except RuntimeError as error:  # from MindRecord; reading raises UserError or OSError
        # MindRecord or another process may already have deleted what filled the disk: report the minimum.
        free = min(free, free_bytes(work))
        raise UserError(
            f"{path}: MindRecord could not write it ({free / 1e6:.1f} MB were free there; {extract_reason(error)}); "
            "free some space, then run the same command again"
        ) from error
    return sizes


def check_record(pair: PairFiles, size: tuple[int, int], length: int, codec_name: str) -> None:
    """Raise UserError if the record of a pair of this (H, W) has more bytes than MindRecord can store."""
    if length > MAX_RECORD:
        raise UserError(
            f"{pair.row or pair.image1}: the pair {pair.name} of {size[1]}x{size[0]} pixels takes {length / 1e6:.1f} "
            f"MB with --codec {codec_name}, but MindRecord can store at most {MAX_RECORD / 1e6:.1f} MB; "
            + ("use --codec zstd" if codec_name == "raw" else "use smaller images")
        )


def free_bytes(folder: Path) -> int:
    """Free space for this user on a folder's file system."""
    return shutil.disk_usage(folder).free


def stored_bytes(shards: Iterable[Shard], folder: Path) -> int:
    """Bytes that shards occupy on disk. MindRecord's pages end in holes, which are not stored, so count blocks."""
    return sum(512 * (folder / shard.file).stat().st_blocks for shard in shards)


def extract_reason(error: Exception) -> str:
    """The reason in a MindSpore exception, on one line, without the report around it."""
    lines = [line for line in str(error).splitlines() if line.startswith("[ERROR]")]
    return one_line(" ".join(lines) or error, 200)


def hash_file(path: Path, length: int) -> str:
    """SHA-256 of the first `length` bytes of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while length > 0 and (block := file.read(min(length, 1 << 20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()


def hash_manifest(folder: Path) -> str:
    """SHA-256 of a dataset's manifest, in hexadecimal; it identifies the dataset."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def hash_fields(fields: dict[str, Any]) -> str:
    """SHA-256 of the content of a JSON file, whatever its layout, in hexadecimal."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_hash(path: Path, length: int, expected: str) -> None:
    """Raise UserError unless the first `length` bytes of a file have the expected SHA-256."""
    if hash_file(path, length) != expected:
        raise UserError(
            f"{path}: damaged (its SHA-256 is not the one in the manifest); restore it from a copy or convert the "
            "dataset again"
        )
