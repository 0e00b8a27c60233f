"""Checking a converted dataset: all damage is found and named."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from launch.errors import UserError
from prep import shards, verify
from prep.reader import DatasetSplit
from prep.shards import Manifest


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    data = tiny.chairs(folder / "data", 9)
    tiny.chairs(data, 3, width=56)  # two sizes
    list_file = tiny.split_file(folder / "split.txt", [0, 5])
    return tiny.convert("flyingchairs", data, folder / "a set é?#", "--shards", 2, "--split-file", list_file)


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "copy é?#")


def problems(folder: Path, deep: bool) -> list[str]:
    manifest = Manifest.load(folder)
    return list(verify.find_problems(manifest, folder, deep=deep, workers=2))


def run_verify(*arguments: Any, cwd: Path = tiny.ROOT.parent) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tiny.ROOT / "prep" / "verify.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=60)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def shards_of(folder: Path) -> list[shards.Shard]:
    return list(Manifest.load(folder).shards.values())


@pytest.mark.parametrize("deep", [False, True])
def test_an_intact_dataset_has_no_problems(converted: Path, deep: bool) -> None:
    assert problems(converted, deep) == []
    done = run_verify(converted, *["--deep"] * deep, cwd=tiny.ROOT / "prep")
    assert done.returncode == 0 and "9 pairs in 3 shards, " in done.stdout, done.stderr


def test_one_flipped_bit_anywhere_in_a_shard_is_found(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in shards_of(copy)[:2]:
        for suffix, size in (("", shard.bytes), (".db", shard.index_bytes)):
            path = copy / (shard.file + suffix)
            for offset in [0, size - 1, *rng.integers(0, size, 15)]:
                flip(path, offset)
                found = problems(copy, deep=True)
                assert found and all(str(path) in line and "damaged" in line for line in found), offset
                flip(path, offset)
    assert problems(copy, deep=True) == []


def test_one_flipped_bit_anywhere_in_the_manifest_is_found(copy: Path) -> None:
    path = copy / "manifest.json"
    size = path.stat().st_size
    for offset in [0, size - 3, *np.random.default_rng(1).integers(0, size - 1, 200)]:
        flip(path, offset)
        with pytest.raises(UserError, match=f"{re.escape(str(path))}: (damaged|schema version)"):
            Manifest.load(copy)
        flip(path, offset)
    assert Manifest.load(copy)


def test_every_damaged_pair_is_named_and_no_other(copy: Path) -> None:
    shard = shards_of(copy)[0]
    path = copy / shard.file
    offsets = [offset for offset, _ in shard.records(copy)]
    flip(path, offsets[0] + 400)
    flip(path, offsets[2] + 9)
    assert problems(copy, deep=False) == []
    found = problems(copy, deep=True)
    assert len(found) == 3
    assert f"of pair {shard.names[0]} is damaged" in found[0]
    assert f"the record of pair {shard.names[2]} is damaged" in found[1]
    assert "its SHA-256 is not the one in the manifest" in found[2]


def test_all_problems_are_printed_not_only_the_first(copy: Path) -> None:
    first, second, third = [copy / shard.file for shard in shards_of(copy)]
    os.truncate(first, 5000)
    second.rename(copy / "renamed.mindrecord")
    flip(third, 100)
    done = run_verify(copy)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{first}: 5000 bytes, but" in done.stdout
    assert f"{second}: missing, but listed in the manifest" in done.stdout
    assert f"{third}: damaged" in done.stdout
    assert f"note: {copy}/renamed.mindrecord: not in the manifest" in done.stdout
    assert done.stderr.splitlines()[-1] == f"error: {copy}: 9 pairs in 3 shards, 3 problems (above)"


def test_a_folder_without_a_dataset_is_an_error(tmp_path: Path) -> None:
    done = run_verify(tmp_path)
    assert done.returncode == 1 and "expected a folder written by prep/convert.py" in done.stderr


def test_a_manifest_that_is_of_other_pairs(copy: Path) -> None:
    """The manifest repeats names and sizes, which must be those of the records."""
    manifest = Manifest.load(copy)
    shard = manifest.shards[manifest.splits["train"][-1]]
    number, height, width = shard.sizes[0]
    for wrong, message in (
        ({"names": ["00077", *shard.names[1:]]}, "pair 00077 is damaged"),
        (
            {"sizes": [(number, height, width + 1)]},
            f"image1 of pair {shard.names[0]} is {width}x{height} (3 of b'B'), but "
            f"the manifest says {width + 1}x{height} uint8",
        ),
    ):
        changed = {**manifest.shards, shard.file: dataclasses.replace(shard, **wrong)}
        dataclasses.replace(manifest, shards=changed).save(copy)
        assert message in problems(copy, deep=True)[0]


# --- Sets that were made to do harm: their hashes are right ----------------------------------------


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest by `change(fields)` and correct its hash."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    change(fields)
    path.write_text(json.dumps({**fields, "sha256": shards.hash_fields(fields)}))


def forge_file(folder: Path, suffix: str, change: Callable[[Path], None]) -> None:
    """Change the first shard's file or index by `change(path)` and correct its hashes."""
    shard = shards_of(folder)[0]
    path = folder / (shard.file + suffix)
    change(path)
    kind, size = ("index", path.stat().st_size) if suffix else ("header", shard.header_bytes)
    hashes = {f"{kind}_bytes": size, f"{kind}_sha256": shards.hash_file(path, size)}
    if not suffix:
        hashes |= {"bytes": path.stat().st_size, "sha256": shards.hash_file(path, 1 << 40)}
    forge(folder, lambda fields: fields["shards"][0].update(hashes))


