"""The reader: batches of converted datasets for training and evaluation, in a reproducible order.

Training reads an endless stream of pairs: epoch after epoch, each a permutation of the split that is a pure function of
(seed, epoch). Step b takes the next batch * ranks pairs, and each rank its share of them. So every pair is read once
per epoch over all ranks, no batch is incomplete, and the data of a step depends on neither the number of ranks nor of
threads.
"""

import collections
import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch.errors import UserError
from prep import memory
from prep.datasets import Sample
from prep.formats import StrPath
from prep.shards import Manifest, Shard, decode_record, extract_reason

TRAINING_FIELDS = ("image1", "image2", "flow", "valid")
"""The fields that are decoded for training."""

Transform = Callable[[Sample, np.random.Generator], Sample]
"""An augmentation. It runs in threads, and must return the same fields, all of one size (H, W)."""


@dataclass(frozen=True)
class Batch:
    """Pairs of one size (H, W), as NumPy arrays."""

    image1: np.ndarray
    """(B, H, W, 3) uint8 RGB."""
    image2: np.ndarray
    flow: np.ndarray
    """(B, H, W, 2) float32 in pixels, from image 1 to image 2; 0 where it is unknown."""
    valid: np.ndarray
    """(B, H, W) uint8, 1 where the flow is known: nowhere in a pair without ground truth."""
    index: np.ndarray
    """(B,) int32, position of each pair in its split, in a mixture after those of the preceding splits. PADDING for a
    pair that only fills the last batch of an evaluation."""
    occluded: np.ndarray | None = None
    """(B, H, W) uint8, 1 where the pixel is not visible in image 2; 0 in datasets without masks, None in training."""


MIXTURE_BLOCK = 1000
"""A mixture distributes its sources in blocks of this many pairs, each with every source's exact share."""

PADDING = -1
"""The index of a pair that only fills the last batch of an evaluation."""


# --- Order: pure functions ------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """A pair to read."""

    source: int
    """Number of the split in a mixture."""
    epoch: int
    """Epoch of that split."""
    index: int
    """Index of the pair in that split."""
    padding: bool = False
    """Whether it only fills the last batch of an evaluation."""


@dataclass(frozen=True)
class Positions:
    """Many pairs to read, as int64 arrays of equal shape."""

    source: np.ndarray
    epoch: np.ndarray
    index: np.ndarray


@functools.lru_cache(maxsize=8)
def epoch_order(pairs: int, seed: int, epoch: int, source: int = 0) -> np.ndarray:
    """The order of a source's pairs in an epoch: a permutation of range(pairs), int64, read-only.

    It sorts by Philox's raw numbers, because NumPy's shuffle may change between versions.
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch, source])).random_raw(pairs)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False
    return order


def mixture_block(weights: Sequence[float], seed: int, block: int) -> np.ndarray:
    """The source of each position in a block: int64 (MIXTURE_BLOCK,).

    Every block has the same number of pairs from each source, in proportion to `weights` (largest remainders).
    """
    exact = np.asarray(weights) / np.sum(weights) * MIXTURE_BLOCK
    share = np.floor(exact).astype(np.int64)
    share[np.argsort(share - exact, kind="stable")[: MIXTURE_BLOCK - share.sum()]] += 1
    sources = np.repeat(np.arange(len(share)), share)
    # No epoch order uses this source number, so the block's random numbers are its own.
    raw = np.random.Philox(np.random.SeedSequence([seed, block, 1 << 30])).random_raw(MIXTURE_BLOCK)
    return sources[np.argsort(raw, kind="stable")]


def draw(positions: np.ndarray, counts: Sequence[int], weights: Sequence[float], seed: int) -> Positions:
    """The pairs at these positions of the training stream.

    Args:
        positions: integers of any shape.
        counts: number of pairs of each source.
        weights: share of each source in the stream.
    """
    positions = np.asarray(positions, np.int64)
    source = np.zeros_like(positions)
    within = positions.copy()  # the position in the source's own endless stream
    if len(counts) > 1:
        blocks, offsets = np.divmod(positions, MIXTURE_BLOCK)
        for block in np.unique(blocks):
            here, choice = blocks == block, mixture_block(weights, seed, int(block))
            source[here] = choice[offsets[here]]
            for s in range(len(counts)):
                before, mine = np.cumsum(choice == s), here & (source == s)
                within[mine] = block * before[-1] + before[offsets[mine]] - 1
    epoch, index = np.divmod(within, np.asarray(counts, np.int64)[source])
    for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
        here = (source == s) & (epoch == e)
        index[here] = epoch_order(counts[s], seed, e, s)[index[here]]
    return Positions(source, epoch, index)


def sample_rng(seed: int, source: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator for the augmentation of one pair: a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, source, index])))


def evaluation_order(sizes: np.ndarray, group: int) -> list[list[Position]]:
    """For each image size, the pairs in split order, padded to a multiple of `group` with the last one.

    Args:
        sizes: (H, W) of each pair, int (pairs, 2).
    """
    order: dict[tuple[int, ...], list[Position]] = {}
    for index, size in enumerate(map(tuple, sizes.tolist())):
        order.setdefault(size, []).append(Position(0, 0, index))
    for positions in order.values():
        positions += [replace(positions[-1], padding=True)] * (-len(positions) % group)
    return list(order.values())


# --- Datasets on disk -----------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a converted dataset, opened: all of its shards are present."""

    folder: Path
    name: str
    dataset: str
    shards: list[Shard]

    @classmethod
    def open(cls, folder: StrPath, name: str) -> "DatasetSplit":
        """Open a split; UserError if the dataset, the split or a shard is missing or damaged."""
        folder = Path(folder)
        manifest = Manifest.load(folder)
        shards = manifest.shards_of(name, folder)
        for shard in shards:
            shard.check_structure(folder)
        return cls(folder, name, manifest.dataset, shards)

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.names)

    @functools.cached_property
    def names(self) -> list[str]:
        """The pairs' names, in order."""
        return [name for shard in self.shards for name in shard.names]

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """(H, W) of each pair, in order: int64 (pairs, 2)."""
        runs = np.array([run for shard in self.shards for run in shard.sizes], np.int64).reshape(-1, 3)
        return np.repeat(runs[:, 1:], runs[:, 0], axis=0)

    @functools.cached_property
    def labelled(self) -> np.ndarray:
        """Whether each pair has ground truth, in order: bool (pairs,)."""
        return np.array([shard.labelled for shard in self.shards for _ in shard.names], bool)

    @functools.cached_property
    def files(self) -> list[Path]:
        """The shards' paths, in order."""
        return [self.folder / shard.file for shard in self.shards]

    def file_of(self, index: int) -> Path:
        """The path of the shard that contains pair `index`."""
        ends = np.cumsum([len(shard.names) for shard in self.shards])
        return self.files[int(np.searchsorted(ends, index, side="right"))]


