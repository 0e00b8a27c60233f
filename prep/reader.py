"""The reader: batches of a converted set for training and evaluation, in a repeatable order.

Training reads an endless stream of pairs: epoch after epoch, each a permutation of the split that
is a pure function of (seed, epoch). Step b takes the next batch * ranks pairs, and each rank its
share of them. So every pair is seen once an epoch over all ranks, no batch is partial, and neither
the number of ranks nor of workers changes what is learnt from.
"""

import collections
import concurrent.futures
import functools
import itertools
import os
from dataclasses import dataclass

import numpy as np

from launch.errors import UserError
from prep import memory
from prep.shards import Manifest, decode_record, reason_of

FIELDS = ("image1", "image2", "flow", "valid")
"""What is decoded from the records of a training batch."""


@dataclass(frozen=True)
class Batch:
    """Pairs of one size (H, W), as NumPy arrays."""

    image1: np.ndarray
    """(B, H, W, 3) uint8 RGB."""
    image2: np.ndarray
    flow: np.ndarray
    """(B, H, W, 2) float32 in pixels, from image 1 to image 2; in training batches 0 where it is unknown."""
    valid: np.ndarray
    """(B, H, W) uint8, 1 where the flow is known."""
    index: np.ndarray | None = None
    """(B,) int32, position of each pair in its split; in a mixture after those of the splits before it. PADDING for a
    pair that only fills the last batch of an evaluation."""
    occluded: np.ndarray | None = None
    """(B, H, W) uint8, 1 where image 2 hides what image 1 shows; 0 in datasets without masks, None in training."""


# A mixture deals its sources out in blocks of this many pairs, each with every source's exact
# share.
MIXTURE_BLOCK = 1000

PADDING = -1  # the index of a pair that is only there to fill the last batch of an evaluation


# --- Order: pure functions ------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def epoch_order(pairs, seed, epoch, source=0):
    """The order of a source's pairs in an epoch: a permutation of range(pairs), int64, read-only.

    It sorts by Philox's raw numbers, which, unlike numpy's shuffle, no later numpy may change.
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch, source])).random_raw(pairs)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False
    return order


def mixture_block(weights, seed, block):
    """Which source each of a block's positions takes from: int64 (MIXTURE_BLOCK,).

    Every block has the same numbers of each source, in the ratio of `weights` (largest remainders).
    """
    exact = np.asarray(weights) / np.sum(weights) * MIXTURE_BLOCK
    share = np.floor(exact).astype(np.int64)
    share[np.argsort(share - exact, kind="stable")[: MIXTURE_BLOCK - share.sum()]] += 1
    sources = np.repeat(np.arange(len(share)), share)
    # An epoch and source that no order has, so that the block's numbers are its own.
    raw = np.random.Philox(np.random.SeedSequence([seed, block, 1 << 30])).random_raw(MIXTURE_BLOCK)
    return sources[np.argsort(raw, kind="stable")]


def draw(positions, counts, weights, seed):
    """What the training stream holds at `positions`: (source, epoch, index), each int64 like
    positions.

    `counts` are the sources' numbers of pairs, `weights` their shares of the stream.
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
    for s, e in sorted(set(zip(source.tolist(), epoch.tolist()))):
        here = (source == s) & (epoch == e)
        index[here] = epoch_order(counts[s], seed, e, s)[index[here]]
    return source, epoch, index


