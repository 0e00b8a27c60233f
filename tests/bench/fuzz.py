"""Fuzzing: every parser of files that come from elsewhere gets damaged and hostile ones.

python tests/bench/fuzz.py [--parser NAME ...] [--inputs N] [--seed S] [--atheris] [--file INPUT]

A parser either returns a well-formed value or raises UserError. Any other exception, a crash, more
than 2 s, more than 128 MB for one input of at most 64 kB, or a line on the terminal is a failure.
Inputs are mutations of valid files, by and large with their checksums made right again; one with an
outcome that was not seen before is mutated further. With --atheris (pip install atheris) coverage
chooses these. The same seed gives the same inputs.
"""

import argparse
import copy
import dataclasses
import importlib
import io
import json
import mmap
import os
import pathlib
import random
import re
import resource
import signal
import sqlite3
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[0] = ROOT  # `prep`, and not this folder's neighbours

LIMIT_S, LIMIT_MB = 2.0, 128
ADDRESSES = 2 << 30  # bytes that a parser may map beyond what it had: far more is a MemoryError
LONGEST = 1 << 16  # bytes of an input
CORPUS = 500  # inputs that are mutated further
MOST_FAILURES = 20  # a parser is given up then

# Shared with the child: inputs begun, accepted, rejected, failures, slowest (s of CPU), peak (MB
# over the start); length of the current input, which follows.
STATE = struct.Struct("<4q2dq")


@dataclasses.dataclass(frozen=True)
class Parser:
    """What is fuzzed: `seeds()` are valid files, `parse(path, data)` raises UserError or returns if
    all is well formed, `repair(data, rng)` makes a mutation's checksums right again."""

    suffix: str
    seeds: Callable[[], list[bytes]]
    parse: Callable[[str, bytes], None]
    repair: Callable[[bytes, random.Random], bytes] = lambda data, rng: data
    mutate: Callable[[bytes, random.Random, list[bytes]], bytes] | None = None


# --- Mutation -------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 1000, 1 << 15, 1 << 16, 10**6, 1 << 24, 10**9,
           (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]  # fmt: skip
WORDS = ["0", "-1", "1", "1e400", "nan", "null", "true", "[]", "{}", '""', "../x", "/etc/passwd",
         "[" * 500, "9" * 300, "9" * 5000, "&a", "*a", "<<: *a", "!!python/object:os.system",
         "2001-99-99", "\0", "\x1b[2J", "\ud7ff", "- ", ": ", "\n", "#", "'", "12:34:56",
         "0x1f"]  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A few random changes: bits, numbers, cuts, repeats, words, parts of other inputs."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        at, kind = rng.randrange(len(changed) + 1), rng.randrange(10)
        if kind < 2 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 2 and changed:
            changed[at % len(changed)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind < 5:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) + rng.choice((0, 0, -1, 1, rng.randrange(1 << 16)))
            order = rng.choice(("little", "big"))
            changed[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, order)
        elif kind == 5:
            del changed[at : at + rng.choice((1, 2, 4, 9, 100, 10**6))]
        elif kind == 6:
            part = changed[at : at + rng.choice((1, 4, 12, 100))]
            changed[at:at] = part * rng.choice((1, 1, 2, 20))
        elif kind == 7:
            changed[at:at] = rng.choice(WORDS).encode()
        elif kind == 8:
            digits = [m.span() for m in re.finditer(rb"\d+", changed[:4096])]
            if digits:
                begin, end = rng.choice(digits)
                changed[begin:end] = str(rng.choice(NUMBERS) - rng.randrange(3)).encode()
        else:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            changed[at : at + rng.choice((0, 9, 10**6))] = other[begin : begin + rng.choice((9, 99, 10**6))]
    return bytes(changed[:LONGEST])


