"""A program for the tests: some real training steps as one rank of several, or as the only one.

python tests/two_ranks.py DATA OUT STEPS writes the weights of each rank, and its mean gradient in the first step, to
OUT/rank-R-of-N.npz. Several ranks then train once more from the same initial weights with gradients summed in copies,
as on GPUs without NCCL, and write OUT/rank-R-of-N-copied.npz.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from launch import session
from prep import reader

GLOBAL_BATCH = 4


def main(data: str, out: str, steps: str) -> None:
    with session.start(lambda: ({}, None)) as (comm, _):
        import mindspore
        from mindspore import Tensor, ops

        from launch import collective
        from model.losses import MultiScaleLoss
        from model.pwcnet import PWCNet
        from train.augment import Augment
        from train.step import TrainStep
        from train.update import StepOptions

        mindspore.set_seed(1)
        network = PWCNet(dense=False, normalize_features=True)
        step = TrainStep(network, MultiScaleLoss(), StepOptions(clip_norm=1.0), comm)
        initial = [parameter.asnumpy().copy() for parameter in step.state.get_parameters()]
        path = f"{out}/rank-{comm.rank}-of-{comm.size}"
        for name in (f"{path}.npz", f"{path}-copied.npz")[: comm.size]:
            batches = reader.training_batches(
                [(reader.DatasetSplit.open(data, "train"), 1.0)],
                batch=GLOBAL_BATCH // comm.size,
                rank=comm.rank,
                ranks=comm.size,
                seed=1,
                steps=int(steps),
                transform=Augment((64, 64), flip=True),
            )
            arrays = {}
            for batch in batches:
                arrays["losses"] = step(batch, 1e-3).losses.asnumpy()
                if "gradient" not in arrays:  # the first moment is a tenth of it
                    arrays["gradient"] = step.state.moment1.asnumpy().copy()
            arrays |= {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}
            np.savez(name, **arrays)
            step.sum_over_ranks = host_sum = collective.HostSum(comm)
            host_sum.in_place = False
            for parameter, value in zip(step.state.get_parameters(), initial, strict=True):
                ops.assign(parameter, Tensor(value))


if __name__ == "__main__":
    main(*sys.argv[1:])
