"""A split of a converted dataset as a `mindspore.dataset` object; see `prep.dataset`."""

from collections.abc import Iterator

import mindspore.dataset as ds
import numpy as np

from launch.errors import UserError
from prep.formats import StrPath
from prep.reader import TRAINING_FIELDS, DatasetSplit, Position, epoch_order, read_samples


class EpochSource:
    """An iterable for GeneratorDataset: each iteration is the next epoch of one rank's pairs."""

    def __init__(self, split: DatasetSplit, *, shuffle: bool, seed: int, shard: tuple[int, int]) -> None:
        self.split, self.shuffle, self.seed = split, shuffle, seed
        self.rank, self.ranks = shard
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.share_of(range(len(self.split))))

    def share_of(self, indices: range | list[int]) -> range | list[int]:
        """This rank's part of an epoch; of equal length on all ranks if it is shuffled."""
        end = len(indices) - len(indices) % self.ranks if self.shuffle else len(indices)
        return indices[self.rank : end : self.ranks]

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        pairs, epoch = len(self.split), self.epoch
        self.epoch += 1
        order = epoch_order(pairs, self.seed, epoch).tolist() if self.shuffle else range(pairs)
        positions = (Position(0, epoch, index) for index in self.share_of(order))
        for pair in read_samples([self.split], positions, TRAINING_FIELDS):
            yield tuple(pair.sample[field] for field in TRAINING_FIELDS)


def build(
    folder: StrPath, split: str, batch_size: int | None, shuffle: bool, seed: int, shard: tuple[int, int]
) -> ds.Dataset:
    """The implementation of `prep.dataset`."""
    opened, (rank, ranks) = DatasetSplit.open(folder, split), shard
    if not 0 <= rank < ranks:
        raise UserError(f"shard {shard}: expected (rank, number of ranks) with 0 <= rank < number of ranks")
    source = EpochSource(opened, shuffle=shuffle, seed=seed, shard=shard)
    if not len(source) or (batch_size and shuffle and len(source) < batch_size):
        raise UserError(
            f"{folder}: split {split} has {len(opened)} pairs, too few for {ranks} shard(s) with a batch of "
            f"{batch_size or 1}; use a smaller batch or fewer shards"
        )
    if batch_size and len(np.unique(opened.sizes, axis=0)) > 1:
        raise UserError(
            f"{folder}: split {split} has pairs of different sizes, which cannot share a batch; use batch_size=None, "
            "crop the pairs by map, then batch them"
        )
    dataset = ds.GeneratorDataset(source, list(TRAINING_FIELDS), num_parallel_workers=1, python_multiprocessing=False)
    return dataset.batch(batch_size, drop_remainder=shuffle) if batch_size else dataset