def mutate_png(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Now and then nothing, which leaves the change to the rows that `repair_png` packs again."""
    return data if rng.random() < 0.2 else mutate_bytes(data, rng, others)


JSON_VALUES = [None, True, False, 0, 1, -1, 2, 1.5, 1e300, float("nan"), 10**12, -(10**12), 1 << 53,
               1 << 64, 10**400, "", "1", "../train.mindrecord", "/etc/passwd", "a\0b", "\x1b[2J",
               "\ud800", "x" * 20000, [], [[]], [1, 2, 3], [0, 0, 0], {},
               {"": 0}, {"file": "x"}]  # fmt: skip


def mutate_json(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A JSON text with some values replaced, removed, repeated or swapped."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = json.loads(others[0])
    for _ in range(rng.choice((1, 1, 2, 4))):
        holder: Any = None
        key: Any = None
        node = tree
        while isinstance(node, (dict, list)) and node and (holder is None or rng.random() < 0.8):
            holder = node
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            node = node[key]
        if holder is None:
            continue
        how = rng.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.insert(key, node)
        elif how == 1:
            holder[rng.choice(("", "file", "sha256", "train", "x\ny"))] = node
        elif how == 2 and isinstance(node, int):
            holder[key] = rng.choice(NUMBERS) - rng.randrange(3)
        elif how == 3 and isinstance(node, str):
            holder[key] = mutate_bytes(node.encode("utf-8", "replace"), rng, [b"abc"]).decode("latin-1")
        else:
            holder[key] = copy.deepcopy(rng.choice(JSON_VALUES))  # later changes go into it, too
    return json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


# --- Checksums ------------------------------------------------------------------------------------


def repair_png(data: bytes, rng: random.Random) -> bytes:
    """A PNG with the right CRC in each chunk; now and then with changed rows, packed again."""
    parts, start, rows = [data[:8]], 8, rng.random() < 0.3
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        body = data[start + 8 : start + 8 + length]
        if rows and kind == b"IDAT":
            try:
                packed = zlib.decompressobj().decompress(body, LONGEST)
                if rng.random() < 0.5:
                    packed = bytearray(packed)
                    for _ in range(rng.randrange(4)):
                        value = rng.choice((0, 1, 2, 3, 4, 5, rng.randrange(256)))
                        packed[rng.randrange(len(packed))] = value
                else:
                    packed = mutate_bytes(packed, rng, [packed])
                body = zlib.compress(packed, 1)
                length = len(body) if length == len(body) or rng.random() < 0.9 else length
            except (zlib.error, ValueError):  # no such stream, or an empty one
                pass
        parts += [struct.pack(">I4s", length, kind), body, struct.pack(">I", zlib.crc32(kind + body))]
        start += 12 + struct.unpack_from(">I", data, start)[0]
    return b"".join(parts) + data[start:]


def repair_zip(data: bytes, rng: random.Random) -> bytes:
    """A zip file in which each member that is stored has the right CRC-32, in both of its headers."""
    repaired = bytearray(data)
    for match in re.finditer(rb"PK\x01\x02", data):
        fields = data[match.start() : match.start() + 46]
        if len(fields) == 46 and fields[10:12] == b"\0\0":
            length, local = int.from_bytes(fields[20:24], "little"), int.from_bytes(fields[42:46], "little")
            begin = local + 30 + sum(struct.unpack("<2H", data[local + 26 : local + 30].ljust(4, b"\0")))
            crc = struct.pack("<I", zlib.crc32(data[begin : begin + length]))
            repaired[match.start() + 16 : match.start() + 20] = crc
            if local + 18 <= len(repaired):
                repaired[local + 14 : local + 18] = crc
    return bytes(repaired)


NAME = "clean/alley_1/frame_0001"


def repair_record(data: bytes, rng: random.Random) -> bytes:
    """A record with the right CRC-32 in each payload."""
    from prep.shards import FIELDS

    count = 4 * len(FIELDS)
    if len(data) < count:
        return data
    if rng.random() < 0.7:  # lengths that fill the record: the last takes what is left
        lengths = list(struct.unpack_from(f"<{len(FIELDS)}I", data))
        lengths[-1] = max(0, len(data) - count - sum(lengths[:-1])) % (1 << 32)
        data = struct.pack(f"<{len(FIELDS)}I", *lengths) + data[count:]
    repaired, start = bytearray(data), count
    for field, length in zip(FIELDS, struct.unpack_from(f"<{len(FIELDS)}I", data), strict=True):
        if length >= 4 and start + length <= len(data):
            seed = zlib.crc32(f"{NAME}\0{field}".encode())
            repaired[start : start + 4] = struct.pack("<I", zlib.crc32(data[start + 4 : start + length], seed))
        start += length
    return bytes(repaired)


def repair_manifest(data: bytes, rng: random.Random) -> bytes:
    from prep.shards import hash_fields

    try:
        fields = json.loads(data)
        fields.pop("sha256", None)
        fields = {**fields, "sha256": hash_fields(fields)}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data
    return json.dumps(fields).encode()


def repair_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """MindSpore's: a CRC-32 of all before it, after a word, in 10 bytes."""
    body = data.rpartition(b"crc_num")[0] or data
    return body + b"crc_num" + zlib.crc32(body).to_bytes(10, "big")


# --- Parsers and their seeds ----------------------------------------------------------------------


def arrays() -> "tuple[np.ndarray, np.ndarray]":
    """A small flow, float32 (6, 8, 2), and picture, uint8 (6, 8, 3)."""
    import numpy as np

    rng = np.random.default_rng(0)
    flow = np.rint(640 * rng.normal(0, 1, (6, 8, 2))).astype(np.float32) / 64
    flow[0, 0] = np.nan
    return flow, rng.integers(0, 256, (6, 8, 3), np.uint8)


def flow_seeds(suffix: str) -> list[bytes]:
    import numpy as np

    from prep.formats import flow as flow_format

    flow, _ = arrays()
    if suffix == ".pfm":
        rows = np.dstack([flow, np.zeros(flow.shape[:2], np.float32)])[::-1]
        return [b"PF\n8 6\n%s\n" % scale + rows.astype(order + "f4").tobytes()
                for order, scale in (("<", b"-1.0"), (">", b"1e0"))]  # fmt: skip
    if suffix == ".flo5":
        import h5py

        seeds = []
        for options in ({}, {"compression": 5}, {"chunks": (4, 3, 1), "shuffle": True, "compression": 1}):
            file = io.BytesIO()
            with h5py.File(file, "w") as opened:
                opened.create_dataset("flow", data=flow, **options)
            seeds.append(file.getvalue())
        return seeds
    if suffix in (".npy", ".npz"):
        plain, known = io.BytesIO(), np.nan_to_num(flow)
        if suffix == ".npy":
            np.save(plain, flow)
            big = io.BytesIO()
            np.save(big, known.astype(">f8").transpose(1, 0, 2).copy().transpose(1, 0, 2))
            return [plain.getvalue(), big.getvalue()]
        np.savez(plain, u=flow[..., 0].astype(np.float16), v=flow[..., 1].astype(np.float16))
        packed = io.BytesIO()
        np.savez_compressed(packed, flow=known)
        return [plain.getvalue(), packed.getvalue()]
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        {".flo": flow_format.write_flo, ".png": flow_format.write_kitti_png}[suffix](file.name, flow)
        with open(file.name, "rb") as written:
            return [written.read()]


def parse_flow(path: str, data: bytes) -> None:
    import numpy as np

    from launch import errors
    from prep.formats import flow as flow_format

    try:
        size = flow_format.flow_size(path)
    except errors.UserError:
        size = None
    flow, known = flow_format.read_flow(path)
    # HDF5 may decide differently on a file that it reads twice.
    assert size == flow.shape[:2] or (size is None and path.endswith(".flo5"))
    size = flow.shape[:2]
    assert flow.dtype == np.float32 and flow.ndim == 3 and flow.shape[2] == 2 and min(size) > 0
    assert known.dtype == np.uint8 and known.shape == size and known.max() <= 1


def archive_seeds(suffix: str) -> list[bytes]:
    files, seeds = {"data/a": bytes(range(256)) * 4, "data/b": b"", "c": b"abc" * 9}, []
    for option in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) if suffix == ".zip" else ("w", "w:gz"):
        file = io.BytesIO()
        if suffix == ".zip":
            with zipfile.ZipFile(file, "w", int(option)) as packed:
                for name, data in files.items():
                    packed.writestr(name, data)
        elif (option == "w:gz") == (suffix == ".tar.gz"):
            with tarfile.open(fileobj=file, mode=str(option)) as packed:  # type: ignore[call-overload]
                for name, data in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    packed.addfile(info, io.BytesIO(data))
        seeds += [file.getvalue()] if file.getvalue() else []
    return seeds