def sample_rng(seed, source, epoch, index):
    """The random generator for one pair's augmentation: a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, source, index])))


# --- Sets on disk ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetSplit:
    """One split of a converted set, opened: its folder, name, data set and shards, all there."""

    folder: str
    name: str
    dataset: str
    shards: list

    @classmethod
    def open(cls, folder, name):
        """Open a split; UserError if the set, the split or a shard is missing or damaged."""
        folder = os.fspath(folder)
        manifest = Manifest.load(folder)
        shards = manifest.split(name, folder)
        for shard in shards:
            shard.check_structure(folder)
        return cls(folder, name, manifest.dataset, shards)

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.names)

    @functools.cached_property
    def names(self):
        """The pairs' names, in order."""
        return [name for shard in self.shards for name in shard.names]

    @functools.cached_property
    def sizes(self):
        """The pairs' sizes in order: int64 (pairs, 2) as (H, W)."""
        runs = np.array([run for s in self.shards for run in s.sizes], np.int64).reshape(-1, 3)
        return np.repeat(runs[:, 1:], runs[:, 0], axis=0)

    @functools.cached_property
    def files(self):
        """The shards' paths, in order."""
        return [os.path.join(self.folder, shard.file) for shard in self.shards]

    def file_of(self, index):
        """The path of the shard that holds pair `index`."""
        ends = np.cumsum([len(shard.names) for shard in self.shards])
        return self.files[int(np.searchsorted(ends, index, side="right"))]


# --- Batches --------------------------------------------------------------------------------------


