"""Sums gradients over ranks: by MPI through host memory, or by NCCL inside MindSpore's graph.

The training step uses one of three objects with the same interface: `in_graph` is a primitive that sums a tensor
inside a graph, or None; a call sums Parameters between two graphs.
"""

import socket
import sys

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from launch.communicator import Communicator


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
        if in_place:
            check_views()

    def __call__(self, *parameters: Parameter) -> None:
        for parameter in parameters:
            if self._in_place:
                self._comm.sum(parameter.asnumpy())
                continue
            array = parameter.asnumpy().copy()
            self._comm.sum(array)
            ops.assign(parameter, Tensor(array))  # compiled graphs do not see the effect of `set_data`


class Sum(nn.Cell):
    """Sums a tensor over all ranks by NCCL."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = ops.AllReduce()

    def construct(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor)


class Read(nn.Cell):
    """Copies a Parameter in a graph."""

    def __init__(self, parameter: Parameter) -> None:
        super().__init__()
        self.parameter = parameter

    def construct(self) -> Tensor:
        return self.parameter + 0.0


def create(comm: Communicator) -> NoSum:
    """Choose how the ranks of a job sum gradients."""
    if comm.size == 1:
        return NoSum()
    return NCCLSum() if comm.nccl else HostSum(comm, mindspore.get_context("device_target") == "CPU")


def check_views() -> None:
    """Raise RuntimeError unless graphs see what is written to the array of a Parameter."""
    parameter = Parameter(Tensor(np.zeros(1, np.float32)), name="view", requires_grad=False)
    parameter.asnumpy()[:] = 1
    if Read(parameter)().asnumpy()[0] != 1:
        raise RuntimeError(
            "this version of MindSpore copies Parameters to NumPy, so gradients cannot be summed over ranks; install "
            "the version that setup.cfg requires"
        )


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
    problems = [problem for problem in comm.gather(problem) if problem]
    if problems and comm.rank == 0:
        print(
            f"note: NCCL cannot be initialised ({problems[0]}); gradients are summed by MPI through host memory",
            file=sys.stderr,
            flush=True,
        )
    if not problems:
        mindspore.set_auto_parallel_context(
            parallel_mode=mindspore.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=comm.size
        )
    return not problems