def repair_tar(data: bytes, rng: random.Random) -> bytes:
    """A .tar with the right checksum in each header, of those that are in their place."""
    repaired, start = bytearray(data), 0
    while start + 512 <= len(repaired) and any(repaired[start : start + 512]):
        header = repaired[start : start + 512]
        header[148:156] = b" " * 8
        repaired[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        length = bytes(header[124:135]).strip(b" \0")
        start += 512 * (1 - -(int(length, 8) if re.fullmatch(b"[0-7]+", length) else 0) // 512)
    return bytes(repaired)


def of_plain_tar(change: Callable[[bytes], bytes], data: bytes) -> bytes:
    """A .tar.gz whose .tar is changed; the same bytes if it cannot be decompressed."""
    try:
        plain = change(zlib.decompressobj(31).decompress(data, LONGEST))
    except zlib.error:
        return data
    compressor = zlib.compressobj(1, wbits=31)
    return compressor.compress(plain) + compressor.flush()


def repair_tar_gz(data: bytes, rng: random.Random) -> bytes:
    return of_plain_tar(lambda plain: repair_tar(plain, rng), data)


def mutate_tar_gz(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Changes of the .tar, or of its compressed bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng, others)
    return of_plain_tar(lambda plain: mutate_bytes(plain, rng, [plain]), data)


def parse_archive(path: str, data: bytes) -> None:
    from prep import archive

    folders = [archive.open_archives(pathlib.Path(path))]
    while folders:
        folder = folders.pop()
        for name in archive.list_names(folder):
            found = folder / name
            if found.is_dir():
                folders.append(found)
            else:
                content = found.read_bytes()
                assert len(content) == found.stat().st_size
                with found.open() as opened:
                    assert opened.read(9) == content[:9]


def mask_seeds() -> list[bytes]:
    import numpy as np

    seeds = []
    for dtype in (np.uint8, np.bool_):
        file = io.BytesIO()
        np.save(file, np.arange(48).reshape(6, 8).astype(dtype))
        seeds.append(file.getvalue())
    return seeds


def parse_mask(path: str, data: bytes) -> None:
    import numpy as np

    from prep.formats import image as image_format

    size, mask = image_format.mask_size(path), image_format.read_mask(path)
    assert mask.dtype == np.uint8 and mask.shape == size and mask.size and mask.max() <= 1


def image_seeds(kind: str) -> list[bytes]:
    import numpy as np
    from PIL import Image

    _, rgb = arrays()
    picture = Image.fromarray(rgb)

    def save(image: Image.Image, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    if kind == "PNG":
        pictures = [picture, picture.convert("L"), picture.convert("P"), picture.convert("1")]
        opaque = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]))
        return [save(p) for p in [*pictures, opaque]] + [save(pictures[1], transparency=300)]
    if kind == "JPEG":
        return [save(picture), save(picture.convert("L")), save(picture, progressive=True),
                save(picture.convert("CMYK"))]  # fmt: skip
    if kind == "WEBP":
        return [save(picture), save(picture, lossless=True), save(picture.convert("L"), lossless=True),
                save(picture, lossless=True, exif=b"Exif")]  # fmt: skip
    if kind == "TIFF":
        deep = Image.fromarray(rgb[..., 0].astype(np.uint16) << 8)
        compressions = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        return [save(picture, compression=name) for name in compressions] + [save(deep), save(picture.convert("1"))]
    if kind == "BMP":
        return [save(picture), save(picture.convert("P"))]
    return [save(picture), save(picture.convert("L")), save(picture.convert("1")),
            b"P6 # a comment\n2 1\n255\n" + bytes(6), b"P3\n2 1\n255\n1 2 3 4 5 6\n",
            b"P2\n2 1\n255\n1 2\n", b"P6\n2 1\n65535\n" + bytes(12), b"P5\n2 1\n4095\n" + bytes(4)]  # fmt: skip


