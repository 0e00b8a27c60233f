"""A program for the tests: some real training steps as one rank of several, or as the only one.

python tests/two_ranks.py DATA OUT STEPS PARTS [copy]: takes each rank's share of the batch in so many parts,
and writes the weights of each rank, and its mean gradient in the first step, to
OUT/rank-R-of-N-PARTS.npz. With "copy" gradients are summed in copies, as on GPUs without NCCL, and the file is
OUT/rank-R-of-N-copy.npz.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from launch import session
from prep import reader

GLOBAL_BATCH = 4


def main(data, out, steps, parts, copy=None) -> None:
    with session.start(lambda: ({}, None)) as (comm, _):
        import mindspore

        from launch import collective
        from model.losses import MultiScaleLoss
        from model.pwcnet import PWCNet
        from train.augment import Augment
        from train.step import StepOptions, TrainStep

        mindspore.set_seed(1)
        network = PWCNet(dense=False, normalize_features=True)
        step = TrainStep(network, MultiScaleLoss(), StepOptions(accumulation_steps=int(parts), clip_norm=1.0), comm)
        if copy:
            step.sum_over_ranks = collective.HostSum(comm, in_place=False)
        batches = reader.training_batches(
            reader.DatasetSplit.open(data, "train"),
            batch=GLOBAL_BATCH // comm.size,
            rank=comm.rank,
            ranks=comm.size,
            seed=1,
            steps=int(steps),
            transform=Augment((64, 64), flip=True),
        )
        gradient = None
        for batch in batches:
            if gradient is None:
                step.compile(batch)
                comm.barrier()
            losses = step(batch, 1e-3)[0].asnumpy()
            if gradient is None:  # the first moment is a tenth of it
                gradient = step.state.moment1.asnumpy().copy()
        weights = {p.name: p.asnumpy() for p in network.get_parameters()}
        np.savez(
            f"{out}/rank-{comm.rank}-of-{comm.size}-{copy or parts}.npz", losses=losses, gradient=gradient, **weights
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
