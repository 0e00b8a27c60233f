"""Sums gradients over ranks: by MPI through host memory, or by NCCL inside MindSpore's graph.

The training step uses one of three objects with the same interface: `in_graph` is a primitive that sums a tensor
inside a graph, or None; a call sums Parameters between two graphs.
"""

import socket

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from launch.communicator import Communicator
from launch.logs import print_note


class NoSum:
    """The sum over one rank."""

    in_graph: ops.AllReduce | None = None

    def __call__(self, *parameters: Parameter) -> None:
        """Do nothing."""


class NCCLSum(NoSum):
    """The sum by NCCL, inside the graph on the GPU."""

    def __init__(self) -> None:
        self.in_graph = ops.AllReduce()


class HostSum(NoSum):
    """The sum by MPI: of Parameters' own memory on the CPU, of copies on the GPU."""

    def __init__(self, comm: Communicator, in_place: bool) -> None:
        self._comm = comm
        self._in_place = in_place

    def __call__(self, *parameters: Parameter) -> None:
        for parameter in parameters:
            array = parameter.asnumpy() if self._in_place else parameter.asnumpy().copy()
            self._comm.sum(array)
            if not self._in_place:
                ops.assign(parameter, Tensor(array))  # compiled graphs do not see the effect of `set_data`


class Sum(nn.Cell):
    """Sums a tensor over all ranks by NCCL."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = ops.AllReduce()

    def construct(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor)


def create(comm: Communicator) -> NoSum:
    """Choose how the ranks of a job sum gradients."""
    if comm.size == 1:
        return NoSum()
    return NCCLSum() if comm.nccl else HostSum(comm, mindspore.get_context("device_target") == "CPU")


def start_nccl(comm: Communicator) -> bool:
    """Initialise NCCL through MindSpore and sum once; returns whether all ranks could. If not, rank 0 says why."""
    from mindspore import communication

    problem = None
    try:
        communication.init("nccl")
        if (communication.get_rank(), communication.get_group_size()) != (comm.rank, comm.size):
            raise RuntimeError("MindSpore numbered the ranks differently from the launcher")
        Sum()(Tensor(np.ones(1, np.float32))).asnumpy()
    except (RuntimeError, ValueError, TypeError) as error:
        problem = f"rank {comm.rank} on {socket.gethostname()}: {str(error).strip().splitlines()[0]}"
    if problems := [problem for problem in comm.gather(problem) if problem]:
        print_note(f"NCCL cannot be initialised ({problems[0]}); gradients are summed by MPI through host memory")
        return False
    mindspore.set_auto_parallel_context(
        parallel_mode=mindspore.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=comm.size
    )
    return True
