"""A program for the tests: some real training steps as one rank of several, or as the only one.

python tests/two_ranks.py DATA OUT STEPS PARTS: takes each rank's share of the batch in so many parts,
and writes the weights of each rank, and its mean gradient in the first step, to
OUT/rank-R-of-N-PARTS.npz.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from launch import cluster
from prep import reader

GLOBAL_BATCH = 4


def main(data, out, steps, parts):
    with cluster.joined(lambda: ({}, None)) as (here, _):
        import mindspore

        from model.losses import MultiScaleLoss
        from model.pwcnet import PWCNet
        from train.augment import Augment
        from train.step import TrainStep

        mindspore.set_seed(1)
        network = PWCNet(dense=False, normalize_features=True)
        step = TrainStep(network, MultiScaleLoss(), ranks=here.ranks, parts=int(parts), clip_norm=1.0)
        batches = reader.training_batches(
            reader.Split.open(data, "train"), batch=GLOBAL_BATCH // here.ranks, rank=here.rank,
            ranks=here.ranks, seed=1, steps=int(steps), transform=Augment((64, 64), flip=True))
        gradient = None
        for sample in batches:
            if gradient is None:
                step.compile(*sample[:4])
                cluster.barrier()
            losses = step(*sample[:4], 1e-3)[0].asnumpy()
            if gradient is None:  # the first moment is a tenth of it
                gradient = step.state.moment1.asnumpy().copy()
        weights = {p.name: p.asnumpy() for p in network.get_parameters()}
        np.savez(f"{out}/rank-{here.rank}-of-{here.ranks}-{parts}.npz", losses=losses,
                 gradient=gradient, **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
