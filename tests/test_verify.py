"""Checking a converted set: whatever is wrong with it is found, all of it, and named."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from prep import verify
from prep.errors import UserError
from prep.shards import Manifest


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    data = tiny.chairs(folder / "data", 9)
    tiny.chairs(data, 3, width=56)  # two sizes
    list_file = tiny.split_file(folder / "split.txt", [0, 5])
    return tiny.convert(
        "flyingchairs", data, folder / "a set é?#", "--shards", 2, "--split-file", list_file
    )


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy é?#")


def problems(folder, deep):
    manifest = Manifest.load(folder)
    return [line for _, found in verify.check_set(manifest, folder, deep, 2) for line in found]


def run_verify(*arguments, cwd=tiny.ROOT.parent):
    command = [sys.executable, tiny.ROOT / "prep" / "verify.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=60)


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def shards_of(folder):
    return list(Manifest.load(folder).shards.values())


@pytest.mark.parametrize("deep", [False, True])
def test_a_good_set(converted, deep):
    assert problems(converted, deep) == []
    done = run_verify(converted, *["--deep"] * deep, cwd=tiny.ROOT / "prep")
    assert done.returncode == 0 and "9 pairs in 3 shards, " in done.stdout, done.stderr


def test_one_flipped_bit_anywhere_in_a_shard_is_found(copy):
    rng = np.random.default_rng(0)
    for shard in shards_of(copy)[:2]:
        for suffix, size in (("", shard.bytes), (".db", shard.index_bytes)):
            path = copy / (shard.file + suffix)
            for offset in [0, size - 1, *rng.integers(0, size, 15)]:
                flip(path, offset)
                found = problems(copy, deep=True)
                assert found and all(str(path) in line and "damaged" in line for line in found), (
                    offset
                )
                flip(path, offset)
    assert problems(copy, deep=True) == []


def test_one_flipped_bit_anywhere_in_the_manifest_is_found(copy):
    path = copy / "manifest.json"
    size = path.stat().st_size
    for offset in [0, size - 3, *np.random.default_rng(1).integers(0, size - 1, 200)]:
        flip(path, offset)
        with pytest.raises(UserError, match=f"{re.escape(str(path))}: (damaged|schema version)"):
            Manifest.load(copy)
        flip(path, offset)
    assert Manifest.load(copy)


def test_every_damaged_pair_is_named_and_no_other(copy):
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
    assert "its SHA-256 is not the one in the set's manifest" in found[2]


def test_all_problems_are_printed_not_only_the_first(copy):
    first, second, third = [copy / shard.file for shard in shards_of(copy)]
    os.truncate(first, 5000)
    second.rename(copy / "renamed.mindrecord")
    flip(third, 100)
    done = run_verify(copy)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{first}: 5000 bytes, expected" in done.stdout
    assert f"{second}: not there, but the set's manifest names it" in done.stdout
    assert f"{third}: damaged" in done.stdout
    assert f"note: {copy}/renamed.mindrecord: not in the set's manifest" in done.stdout
    assert done.stderr.splitlines()[-1] == f"error: {copy}: 9 pairs in 3 shards, 3 problems (above)"


def test_a_folder_that_is_not_a_set(tmp_path):
    done = run_verify(tmp_path)
    assert done.returncode == 1 and "expected a folder written by prep/convert.py" in done.stderr


def test_a_manifest_that_is_of_other_pairs(copy):
    """Names and sizes are in the manifest too, and must be those of the records."""
    manifest = Manifest.load(copy)
    shard = manifest.shards[manifest.splits["train"][-1]]
    number, height, width = shard.sizes[0]
    for wrong, message in (
        ({"names": ["00077", *shard.names[1:]]}, "pair 00077 is damaged"),
        (
            {"sizes": [(number, height, width + 1)]},
            f"is {width}x{height}, but {width + 1}x{height} in",
        ),
    ):
        changed = {**manifest.shards, shard.file: dataclasses.replace(shard, **wrong)}
        dataclasses.replace(manifest, shards=changed).save(copy)
        assert message in problems(copy, deep=True)[0]