def parse_image(path: str, data: bytes) -> None:
    import numpy as np

    from launch import errors
    from prep.formats import image as image_format

    image_format._noted_reduction = True  # of 16 bits, which may be noted
    try:
        size = image_format.image_size(path)
    except errors.UserError:
        size = None
    image = image_format.read_image(path)
    assert image.dtype == np.uint8 and image.shape[:2] == size and image.shape[2:] == (3,) and image.size


def record_seeds() -> list[bytes]:
    import numpy as np

    from prep import codec
    from prep.shards import FIELDS

    flow, image = arrays()
    ones = np.ones(flow.shape[:2], np.uint8)
    sample = dict(zip(FIELDS, (image, image[::-1], flow, ones, image[..., 0]), strict=True))
    return [codec.pack([codec.encode(sample[f], name, pair=NAME, field=f) for f in FIELDS])
            for name in codec.CODECS]  # fmt: skip


def parse_record(path: str, data: bytes) -> None:
    from prep import shards

    sample = shards.decode_record(data, shards.FIELDS, size=(6, 8), pair=NAME, source=path)
    for field, (dtype, channels) in shards.FIELDS.items():
        assert sample[field].dtype == dtype and sample[field].size == 48 * channels


SHARD, ROWS = "train-00000-of-00001.mindrecord", 3


