"""Reading a converted dataset: bytes, order over ranks and epochs, evaluation, mixtures, damage."""

import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.errors import UserError
from prep import datasets, reader
from prep.datasets import Sample, flyingchairs, sintel
from prep.shards import Manifest

PAIRS, VAL = 17, [3, 5, 6, 16]  # 13 training pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chairs(tmp_path_factory.mktemp("chairs") / "data", PAIRS)


@pytest.fixture(scope="module")
def converted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    list_file = tiny.split_file(folder / "split.txt", VAL)
    return tiny.convert("flyingchairs", root, folder / "out", "--shards", 3, "--split-file", list_file)


def train_indices(directory: Path, **options: Any) -> list[list[int]]:
    return [tiny.indices(batch) for batch in tiny.training(directory, **options)]


def flip_byte(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


# --- Order ----------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 2**31), st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(pairs: int, seed: int, epoch: int) -> None:
    assert sorted(reader.epoch_order(pairs, seed, epoch).tolist()) == list(range(pairs))


def test_epoch_order_never_changes() -> None:
    """If an update changed it, runs that began before could not resume."""
    assert reader.epoch_order(8, 1, 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]


def test_orders_differ_between_epochs_seeds_and_sources() -> None:
    orders = [reader.epoch_order(100, *key).tolist() for key in ((0, 0), (0, 1), (1, 0), (0, 0, 1))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 10)), min_size=1, max_size=4),
       st.integers(0, 5000), st.integers(1, 3000))  # fmt: skip
def test_any_stretch_of_the_stream_is_the_same_as_that_of_the_whole(
    sources: list[tuple[int, float]], start: int, length: int
) -> None:
    """For resuming: positions drawn from the middle are those of an uninterrupted run."""
    counts, weights = [pairs for pairs, _ in sources], [weight for _, weight in sources]
    whole = reader.draw(np.arange(start + length), counts, weights, 7)
    part = reader.draw(np.arange(start, start + length), counts, weights, 7)
    for field in ("source", "epoch", "index"):
        assert np.array_equal(getattr(whole, field)[start:], getattr(part, field))


def test_a_mixture_takes_each_sources_share_and_its_epochs_whole() -> None:
    drawn = reader.draw(np.arange(5000), (10, 700), (1, 3), 0)
    source, epoch, index = drawn.source, drawn.epoch, drawn.index
    assert np.bincount(source).tolist() == [1250, 3750]
    for pairs, which in ((10, 0), (700, 1)):
        mine = source == which
        for e in range(3):
            seen = index[mine & (epoch == e)]
            assert sorted(seen.tolist()) == list(range(pairs))


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_every_pair_comes_back_byte_for_byte(root: Path, tmp_path: Path, codec: str) -> None:
    out = tiny.convert("flyingchairs", root, tmp_path / "set", "--shards", 4, "--codec", codec)
    pairs = {p.name: p for p in flyingchairs.list_pairs(root, "")}
    for split in ("train", "val"):
        names = reader.DatasetSplit.open(out, split).names
        for batch in tiny.evaluation(out, split, batch=1):
            for name, array in datasets.read_pair(pairs.pop(names[tiny.indices(batch)[0]])).items():
                assert getattr(batch, name).dtype == array.dtype
                assert getattr(batch, name)[0].tobytes() == array.tobytes(), name
    assert not pairs


def test_the_order_is_one_whatever_the_ranks_workers_and_first_step(converted: Path) -> None:
    one = train_indices(converted, batch=6, steps=7, seed=3)
    ranks = [train_indices(converted, batch=2, rank=r, ranks=3, steps=7, seed=3, workers=r + 1)
             for r in range(3)]  # fmt: skip
    assert one == [a + b + c for a, b, c in zip(*ranks, strict=True)]
    assert one[4:] == train_indices(converted, batch=6, first_step=4, steps=3, seed=3)
    stream = [index for indices in one for index in indices]
    assert stream[:13] == reader.epoch_order(13, 3, 0).tolist()
    assert sorted(stream[13:26]) == list(range(13))


def test_index_names_the_pair_that_is_in_the_batch(root: Path, converted: Path) -> None:
    names, pairs = reader.DatasetSplit.open(converted, "train").names, flyingchairs.list_pairs(root, "")
    by_name = {p.name: datasets.read_pair(p)["image1"] for p in pairs}
    for batch in tiny.training(converted, batch=4, steps=5):
        for image, i in zip(batch.image1, tiny.indices(batch), strict=True):
            assert np.array_equal(image, by_name[names[i]])


