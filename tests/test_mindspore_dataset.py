"""`prep.dataset`: converted data for a training loop of someone else's."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore.dataset
import numpy as np
import pytest
import tiny

import prep
from launch.errors import UserError
from prep import datasets, reader
from prep.datasets import flyingchairs
from prep.shards import Manifest

PAIRS = 11


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chairs(tmp_path_factory.mktemp("chairs") / "data", PAIRS)


@pytest.fixture(scope="module")
def converted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    everything = tiny.split_file(folder / "split.txt", [10])
    return tiny.convert("flyingchairs", root, folder / "out", "--shards", 3, "--split-file", everything)


@pytest.fixture(scope="module")
def images(root: Path) -> list[bytes]:
    """The first image of each training pair, by index."""
    return [datasets.read_pair(pair)["image1"].tobytes() for pair in flyingchairs.list_pairs(root, "")[:10]]


def rows_of(dataset: mindspore.dataset.Dataset) -> list[dict[str, np.ndarray]]:
    """The rows of one epoch by column."""
    rows: Any = dataset.create_dict_iterator(num_epochs=1, output_numpy=True)
    return list(rows)


def test_importing_prep_does_not_start_mindspore() -> None:
    code = "import sys, prep; sys.exit('mindspore' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT).returncode == 0


def test_every_pair_comes_back_bit_for_bit_under_its_column(root: Path, converted: Path) -> None:
    rows = rows_of(prep.dataset(converted, shuffle=False))
    pairs = flyingchairs.list_pairs(root, "")[:10]
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        sample = datasets.read_pair(pair)
        assert sorted(row) == ["flow", "image1", "image2", "valid"]
        for column, array in row.items():
            assert array.dtype == sample[column].dtype and array.shape == sample[column].shape
            assert array.tobytes() == sample[column].tobytes()


def test_batches_hold_whole_pairs_and_report_their_number(converted: Path) -> None:
    dataset = prep.dataset(converted, batch_size=4, seed=1)
    assert dataset.get_dataset_size() == 2
    shapes = [batch["flow"].shape for batch in rows_of(dataset)]
    assert shapes == [(4, 24, 40, 2)] * 2
    assert prep.dataset(converted, batch_size=4, shuffle=False).get_dataset_size() == 3


def test_each_epoch_is_the_readers_permutation_of_seed_and_epoch(converted: Path, images: list[bytes]) -> None:
    dataset = prep.dataset(converted, seed=5)
    for epoch in range(2):
        order = [images.index(row["image1"].tobytes()) for row in rows_of(dataset)]
        assert order == reader.epoch_order(10, 5, epoch).tolist()
    repeated = [images.index(row["image1"].tobytes()) for row in rows_of(prep.dataset(converted, seed=5).repeat(2))]
    assert repeated == [*reader.epoch_order(10, 5, 0).tolist(), *reader.epoch_order(10, 5, 1).tolist()]


@pytest.mark.parametrize("shuffle, number", [(True, 9), (False, 10)])
def test_shards_share_an_epoch_without_overlap(
    converted: Path, images: list[bytes], shuffle: bool, number: int
) -> None:
    """Shuffled ones are of equal length, so that no rank waits for another."""
    shares = [rows_of(prep.dataset(converted, shuffle=shuffle, shard=(rank, 3))) for rank in range(3)]
    seen = [[images.index(row["image1"].tobytes()) for row in rows] for rows in shares]
    together = [index for share in seen for index in share]
    assert len(together) == len(set(together)) == number
    assert {len(share) for share in seen} == ({3} if shuffle else {3, 4})


def test_it_goes_through_map_and_batch_as_any_dataset_does(converted: Path) -> None:
    def crop(image: np.ndarray) -> np.ndarray:
        return image[:16, :32].astype(np.float32) / 255

    dataset = prep.dataset(converted, "val", shuffle=False).map(crop, ["image1"]).batch(1)
    (batch,) = rows_of(dataset)
    assert batch["image1"].shape == (1, 16, 32, 3) and batch["image2"].shape == (1, 24, 40, 3)


def test_unknown_flow_is_zero_and_invalid(tmp_path: Path) -> None:
    """NaN times a weight of 0 would still spoil a loss."""
    release = tiny.kitti(tmp_path / "kitti", 2)
    out = tiny.convert("kitti2015", release, tmp_path / "out", "--split-file", tiny.split_file(tmp_path / "none", []))
    for row in rows_of(prep.dataset(out)):
        assert 0 < row["valid"].mean() < 1 and (row["flow"][row["valid"] == 0] == 0).all()
    with pytest.raises(UserError, match="pairs of different sizes, which cannot share a batch"):
        prep.dataset(out, batch_size=2)


def test_mistakes_are_named_before_anything_is_read(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest.json: not found; expected a folder written by prep/convert.py"):
        prep.dataset(tmp_path)
    with pytest.raises(UserError, match="has no split 'training'; it has train, val"):
        prep.dataset(converted, "training")
    with pytest.raises(UserError, match=r"shard \(2, 2\): expected"):
        prep.dataset(converted, shard=(2, 2))
    with pytest.raises(UserError, match="has 10 pairs, too few for 3 shard"):
        prep.dataset(converted, batch_size=4, shard=(0, 3))


def test_damage_is_an_error_that_names_the_file(converted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(converted, tmp_path / "copy")
    shard = Manifest.load(copy).shards_of("train", copy)[0]
    with open(copy / shard.file, "r+b") as file:
        file.seek(next(shard.records(copy)).offset + 300)
        file.write(b"\0\1\2\3")
    with pytest.raises(RuntimeError, match=f"{shard.file}: .* is damaged"):
        rows_of(prep.dataset(copy, shuffle=False))
