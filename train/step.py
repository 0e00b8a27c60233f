"""One data-parallel training step as one graph: forward, gradient, all-reduce, update."""

import mindspore
from mindspore import Parameter, Tensor, float32, nn, ops

from model.layers import Convolution
from model.pwcnet import to_network

LOSS_SCALE = {"start": 2.0 ** 16, "factor": 2.0, "every": 1000}
"""Dynamic loss scaling: first scale, factor of change, steps without overflow before it grows."""


def use_float16(network):
    """Have a network's convolutions compute in float16 and leave the rest in float32.

    Flow, warping, cost volume, loss and weight updates are sums of many or differences of close
    numbers; the convolutions are nearly all of the time.
    """
    for _, cell in network.cells_and_names():
        if isinstance(cell, Convolution):
            cell.use_float16()


class TrainStep(nn.Cell):
    """A step on this rank's part of the global batch.

    Args:
        network: images to flows, a Cell.
        loss: (flows, flow, valid) to a vector whose sum is minimised, a Cell.
        optimizer: a MindSpore optimiser with a learning rate of one number.
        ranks: how many ranks share the batch; gradients and losses are their mean.
        clip_norm: largest global gradient norm, larger ones are scaled down to it; 0: never.
        loss_scaling: dynamic loss scaling, for float16.
        decoupled_decay: weight decay apart from the gradient (I. Loshchilov, F. Hutter, "Decoupled
            Weight Decay Regularization", 2019), a share of each weight per step and learning rate.
    """

    def __init__(self, network, loss, optimizer, *, ranks=1, clip_norm=0.0, loss_scaling=False,
                 decoupled_decay=0.0):
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss = loss
        self.optimizer = optimizer
        self.weights = optimizer.parameters
        self.ranks = ranks
        self.clip_norm = clip_norm
        self.loss_scaling = loss_scaling
        self.decoupled_decay = decoupled_decay
        self.loss_scale = Parameter(
            Tensor(LOSS_SCALE["start"] if loss_scaling else 1.0, float32),
            name="loss_scale", requires_grad=False)
        self.finite_steps = Parameter(
            Tensor(0, mindspore.int32), name="finite_steps", requires_grad=False)
        self.value_and_grad = ops.value_and_grad(
            self.forward, None, self.weights, has_aux=True)
        if ranks > 1:
            self.mean_gradients = nn.DistributedGradReducer(self.weights, mean=True, degree=ranks)
            self.all_reduce = ops.AllReduce()

    def forward(self, image1, image2, flow, valid, scale):
        losses = self.loss(self.network(image1, image2), flow, valid)
        return losses.sum() * scale, losses

    def construct(self, image1, image2, flow, valid, learning_rate):
        """Do the step.

        Args:
            image1, image2: (N, H, W, 3) uint8.
            flow: (N, H, W, 2) float32 in pixels.
            valid: (N, H, W) uint8, non-zero where the flow is known.
            learning_rate: () float32.

        Returns:
            losses: the loss vector, mean over the ranks.
            gradient_norm: () global norm before clipping, of the mean gradient.
            finite: () bool; if False a gradient overflowed and the weights were left as they were.
        """
        scale = self.loss_scale + 0.0  # a copy: the parameter is assigned to below
        (_, losses), gradients = self.value_and_grad(
            to_network(image1), to_network(image2), flow.transpose(0, 3, 1, 2),
            (valid > 0).astype(float32).expand_dims(1), scale)
        if self.ranks > 1:
            # An overflow on one rank is one in the mean, so all ranks decide alike.
            gradients = self.mean_gradients(gradients)
            losses = self.all_reduce(losses) / self.ranks
        squares = 0.0
        for gradient in gradients:
            squares = squares + gradient.square().sum()
        gradient_norm = squares.sqrt() / scale
        finite = ops.isfinite(gradient_norm)
        factor = 1.0 / scale
        if self.clip_norm > 0:
            factor = factor * ops.minimum(self.clip_norm / (gradient_norm + 1e-6), 1.0)
        scaled = ()
        for gradient in gradients:
            scaled = scaled + (gradient * factor,)
        if finite:
            ops.assign(self.optimizer.learning_rate, learning_rate)
            if self.decoupled_decay > 0:
                for weight in self.weights:
                    ops.assign(weight, weight * (1.0 - learning_rate * self.decoupled_decay))
            self.optimizer(scaled)
        if self.loss_scaling:
            self.adjust_loss_scale(finite)
        return losses, gradient_norm, finite

    def adjust_loss_scale(self, finite):
        """Lower the scale after an overflow, raise it after many steps without one."""
        steps = ops.select(finite, self.finite_steps + 1, ops.zeros_like(self.finite_steps))
        grow = steps >= LOSS_SCALE["every"]
        scale = ops.select(finite, self.loss_scale,
                           ops.maximum(self.loss_scale / LOSS_SCALE["factor"], 1.0))
        scale = ops.select(grow, scale * LOSS_SCALE["factor"], scale)
        ops.assign(self.loss_scale, scale)
        ops.assign(self.finite_steps, ops.select(grow, ops.zeros_like(steps), steps))