def test_augmentation_depends_on_seed_epoch_and_pair_alone(converted: Path) -> None:
    def crop(sample: Sample, rng: np.random.Generator) -> Sample:
        y, x = rng.integers(0, 8, 2)
        return {k: v[y : y + 16, x : x + 24] for k, v in sample.items()}

    def images(**options: Any) -> np.ndarray:
        batches = tiny.training(converted, transform=crop, **options)
        return np.concatenate([batch.image1 for batch in batches])

    one = images(batch=4, steps=8)
    assert one.shape == (32, 16, 24, 3)
    assert np.array_equal(one, images(batch=2, steps=16, workers=1))
    assert np.array_equal(one[16:], images(batch=4, first_step=4, steps=4))


def test_a_mixture_of_datasets_with_different_sizes_needs_a_crop(converted: Path, tmp_path: Path) -> None:
    wide = tiny.convert("flyingchairs", tiny.chairs(tmp_path / "data", 6, width=64), tmp_path / "out")
    mixture = [(reader.DatasetSplit.open(folder, "train"), 1) for folder in (converted, wide)]
    batches = reader.training_batches(
        mixture, batch=4, steps=10, transform=lambda s, rng: {k: v[:16, :16] for k, v in s.items()}
    )
    seen = [index for batch in batches for index in tiny.indices(batch)]
    assert set(seen) == set(range(13 + len(mixture[1][0])))
    with pytest.raises(UserError, match="different sizes need a transform"):
        list(reader.training_batches(mixture, batch=4, steps=10))


def test_fewer_pairs_than_a_global_batch(converted: Path) -> None:
    with pytest.raises(UserError, match=r"has 13 pairs.*take 14 per step"):
        next(tiny.training(converted, batch=7, ranks=2, steps=1))


def test_an_error_in_a_transform_is_not_hidden(converted: Path) -> None:
    def broken(sample: Sample, rng: np.random.Generator) -> NoReturn:
        raise ZeroDivisionError("a bug in the transform")

    with pytest.raises(ZeroDivisionError, match="a bug in the transform"):
        list(tiny.training(converted, batch=2, steps=2, transform=broken))


# --- Evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks,batch", [(1, 1), (1, 3), (2, 2), (3, 4)])
def test_evaluation_takes_each_pair_once_over_all_ranks(converted: Path, ranks: int, batch: int) -> None:
    shares = [
        [tiny.indices(found) for found in tiny.evaluation(converted, "train", batch=batch, rank=r, ranks=ranks)]
        for r in range(ranks)
    ]  # fmt: skip
    assert len({len(share) for share in shares}) == 1, "ranks would wait for each other for ever"
    seen = [i for share in shares for indices in share for i in indices]
    assert sorted(i for i in seen if i >= 0) == list(range(13))
    assert all(len(indices) == batch for share in shares for indices in share)


def test_shards_of_pairs_of_different_sizes(tmp_path: Path) -> None:
    """MindRecord reads shards together only if their page and header sizes are equal: the largest pair decides."""
    release = tiny.kitti(tmp_path / "kitti", 12)
    out = tiny.convert(
        "kitti2015", release, tmp_path / "set", "--shards", 4, "--split-file", tiny.split_file(tmp_path / "split", [0])
    )
    sizes = [batch.image1.shape[1:3] for batch in tiny.evaluation(out, "train", batch=1)]
    assert sorted(sizes) == [(24, 40 + 8 * number) for number in range(1, 12)]


def test_evaluation_keeps_sizes_apart(tmp_path: Path) -> None:
    data = tiny.chairs(tmp_path / "data", 9)
    tiny.chairs(data, 4, width=56)  # 00001 to 00004 are wider
    none = tiny.split_file(tmp_path / "none.txt", [])
    out = tiny.convert("flyingchairs", data, tmp_path / "out", "--split-file", none)
    widths = [(batch.image1.shape[2], tiny.indices(batch)) for batch in tiny.evaluation(out, "train", batch=3)]
    assert widths == [(56, [0, 1, 2]), (56, [3, -1, -1]), (40, [4, 5, 6]), (40, [7, 8, -1])]