def shard_seeds() -> list[bytes]:
    """A shard's header, 512 bytes, and its index."""
    header = json.dumps({"header_size": 512, "page_size": 65536, "shard_addresses": [SHARD]}).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "db")
        index = sqlite3.connect(path)
        index.execute("PRAGMA page_size = 512")
        columns = [f"PAGE_{what}" for what in ("ID_RAW", "OFFSET_RAW", "OFFSET_RAW_END",
                                               "ID_BLOB", "OFFSET_BLOB", "OFFSET_BLOB_END")]  # fmt: skip
        index.execute(f"CREATE TABLE INDEXES(ROW_ID INT, {', '.join(c + ' INT' for c in columns)})")
        for row in range(ROWS):
            values = (row, 1, 20 * row, 20 * row + 20, 0, 100 * row, 100 * row + 100)
            index.execute("INSERT INTO INDEXES VALUES(?, ?, ?, ?, ?, ?, ?)", values)
        index.commit()
        index.close()
        with open(path, "rb") as file:
            return [(struct.pack("<Q", len(header)) + header).ljust(512) + file.read()]


def parse_shard(path: str, data: bytes) -> None:
    from prep import shards

    folder, size = os.path.dirname(path), 512 + 2 * 65536
    with open(os.path.join(folder, SHARD), "wb") as file:
        file.write(data[:512])
        file.truncate(size)
    with open(os.path.join(folder, SHARD + ".db"), "wb") as file:
        file.write(data[512:])
    zero = "0" * 64
    names, runs = [str(i) for i in range(ROWS)], [(ROWS, 6, 8)]
    shard = shards.Shard(SHARD, size, zero, 512, zero, max(1, len(data) - 512), zero, names, runs)
    rows = list(shard.records(pathlib.Path(folder)))
    assert len(rows) == ROWS and all(place >= 8 and place + len(record) <= size for place, record in rows)


