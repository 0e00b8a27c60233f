"""A program for the tests: some real training steps as one rank of several, or as the only one.

python tests/two_ranks.py DATA OUT STEPS: writes the weights of each rank to OUT/rank-R-of-N.npz.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from launch import cluster
from prep import reader

GLOBAL_BATCH = 4


def main(data, out, steps):
    with cluster.joined(lambda: ({}, None)) as (here, _):
        import mindspore
        from mindspore import Tensor, nn

        from model.losses import MultiScaleLoss
        from model.pwcnet import PWCNet
        from train.augment import Augment
        from train.step import TrainStep

        mindspore.set_seed(1)
        network = PWCNet(dense=False, normalize_features=True)
        # Plain descent: Adam would divide rounding differences by themselves.
        optimizer = nn.SGD(network.trainable_params(), learning_rate=1e-3)
        step = TrainStep(network, MultiScaleLoss(), optimizer, ranks=here.ranks, clip_norm=1.0)
        batches = reader.training_batches(
            reader.Split.open(data, "train"), batch=GLOBAL_BATCH // here.ranks, rank=here.rank,
            ranks=here.ranks, seed=1, steps=int(steps), transform=Augment((64, 64), flip=True))
        for number, sample in enumerate(batches):
            inputs = [*map(Tensor, sample[:4]), Tensor(1e-3, mindspore.float32)]
            if number == 0:
                step.compile(*inputs)
                cluster.barrier()
            losses = step(*inputs)[0].asnumpy()
        weights = {p.name: p.asnumpy() for p in network.get_parameters()}
        np.savez(f"{out}/rank-{here.rank}-of-{here.ranks}.npz", losses=losses, **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
