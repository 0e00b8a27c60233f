"""Datasets: from the files of a release to MindRecord shards, and from those to batches."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    import mindspore.dataset


def dataset(
    folder: "str | os.PathLike[str]",
    split: str = "train",
    *,
    batch_size: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> "mindspore.dataset.Dataset":
    """A split of a converted dataset as a `mindspore.dataset` object, for any training loop.

    Columns of each row: image1 and image2, uint8 (H, W, 3) RGB; flow, float32 (H, W, 2) in pixels from image1 to
    image2, 0 where it is unknown; valid, uint8 (H, W), 1 where the flow is known: nowhere in a pair without
    ground truth.

    Args:
        folder: written by prep/convert.py.
        split: one of the splits that prep/inspect.py lists, such as "train", "val" or, for Sintel, "val-final".
        batch_size: pairs per batch and rank; None leaves the pairs unbatched, to crop or augment them by `map` first.
        shuffle: whether each epoch is another permutation, a pure function of seed and epoch. If so, rows that do not
            divide evenly by shards and batches are dropped; if not, every pair comes once over all shards.
        shard: (rank, number of ranks): which share of the pairs to read.

    Raises:
        UserError: the dataset or split is missing or damaged, or batches are to have pairs of different sizes.
    """
    from prep import mindspore_dataset

    return mindspore_dataset.build(folder, split, batch_size, shuffle, seed, shard)