def put(*place: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a manifest: its value at all but the last of `place` becomes the last one."""
    *keys, last, value = place

    def change(fields: dict[str, Any]) -> None:
        for key in keys:
            fields = fields[key]
        fields[last] = value

    return change


FIRST = ("shards", 0)


@pytest.mark.parametrize("change,message", [
    (put("schema_version", 0), "schema_version is 0, expected an integer from 1"),
    (put("schema_version", -1), "schema_version is -1"),
    (put("schema_version", "1"), "schema_version is '1'"),
    (put("schema_version", True), "schema_version is True"),
    (put("schema_version", 1.0), "schema_version is 1.0"),
    (put("schema_version", None), "schema_version is None"),
    (put("dataset", 5), "dataset is 5, expected text"),
    (put("dataset", "\x1b[2J"), "dataset is '.x1b.2J', expected text without control characters"),
    (put("splits", []), "splits is .*, expected an object"),
    (put("splits", "train", "x"), "splits.train is 'x', expected a list"),
    (put("splits", "train", 0, {}), r"splits.train\[0\] is {}, expected a plain file name"),
    (put("splits", "train", ["a.mindrecord"]), "split train lists a shard twice or one that does not exist"),
    (lambda fields: fields["splits"]["val"].extend(fields["splits"]["val"]), "a shard twice"),
    (put("shards", {}), "shards is {}, expected a list"),
    (put("shards", 0, []), r"shards\[0\] is \[\], expected an object with file, bytes"),
    (lambda fields: fields["shards"].append(fields["shards"][0]), "two of its shards have the same name"),
    (lambda fields: fields.pop("shards"), "shards is None, expected a list"),
    (lambda fields: fields.pop("made"), "expected an object with dataset, schema_version"),
    (put("unheard of", 1), "expected an object with dataset, schema_version"),
    (put("validation", None), "validation is None, expected an object with file, sha256"),
    (put("validation", "sha256", "0"), "validation.sha256 is '0', expected a SHA-256"),
    (put("made", "command", None), "made.command is None"),
    (put("made", "versions", []), "made.versions is"),
    (put("made", "plan", 1), "made.plan is 1, expected an object"),
    (put(*FIRST, "file", "../train-00000-of-00002.mindrecord"), r"shards\[0\].file is '../train"),
    (put(*FIRST, "file", "/etc/passwd"), r"file is '/etc/passwd', expected a plain file name"),
    (put(*FIRST, "bytes", "5"), "bytes is '5', expected an integer"),
    (put(*FIRST, "labelled", 0), "labelled is 0, expected true or false"),
    (lambda fields: fields["shards"][0].pop("sizes"), r"shards\[0\] is .*, expected an object with file, bytes"),
    (put(*FIRST, "bytes", -5), "bytes is -5"),
    (put(*FIRST, "bytes", 1e9), "bytes is 1000000000.0"),
    (put(*FIRST, "header_bytes", 10**12), "its header is longer than its file"),
    (put(*FIRST, "sha256", "F" * 64), "sha256 is 'FFF"),
    (put(*FIRST, "names", None), "names is None, expected a list"),
    (put(*FIRST, "names", 0, 1), r"names\[0\] is 1"),
    (put(*FIRST, "sizes", [[10**12, 24, 40]]), "numbers of names and sizes differ"),
    (put(*FIRST, "sizes", [[10**12, 24, 40], [3 - 10**12, 24, 40]]), r"sizes\[1\]\[0\] is -"),
    (put(*FIRST, "sizes", [[4, 24]]), r"sizes\[0\] is \[4, 24\], expected a list of 3"),
    (put(*FIRST, "sizes", [[4, 24, "40"]]), r"sizes\[0\]\[2\] is '40'"),
    (put(*FIRST, "sizes", [[3, 60000, 60000]]), "a pair of 60000x60000 does not fit"),
])  # fmt: skip
def test_a_manifest_of_wrong_types_is_one_line(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    forge(copy, lambda fields: None)
    assert problems(copy, deep=False) == [], "an unchanged manifest with a new hash is valid"
    forge(copy, change)
    with pytest.raises(UserError, match=f"manifest.json: damaged .*{message}") as raised:
        Manifest.load(copy)
    assert len(str(raised.value)) < 1000


def test_a_shard_outside_the_folder_is_not_opened(copy: Path) -> None:
    """Otherwise, whoever sends a dataset could have any file read, or learn whether it exists."""
    name = shards_of(copy)[0].file
    for suffix in ("", ".db"):
        (copy / (name + suffix)).rename(copy.parent / (name + suffix))
    for path in (f"../{name}", str(copy.parent / name), "./" + name, "..", "a\0.mindrecord"):
        forge(copy, put(*FIRST, "file", path))
        done = run_verify(copy)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "expected a plain file name" in done.stderr


def change_index(*commands: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as index:
            for command in commands:
                index.execute(command)
            index.commit()

    return change


ENDLESS = (
    "DROP TABLE INDEXES",
    "CREATE VIEW INDEXES AS WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n) SELECT "
    "i ROW_ID, 1 PAGE_ID_RAW, 0 PAGE_OFFSET_RAW, 20 PAGE_OFFSET_RAW_END, 0 PAGE_ID_BLOB, "
    "0 PAGE_OFFSET_BLOB, 99 PAGE_OFFSET_BLOB_END FROM n",
)
COMPUTED = (
    "ALTER TABLE INDEXES RENAME COLUMN PAGE_ID_RAW TO X",
    "ALTER TABLE INDEXES ADD COLUMN PAGE_ID_RAW AS (length(zeroblob(900000000)))",
)


@pytest.mark.parametrize("commands,message", [
    (["UPDATE INDEXES SET PAGE_ID_BLOB = 1000000"], "row 0 of the index points outside the file"),
    (["UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = 1 << 62"], "points outside the file"),
    (["UPDATE INDEXES SET PAGE_OFFSET_RAW_END = 1 << 62"], "points outside the file"),
    (["UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = PAGE_OFFSET_BLOB"], "points outside the file"),
    (["UPDATE INDEXES SET PAGE_OFFSET_BLOB = -8"], "row 0 of the index is invalid"),
    (["UPDATE INDEXES SET PAGE_ID_BLOB = 'x'"], "row 0 of the index is invalid"),
    (["UPDATE INDEXES SET ROW_ID = ROW_ID + 10"], "row 0 of the index is invalid"),
    (["DELETE FROM INDEXES WHERE ROW_ID = 2"], "the index has 2 rows"),
    (["DROP TABLE INDEXES"], "not a shard of 3 pairs"),
    (ENDLESS, "its index is not a plain table"),
    (COMPUTED, "its index is not a plain table"),
])  # fmt: skip
def test_a_manipulated_index_is_an_error(copy: Path, commands: Sequence[str], message: str) -> None:
    """Neither this toolkit may follow it nor MindSpore, which trusts it."""
    forge_file(copy, ".db", change_index(*commands))
    (line,) = problems(copy, deep=True)
    assert message in line and shards_of(copy)[0].file in line
    with pytest.raises(UserError, match=message):
        DatasetSplit.open(copy, "train")


@pytest.mark.parametrize("header,message", [
    (b"\xff" * 8, "not a shard"),
    (struct.pack("<Q", 2) + b"[]", "not a shard"),
    (struct.pack("<Q", 4) + b"null", "not a shard"),
    (struct.pack("<Q", 60000) + b"[" * 60000, "not a shard"),
    (struct.pack("<Q", 16) + b'{"page_size": 0}', "page_size is 0"),
    (struct.pack("<Q", 49) + b'{"page_size": 131072, "shard_addresses": ["/a"]} ', "another shard"),
])  # fmt: skip
def test_a_manipulated_header_is_an_error(copy: Path, header: bytes, message: str) -> None:
    def change(path: Path) -> None:
        path.write_bytes(header + path.read_bytes()[len(header) :])

    forge_file(copy, "", change)
    (line,) = problems(copy, deep=True)
    assert message in line and shards_of(copy)[0].file in line