# --- Batches --------------------------------------------------------------------------------------


def training_batches(
    sources: Sequence[tuple[DatasetSplit, float]],
    *,
    batch: int,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 0,
    first_step: int = 0,
    steps: int,
    transform: Transform | None = None,
    workers: int | None = None,
) -> Iterator[Batch]:
    """This rank's batches for steps first_step to first_step + steps - 1.

    Args:
        sources: opened splits, each with its share of the pairs drawn; several make a mixture.
        batch: pairs per rank and step.
        transform: called with a sample's `TRAINING_FIELDS` and a generator that depends only on seed, epoch and pair.
        workers: decoding threads; by default one per core, at most 8.

    Raises:
        UserError: a dataset is damaged, or has fewer pairs than all ranks take per step.
    """
    splits = [split for split, _ in sources]
    weights = [float(weight) for _, weight in sources]
    if not all(weight > 0 for weight in weights):
        raise UserError(f"mixture weights {weights}: expected positive numbers")
    counts = [len(split) for split in splits]
    for split, pairs in zip(splits, counts, strict=True):
        if pairs < batch * ranks:
            raise UserError(
                f"{split.folder}: split {split.name} has {pairs} pairs, but {ranks} rank(s) with a batch of {batch} "
                f"take {batch * ranks} per step; use a smaller batch, fewer ranks or more data"
            )

    def draw_positions() -> Iterator[Position]:
        # Thousands of positions at a time, because each call of `draw` has a fixed cost.
        chunk = max(1, 4096 // batch)
        for begin in range(first_step, first_step + steps, chunk):
            step = np.arange(begin, min(begin + chunk, first_step + steps))
            positions = step[:, None] * batch * ranks + rank * batch + np.arange(batch)
            drawn = draw(positions.ravel(), counts, weights, seed)
            yield from map(Position, drawn.source.tolist(), drawn.epoch.tolist(), drawn.index.tolist())

    def augment(sample: Sample, position: Position) -> Sample:
        if not transform:
            return sample
        return transform(sample, sample_rng(seed, position.source, position.epoch, position.index))

    return _make_batches(
        read_samples(splits, draw_positions(), TRAINING_FIELDS, augment, workers, ahead=2 * batch), batch
    )


def evaluation_batches(split: DatasetSplit, *, batch: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """This rank's share of a split, every ranks-th pair; over all ranks, each pair comes once.

    All ranks have the same number of complete batches: the last repeats a pair, with index PADDING. Pairs of different
    sizes are never in the same batch.
    """
    if not split.names:
        raise UserError(f"{split.folder}: split {split.name} has no pairs; convert the dataset with --split-file")
    order = evaluation_order(split.sizes, batch * ranks)
    share = (position for positions in order for position in positions[rank::ranks])
    fields = (*TRAINING_FIELDS, "occluded")
    return _make_batches(read_samples([split], share, fields, ahead=2 * batch), batch)


@dataclass(frozen=True)
class DecodedPair:
    """A pair as it is read."""

    sample: Sample
    index: int
    """Position of the pair, as in `Batch.index`."""
    label: str
    """File and name, for errors."""


def read_samples(
    splits: Sequence[DatasetSplit],
    positions: Iterable[Position],
    fields: Collection[str],
    augment: Callable[[Sample, Position], Sample] | None = None,
    workers: int | None = None,
    ahead: int = 2,
) -> Iterator[DecodedPair]:
    """Read pairs in the order of `positions`; the flow of a sample is 0 where it is unknown.

    MindSpore's MindDataset reads records; threads decode them (in C, without the GIL) up to `ahead` pairs in advance.
    A MindSpore pipeline around that would copy every batch once more, and bury errors in its own report.

    Args:
        augment: called in a thread for each sample.
        workers: threads; by default one per core, at most 8.
    """
    memory.keep_freed_blocks()
    workers = workers or min(8, len(os.sched_getaffinity(0)))
    starts = np.cumsum([0] + [len(split) for split in splits]).tolist()

    def decode(record: StoredPair, position: Position) -> DecodedPair:
        split, index = splits[position.source], position.index
        name, file = split.names[index], split.file_of(index)
        if record.name != name:
            raise UserError(
                f"{file}: the name of pair {name} is damaged (found {record.name!r}); restore the file from a copy or "
                "remove the dataset and convert it again"
            )
        height, width = split.sizes[index].tolist()
        sample = decode_record(record.data, fields, size=(height, width), pair=name, source=file)
        if not sample["valid"].any():
            sample["flow"] = np.zeros_like(sample["flow"])
        elif not sample["valid"].all():  # NaN times a weight of 0 would still spoil a loss
            sample["flow"] = np.where(sample["valid"][..., None] != 0, sample["flow"], np.float32(0))
        if augment:
            sample = augment(sample, position)
        number = PADDING if position.padding else starts[position.source] + index
        return DecodedPair(sample, number, f"{file}: pair {name}")

    pending: collections.deque[concurrent.futures.Future[DecodedPair]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for record, position in _read_records(splits, positions):
                pending.append(pool.submit(decode, record, position))
                if len(pending) == ahead + workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class StoredPair(NamedTuple):
    """A record as MindSpore reads it."""

    name: str
    data: memoryview


def _read_records(
    splits: Sequence[DatasetSplit], positions: Iterable[Position]
) -> Iterator[tuple[StoredPair, Position]]:
    """Yield the record of each position."""
    positions = iter(positions)
    total = sum(len(split) for split in splits)
    while piece := list(itertools.islice(positions, total)):
        rows = [[position.index for position in piece if position.source == s] for s in range(len(splits))]
        records = [_read_split(split, indices) for split, indices in zip(splits, rows, strict=True)]
        for position in piece:
            yield next(records[position.source]), position


def _read_split(split: DatasetSplit, indices: list[int]) -> Iterator[StoredPair]:
    """Yield the records of these pairs of one split."""
    import mindspore.dataset as ds

    # One dataset at a time: MindDataset refuses files that were not written together. And it takes at most as many
    # indices as there are records.
    for start in range(0, len(indices), len(split)):
        try:
            dataset = ds.MindDataset(
                [str(file) for file in split.files],
                ["name", "pair"],
                num_parallel_workers=1,
                sampler=ds.SubsetSampler(indices[start : start + len(split)]),
            )
            for name, column in dataset.create_tuple_iterator(output_numpy=True, num_epochs=1):
                # item() of a bytes column ('S' array) would drop trailing zeros.
                yield StoredPair(str(name), np.frombuffer(column, np.uint8).data)
        except (RuntimeError, ValueError) as error:
            raise _explain(split, error) from None


def _explain(split: DatasetSplit, error: Exception) -> UserError:
    """Turn a MindSpore error into a UserError that names the damaged shard, if one is found."""
    for shard in split.shards:
        try:
            shard.check_bytes(split.folder)
        except UserError as damage:
            return damage
    return UserError(
        f"{split.folder}: MindSpore cannot read this dataset ({extract_reason(error)}); restore it from a copy or "
        "remove it and convert it again"
    )


def _make_batches(pairs: Iterator[DecodedPair], batch: int) -> Iterator[Batch]:
    """Group pairs into complete batches."""
    while len(group := list(itertools.islice(pairs, batch))) == batch:
        yield _stack(group)


def _stack(group: list[DecodedPair]) -> Batch:
    first = group[0]
    for pair in group:
        for field, array in pair.sample.items():
            if array.shape != first.sample[field].shape:
                raise UserError(
                    f"{pair.label}: {field} is {array.shape}, but {first.sample[field].shape} in {first.label}; pairs "
                    "of different sizes need a transform that crops them"
                )
    columns = {field: np.stack([pair.sample[field] for pair in group]) for field in first.sample}
    return Batch(**columns, index=np.array([pair.index for pair in group], np.int32))