def training_batches(sources, *, batch, rank=0, ranks=1, seed=0, first_step=0, steps, transform=None, workers=None):
    """This rank's batches for steps first_step ... first_step + steps - 1, an iterator of `Batch`.

    sources    an opened `DatasetSplit`, or for a mixture a list of (DatasetSplit, weight); the weights are the
               shares of the pairs drawn
    batch      pairs per rank and step
    transform  function (sample, rng) -> sample on a dict of image1, image2 uint8 (H, W, 3), flow
               float32 (H, W, 2), valid uint8 (H, W); `rng` (numpy Generator) depends on seed, epoch
               and pair alone. It runs in threads and must return the same fields, of one size.
    workers    decoding threads (default: one per core, at most 8)

    UserError if a dataset is damaged or has fewer pairs than the ranks take in one step.
    """
    if isinstance(sources, DatasetSplit):
        sources = [(sources, 1.0)]
    splits = [split for split, _ in sources]
    weights = [float(weight) for _, weight in sources]
    if not all(weight > 0 for weight in weights):
        raise UserError(f"mixture weights {weights}: expected numbers above 0")
    counts = [len(s) for s in splits]
    for split, pairs in zip(splits, counts):
        if pairs < batch * ranks:
            raise UserError(
                f"{split.folder}: split {split.name} has {pairs} pairs, but {ranks} rank(s) with a "
                f"batch of {batch} take {batch * ranks} a step; use a smaller batch, fewer ranks "
                "or more data"
            )

    def draws():
        # Some thousands of positions at a time: an order function's call has its price.
        chunk = max(1, 4096 // batch)
        for begin in range(first_step, first_step + steps, chunk):
            step = np.arange(begin, min(begin + chunk, first_step + steps))
            positions = step[:, None] * batch * ranks + rank * batch + np.arange(batch)
            yield from zip(*(a.tolist() for a in draw(positions.ravel(), counts, weights, seed)))

    def finish(sample, source, epoch, index):
        return transform(sample, sample_rng(seed, source, epoch, index)) if transform else sample

    return _batches(splits, draws(), batch, finish, workers)


def evaluation_batches(split, *, batch, rank=0, ranks=1, workers=None):
    """This rank's share of an opened `DatasetSplit`, every ranks-th pair, each pair once over all ranks.

    An iterator of `Batch`. All ranks have the same number of batches, all of them whole: the last repeats a
    pair, with index PADDING. Pairs of different sizes are never in one batch.
    """
    if not split.names:
        raise UserError(f"{split.folder}: split {split.name} has no pair; convert the set with --split-file")

    def draws():
        for indices in evaluation_order(split.sizes, batch * ranks):
            for index, real in indices[rank::ranks]:
                yield 0, 0 if real else PADDING, index

    return _batches([split], draws(), batch, lambda sample, *_: sample, workers, (*FIELDS, "occluded"))


def evaluation_order(sizes, group):
    """For each image size the list of (index, real), in split order, padded to a multiple of
    `group` with repeats of its last pair, for which real is False."""
    order = {}
    for index, size in enumerate(map(tuple, sizes.tolist())):
        order.setdefault(size, []).append((index, True))
    for indices in order.values():
        indices += [(indices[-1][0], False)] * (-len(indices) % group)
    return list(order.values())


def _batches(splits, draws, batch, finish, workers, fields=FIELDS):
    """Yield whole batches of the pairs that `draws` yields as (source, epoch, index).

    Records come from MindSpore's MindDataset; threads decode them (all of the work is done in C
    with the interpreter released) two batches ahead. A dataset of MindSpore's around that would
    copy each batch once more, and hide what went wrong in a report of its own.
    """
    memory.keep_freed_blocks()
    workers = workers or min(8, len(os.sched_getaffinity(0)))
    starts = np.cumsum([0] + [len(s) for s in splits]).tolist()

    def prepare(stored, record, source, epoch, index):
        opened = splits[source]
        name, file = opened.names[index], opened.file_of(index)
        if stored != name:
            raise UserError(
                f"{file}: the name of pair {name} is damaged (there it is {stored!r}); restore the "
                "file from a copy or convert the set again"
            )
        size = tuple(opened.sizes[index].tolist())
        sample = decode_record(record, fields, size=size, pair=name, source=file)
        if not sample["valid"].all():  # NaN or 1e9 times a weight of 0 would still spoil a loss
            sample["flow"] = np.where(sample["valid"][..., None] != 0, sample["flow"], np.float32(0))
        sample = finish(sample, source, epoch, index)
        return (
            sample,
            PADDING if epoch == PADDING else starts[source] + index,
            f"{file}: pair {name}",
        )

    pending = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def decoded():
            for name, record, place in _records(splits, draws):
                pending.append(pool.submit(prepare, name, record, *place))
                if len(pending) == 2 * batch + workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

        try:
            pairs = decoded()
            while len(ready := list(itertools.islice(pairs, batch))) == batch:
                yield _stack(ready, fields)
        finally:
            for future in pending:
                future.cancel()


def _records(splits, draws):
    """Yield (stored name, record as uint8 (N,), (source, epoch, index)) for each of `draws`."""
    draws = iter(draws)
    total = sum(len(split) for split in splits)
    while piece := list(itertools.islice(draws, total)):
        rows = [[index for origin, _, index in piece if origin == source] for source in range(len(splits))]
        records = [_read(split, indices) for split, indices in zip(splits, rows)]
        for place in piece:
            yield *next(records[place[0]]), place


def _read(split, indices):
    """Yield (stored name, record as uint8 (N,)) of these pairs of a split."""
    import mindspore.dataset as ds

    # One set at a time: MindDataset refuses files that are not of one writing. And it takes at most
    # as many indices as there are records.
    for start in range(0, len(indices), len(split)):
        try:
            dataset = ds.MindDataset(
                split.files,
                ["name", "pair"],
                num_parallel_workers=1,
                sampler=ds.SubsetSampler(indices[start : start + len(split)]),
            )
            for name, column in dataset.create_tuple_iterator(output_numpy=True, num_epochs=1):
                # The 'S' array of a bytes column loses trailing zeros in item(), not here.
                yield str(name), np.frombuffer(column, np.uint8)
        except (RuntimeError, ValueError) as error:
            raise _explain(split, error) from None


def _explain(split, error):
    """A UserError for what MindSpore said of a set: which shard is not what it was, if any."""
    for shard in split.shards:
        try:
            shard.check_bytes(split.folder)
        except UserError as found:
            return found
    return UserError(
        f"{split.folder}: MindSpore cannot read it ({reason_of(error)}); restore the set "
        "from a copy or convert it again"
    )


def _stack(ready, fields):
    """A Batch from (sample, index, name) of its pairs."""
    for sample, _, name in ready:
        for field in fields:
            if sample[field].shape != ready[0][0][field].shape:
                raise UserError(
                    f"{name}: {field} is {sample[field].shape}, but {ready[0][0][field].shape} in "
                    f"{ready[0][2]}; pairs of different sizes need a transform that crops them"
                )
    columns = {field: np.stack([sample[field] for sample, _, _ in ready]) for field in fields}
    return Batch(**columns, index=np.array([index for _, index, _ in ready], np.int32))