def manifest_seeds() -> list[bytes]:
    from prep import shards

    zero = "0" * 64
    found = [
        shards.Shard(f"{name}.mindrecord", 196688, zero, 65536, zero, 16384, zero,
                     [f"{name}/{i}" for i in range(4)], [(3, 24, 40), (1, 24, 48)], name == "train")
        for name in ("train", "val")
    ]  # fmt: skip
    manifest = shards.Manifest(
        dataset="flyingchairs", schema_version=1, shards={shard.file: shard for shard in found},
        splits={"train": [found[0].file], "val": [found[1].file], "none": []},
        validation={"file": "val.txt", "sha256": zero},
        made={"command": "prep/convert.py", "plan": {"codec": "zstd"}, "versions": {"python": "3"}},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        manifest.save(pathlib.Path(folder))
        with open(os.path.join(folder, shards.MANIFEST), "rb") as file:
            return [file.read()]


def parse_manifest(path: str, data: bytes) -> None:
    from prep import reader, shards

    folder = pathlib.Path(path).parent
    manifest = shards.Manifest.load(folder)
    for name in manifest.splits:
        split = reader.DatasetSplit(folder, name, manifest.dataset, manifest.shards_of(name, folder))
        assert split.sizes.shape == (len(split), 2) and len(split.names) == len(split)
        for file in split.files:
            assert file.parent == folder
    assert {"command", "plan"} <= manifest.made.keys() and "file" in manifest.validation


def mutate_manifest(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return (mutate_json if rng.random() < 0.8 else mutate_bytes)(data, rng, others)


def list_seeds() -> list[bytes]:
    from prep.datasets import pairs

    table = pairs.EXAMPLE.splitlines()
    rows = [dict(zip(table[0].split(","), line.split(","), strict=True)) for line in table[1:]]
    return [
        pairs.EXAMPLE.encode(),
        pairs.EXAMPLE.replace(",", "\t").encode("utf-8-sig"),
        pairs.EXAMPLE.replace(",", ";").encode(),
        "".join(json.dumps(row) + "\n" for row in rows).encode(),
    ]


def parse_list(path: str, data: bytes) -> None:
    from prep.datasets import pairs

    for row in pairs.read_rows(pathlib.Path(path)):
        assert row.line > 0 and all(row.values.values()) and row.values.keys() <= set(pairs.COLUMNS)


def recipe_seeds() -> list[bytes]:
    from train import recipe

    paths = sorted(recipe.FOLDER.glob("*.yaml"))
    bombs = [b"a: &a [1,2,3]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]\n"]
    return [path.read_bytes() for path in paths] + bombs


def parse_recipe(path: str, data: bytes) -> None:
    from train import recipe

    assert isinstance(recipe.Recipe.load(path), recipe.Recipe)


def checkpoint_seeds() -> list[bytes]:
    import mindspore
    import numpy as np

    tensors = [{"name": name, "data": mindspore.Tensor(np.arange(size, dtype=np.float32))}
               for name, size in (("conv.weight", 12), ("conv.bias", 2))]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.ckpt")
        extra = {"step": 5, "recipe": "seed: 1", "rate": 0.5, "dense": True}
        mindspore.save_checkpoint(tensors, path, append_dict=extra, crc_check=True)
        with open(path, "rb") as file:
            return [file.read()]


def parse_checkpoint(path: str, data: bytes) -> None:
    from model import weights

    assert all(isinstance(name, str) for name in weights.read(path))


PARSERS = {
    "flo": Parser(".flo", lambda: flow_seeds(".flo"), parse_flow),
    "pfm": Parser(".pfm", lambda: flow_seeds(".pfm"), parse_flow),
    "kitti-png": Parser(".png", lambda: flow_seeds(".png"), parse_flow, repair_png, mutate_png),
    "flo5": Parser(".flo5", lambda: flow_seeds(".flo5"), parse_flow),
    "npy": Parser(".npy", lambda: flow_seeds(".npy"), parse_flow),
    "npz": Parser(".npz", lambda: flow_seeds(".npz"), parse_flow, repair_zip),
    "mask": Parser(".npy", mask_seeds, parse_mask),
    "zip": Parser(".zip", lambda: archive_seeds(".zip"), parse_archive, repair_zip),
    "tar": Parser(".tar", lambda: archive_seeds(".tar"), parse_archive, repair_tar),
    "tar-gz": Parser(".tar.gz", lambda: archive_seeds(".tar.gz"), parse_archive, repair_tar_gz, mutate_tar_gz),
    "png": Parser(".png", lambda: image_seeds("PNG"), parse_image, repair_png, mutate_png),
    "jpeg": Parser(".jpg", lambda: image_seeds("JPEG"), parse_image),
    "ppm": Parser(".ppm", lambda: image_seeds("PPM"), parse_image),
    "webp": Parser(".webp", lambda: image_seeds("WEBP"), parse_image),
    "tiff": Parser(".tiff", lambda: image_seeds("TIFF"), parse_image),
    "bmp": Parser(".bmp", lambda: image_seeds("BMP"), parse_image),
    "record": Parser("", record_seeds, parse_record, repair_record),
    "shard": Parser("", shard_seeds, parse_shard),
    "manifest": Parser(".json", manifest_seeds, parse_manifest, repair_manifest, mutate_manifest),
    "list": Parser(".csv", list_seeds, parse_list),
    "recipe": Parser(".yaml", recipe_seeds, parse_recipe),
    "checkpoint": Parser(".ckpt", checkpoint_seeds, parse_checkpoint, repair_checkpoint),
}


# --- In the child: one input after the other ------------------------------------------------------


class Trial:
    """Gives inputs to a parser and checks the contract; what was found is in `state`."""

    def __init__(self, parser: Parser, folder: str, state: mmap.mmap, failures: str) -> None:
        from launch.errors import UserError

        self.parser, self.state, self.failures, self.error = parser, state, failures, UserError
        self.path = os.path.join(folder, "manifest.json" if parser is PARSERS["manifest"] else
                                 "input" + parser.suffix)  # fmt: skip
        self.begun, self.accepted, self.rejected, self.failed, self.slowest, self.peak, _ = STATE.unpack_from(state)
        self.kinds = set()
        self.highest = self.start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def note(self, length: int) -> None:
        STATE.pack_into(self.state, 0, self.begun, self.accepted, self.rejected, self.failed,
                        self.slowest, self.peak, length)  # fmt: skip

    def run(self, data: bytes) -> str:
        """Parse one input; returns its outcome as a text that others with the same outcome have."""
        self.begun += 1
        self.state[STATE.size : STATE.size + len(data)] = data
        self.note(len(data))
        with open(self.path, "wb") as file:
            file.write(data)
        printed, began = os.fstat(2).st_size, time.process_time()
        outcome, fault = "accepted", None
        try:
            self.parser.parse(self.path, data)
        except self.error as error:
            outcome = str(error)
            context = error
            while context := context.__context__:
                if isinstance(context, MemoryError) or "nsufficient memory" in str(context):
                    fault = "MemoryError behind " + outcome
            if "\n" in outcome or len(outcome) > 2000:
                fault = "not one short line: " + outcome
        except Exception:
            fault = traceback.format_exc()
        seconds = time.process_time() - began
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if seconds > LIMIT_S:
            fault = f"{seconds:.1f} s"
        if highest - self.highest > 1000 * LIMIT_MB:
            fault = f"{(highest - self.highest) / 1000:.0f} MB more memory"
        if os.fstat(2).st_size != printed:
            fault = "printed: " + os.pread(2, 1000, printed).decode(errors="replace")
        self.slowest, self.highest = max(self.slowest, seconds), highest
        self.peak = (highest - self.start) / 1000
        if fault:
            self.fail(fault, data)
        elif outcome == "accepted":
            self.accepted += 1
        else:
            self.rejected += 1
        self.note(0)
        return re.sub(r"b?'[^']*'|b?\"[^\"]*\"|[\d.]+", "", fault or outcome)[-160:]

    def fail(self, fault: str, data: bytes) -> None:
        """Save an input unless one with the same fault was saved."""
        self.failed += 1
        kind = re.sub(r"b?'[^']*'|[\d.]+", "", fault.strip().splitlines()[-1])
        kind += "".join(re.findall(r"line \d+, in \w+", fault)[-2:])
        if kind not in self.kinds and len(self.kinds) < MOST_FAILURES:
            self.kinds.add(kind)
            save(self.failures, data, fault, self.begun, self.parser.suffix)


def save(folder: str, data: bytes, fault: str, number: int, suffix: str) -> None:
    """Write an input that failed, and why beside it."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{number:07}{suffix}")
    with open(path, "wb") as file:
        file.write(data)
    with open(path + ".why", "w", errors="replace") as file:
        file.write(fault)


def make_input(parser: Parser, rng: random.Random, corpus: list[bytes]) -> bytes:
    """A mutation of one of the corpus; three of four have right checksums."""
    data = (parser.mutate or mutate_bytes)(rng.choice(corpus), rng, corpus)
    return (parser.repair(data, rng) if rng.random() < 0.75 else data)[:LONGEST]


def child(name: str, folder: str, state: mmap.mmap, failures: str, inputs: int, seed: int, guided: bool) -> None:
    """Fuzz a parser in this process."""
    parser = PARSERS[name]
    output = os.open(os.path.join(folder, "output"), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    atheris: Any = None
    if guided:
        atheris = importlib.import_module("atheris")
        with atheris.instrument_imports(include=["prep", "train.recipe", "model.weights"]):
            pass
    seeds = parser.seeds()
    os.dup2(output, 1)
    os.dup2(output, 2)
    trial = Trial(parser, folder, state, failures)
    for data in seeds:
        assert name == "recipe" or trial.run(data) == "accepted", "a seed is not valid"
    trial.begun = trial.accepted = trial.rejected = 0
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, resource.RLIM_INFINITY))
    if atheris:
        corpus = os.path.join(folder, "corpus")
        os.mkdir(corpus)
        for number, data in enumerate(seeds):
            with open(os.path.join(corpus, str(number)), "wb") as file:
                file.write(data)
        arguments = [sys.argv[0], f"-runs={inputs}", f"-seed={seed + 1}", f"-max_len={LONGEST}",
                     "-timeout=0", "-rss_limit_mb=0", "-len_control=0", corpus]  # fmt: skip
        atheris.Setup(
            arguments, trial.run,
            custom_mutator=lambda data, size, seed: make_input(parser, random.Random(seed), [*seeds, data]),
        )  # fmt: skip
        atheris.Fuzz()
    rng, corpus, seen = random.Random(seed), list(seeds), {"accepted"}
    while trial.begun < inputs and len(trial.kinds) < MOST_FAILURES:
        data = make_input(parser, rng, corpus)
        outcome = trial.run(data)
        if outcome not in seen and len(corpus) < CORPUS:
            seen.add(outcome)
            corpus.append(data)


# --- In the parent: watches the child -------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has taken."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fuzz(name: str, options: argparse.Namespace) -> list[str]:
    """Fuzz one parser in child processes, a new one after each crash; returns its row."""
    parser, failures = PARSERS[name], os.path.join(options.failures, name)
    state, began, crashes, seed = mmap.mmap(-1, STATE.size + LONGEST), time.monotonic(), 0, options.seed
    while True:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            pid = os.fork()
            if not pid:
                status = 70
                try:
                    child(name, folder, state, failures, options.inputs, seed, options.atheris)
                    status = 0
                except BaseException:
                    os.write(options.terminal, traceback.format_exc().encode())
                finally:
                    os._exit(status)
            fault = watch(pid, state)
        begun, accepted, rejected, failed, slowest, peak, length = STATE.unpack_from(state)
        if fault and length:
            crashes += 1
            save(failures, state[STATE.size : STATE.size + length], fault, begun, parser.suffix)
            STATE.pack_into(state, 0, begun, accepted, rejected, failed + 1, slowest, peak, 0)
            seed += 1
        if not fault or not length or begun >= options.inputs or crashes >= MOST_FAILURES:
            break
    failed = STATE.unpack_from(state)[3]
    if fault and not length:
        failed += 1
    rate = begun / (time.monotonic() - began)
    return [name, f"{begun:,}", f"{accepted:,}", f"{rejected:,}", f"{rate:,.0f}",
            f"{1000 * slowest:.1f}", f"{peak:.1f}", f"{failed:,}"]  # fmt: skip


def watch(pid: int, state: mmap.mmap) -> str | None:
    """Wait for a child; returns how it failed, or None. One that stays at an input is killed."""
    last, since, cpu = -1, time.monotonic(), 0.0
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return None if status == 0 else f"the process ended with status {status} (of wait)"
        begun, length = STATE.unpack_from(state)[0], STATE.unpack_from(state)[-1]
        if begun != last or not length:
            last, since, cpu = begun, time.monotonic(), cpu_seconds(pid)
        elif cpu_seconds(pid) - cpu > LIMIT_S or time.monotonic() - since > 30:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "it did not end"
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Give damaged and hostile files to every parser.")
    parser.add_argument("--parser", nargs="+", choices=PARSERS, default=list(PARSERS), metavar="NAME",
                        help=f"of {', '.join(PARSERS)} (default: all)")  # fmt: skip
    parser.add_argument("--inputs", type=int, default=100_000, help="of each; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    parser.add_argument("--file", help="give this one input to --parser NAME, and show what happens")
    parser.add_argument("--failures", default=os.path.join(tempfile.gettempdir(), "fuzz"), metavar="DIR",
                        help="where inputs that fail are kept (default: %(default)s)")  # fmt: skip
    options = parser.parse_args()
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's log as the commands have it: errors
    options.work = "/dev/shm" if os.path.isdir("/dev/shm") else None
    options.terminal = os.dup(2)
    if options.file:
        with open(options.file, "rb") as file, tempfile.TemporaryDirectory() as folder:
            data, (name,) = file.read(), options.parser
            path = os.path.join(folder, "manifest.json" if name == "manifest" else
                                "input" + PARSERS[name].suffix)  # fmt: skip
            pathlib.Path(path).write_bytes(data)
            PARSERS[name].parse(path, data)
        return
    if not options.atheris:
        importlib.import_module("cv2")  # once for all children

    from tests.bench.material import print_table

    header = ["parser", "inputs", "accepted", "rejected", "inputs/s", "slowest, ms CPU", "peak, MB",
              "failures"]  # fmt: skip
    rows = []
    for name in options.parser:
        rows.append(fuzz(name, options))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print_table(header, rows)
    failed = [row[0] for row in rows if row[-1] != "0"]
    for name in failed:
        folder = os.path.join(options.failures, name)
        for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if file.endswith(".why"):
                path = os.path.join(folder, file)
                why = pathlib.Path(path).read_text().strip().splitlines()[-1][:300]
                again = f"--parser {name} --file {path.removesuffix('.why')}"
                print(f"\n{why}\n  again: python tests/bench/fuzz.py {again}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