def test_evaluation_has_what_is_occluded(tmp_path: Path) -> None:
    root = tiny.sintel(tmp_path / "sintel", {"alley_1": 4})
    everything = tiny.split_file(tmp_path / "val.txt", range(3))
    out = tiny.convert("sintel", root, tmp_path / "out", "--split-file", everything)
    names = reader.DatasetSplit.open(out, "val").names
    pairs = {p.name: p for render_pass in sintel.SINTEL.passes for p in sintel.list_pairs(root, render_pass)}
    for batch in tiny.evaluation(out, "val", batch=2):
        for i, position in enumerate(tiny.indices(batch)):
            expected = datasets.read_pair(pairs[names[position]])["occluded"]
            assert expected.any() and np.array_equal(tiny.occluded(batch)[i], expected)
            assert tiny.occluded(batch).dtype == np.uint8 and tiny.occluded(batch).shape == batch.valid.shape


def test_an_opened_split_lists_names_and_sizes(converted: Path) -> None:
    split = reader.DatasetSplit.open(converted, "val")
    assert len(split) == len(VAL) and split.sizes.tolist() == [[24, 40]] * len(VAL)
    assert split.names == [f"{i + 1:05}" for i in VAL]


# --- Damage ---------------------------------------------------------------------------------------


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "copy")


def shard_of(folder: Path, number: int = 1) -> Path:
    return folder / Manifest.load(folder).splits["train"][number]


def read_all(folder: Path) -> list[reader.Batch]:
    return list(tiny.training(folder, batch=13, steps=1))


@pytest.mark.parametrize("how", ["cut", "removed", "renamed", "index cut"])
def test_an_incomplete_shard_is_named_at_once(copy: Path, how: str) -> None:
    path = shard_of(copy)
    if how == "cut":
        os.truncate(path, 5000)
    elif how == "removed":
        path.unlink()
    elif how == "renamed":
        path.rename(copy / "other.mindrecord")
    else:
        path = path.with_name(path.name + ".db")
        os.truncate(path, 100)
    with pytest.raises(UserError, match=f"{path}: (missing|[0-9]+ bytes, but)"):
        next(tiny.training(copy, batch=2, steps=1))


def test_a_flipped_byte_is_found_with_its_file(copy: Path) -> None:
    """Wherever it is in a shard or its index, it neither goes unnoticed nor ends the process."""
    path = shard_of(copy)
    shard = Manifest.load(copy).shards[path.name]
    record = shard.header_bytes + 8  # MindRecord's own length of a row comes first, and is not used
    rng = np.random.default_rng(0)
    places = [(path, offset, "") for offset in rng.integers(0, shard.header_bytes, 2)]
    places += [(path, record + i, "record of pair") for i in (0, 3, 19)]
    places += [(path, record + i, "pair 0000.") for i in [20, 25, 36, *rng.integers(40, 9000, 3)]]
    # The names are in pages of their own, and MindSpore itself may fail at them.
    names = [path.read_bytes().index(name.encode()) for name in shard.names[:2]]
    places += [(path, offset, "") for name in names for offset in (name - 2, name, name + 4)]
    index = path.with_name(path.name + ".db")
    places += [(index, offset, "") for offset in rng.integers(0, shard.index_bytes, 2)]
    for file, offset, what in places:
        flip_byte(file, offset)
        with pytest.raises(UserError, match=f"{file}: .*{what}.* ?damaged"):
            read_all(copy)
        flip_byte(file, offset)
    assert len(read_all(copy)) == 1


@pytest.mark.parametrize("text,message", [
    ("", "damaged"), ("[]", "damaged"), ("{}", "damaged"), ("[" * 100000, "damaged"),
    ('{"schema_version": 99}', "schema version 99, but this toolkit supports versions up to 2"),
])  # fmt: skip
def test_a_manifest_that_is_damaged_or_newer(copy: Path, text: str, message: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Manifest.load(copy)


def test_a_folder_without_a_dataset_is_an_error(tmp_path: Path, converted: Path) -> None:
    with pytest.raises(UserError, match=r"not found; expected a folder written by prep/convert.py"):
        reader.DatasetSplit.open(tmp_path, "train")
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "link").symlink_to("set")
    with pytest.raises(UserError, match="whose last run was interrupted: run the same command again to resume"):
        Manifest.load(tmp_path / "link")
    with pytest.raises(UserError, match="has no split 'test'; it has train, val"):
        reader.DatasetSplit.open(converted, "test")
