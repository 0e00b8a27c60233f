"""The evaluation of a network on a split, which the trainer and train/evaluate.py share."""

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import numpy as np

from launch.communicator import ALONE, Communicator
from launch.watchdog import Phase
from prep import reader
from train.metrics import SUMS, Evaluation, Sample, find_worst, pair_sums

if TYPE_CHECKING:
    from model.inference import FlowPredictor


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate a split."""

    batch: int = 1
    """Pairs per batch and rank."""
    pictures: Collection[int] = ()
    """Positions in the split of the pairs to keep for drawing."""
    worst: int = 0
    """How many of the pairs with the largest EPE to keep for drawing, too."""


def evaluate(
    predictor: "FlowPredictor",
    split: reader.DatasetSplit,
    comm: Communicator = ALONE,
    options: EvaluationOptions | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate a network on every pair of a split.

    Args:
        predictor: computes the flow.
        split: to evaluate on.
        comm: the ranks, which share the pairs and must all call this.
        options: see `EvaluationOptions`.
        on_batch: called after each batch with its number of pairs.

    Returns:
        The same on every rank, except that `samples` has only the pairs that this rank evaluated.
    """
    options = options or EvaluationOptions()
    sums = np.zeros((len(split), len(SUMS)))
    samples: dict[int, Sample] = {}
    for batch in reader.evaluation_batches(split, batch=options.batch, rank=comm.rank, ranks=comm.size):
        comm.progress(Phase.VALIDATING)
        assert batch.occluded is not None  # only training batches lack it
        predicted = predictor.flow_batch(batch.image1, batch.image2)
        # Where pairs are in the batch, by their position in the split; without those that fill the last batch.
        rows = {position: row for row, position in enumerate(batch.index.tolist()) if position >= 0}
        for position, row in rows.items():
            sums[position] = pair_sums(predicted[row], batch.flow[row], batch.valid[row], batch.occluded[row])
        # The worst pairs over all ranks are among the worst of each.
        keep = {*options.pictures, *find_worst(sums, {*samples, *rows}, options.worst)}
        samples = {position: samples[position] for position in keep & samples.keys()}
        for position in keep & rows.keys():
            row = rows[position]
            flow = np.where(batch.valid[row][..., None] > 0, batch.flow[row], np.float32(np.nan))
            samples[position] = Sample(batch.image1[row].copy(), flow, predicted[row].copy())
        if on_batch:
            on_batch(len(rows))
    comm.sum(sums)  # exact: every element is zero on all ranks but one
    worst = find_worst(sums, range(len(split)), options.worst)
    samples = {position: samples[position] for position in samples.keys() & {*options.pictures, *worst}}
    return Evaluation(sums, worst, samples)


def count_share(split: reader.DatasetSplit, batch: int, comm: Communicator) -> int:
    """The number of pairs that this rank evaluates."""
    order = reader.evaluation_order(split.sizes, batch * comm.size)
    return sum(not position.padding for positions in order for position in positions[comm.rank :: comm.size])
