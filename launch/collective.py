"""Sums gradients over ranks: by MPI through host memory, or by NCCL inside MindSpore's graph.

The training step uses one of three objects with the same interface: `in_graph` is a primitive that sums a tensor
inside a graph, or None; a call sums Parameters between two graphs.
"""

import ctypes
import socket
import sys

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from launch.communicator import Communicator
from launch.logs import print_note

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of madvise(2)


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
        self._advised: set[int] = set()

    def __call__(self, *parameters: Parameter) -> None:
        arrays = [parameter.asnumpy() if self._in_place else parameter.asnumpy().copy() for parameter in parameters]
        if self._in_place:
            for array in arrays:
                if array.ctypes.data not in self._advised:
                    self._advised.add(array.ctypes.data)
                    use_huge_pages(array)
        self._comm.sum(*arrays)
        if not self._in_place:
            for parameter, array in zip(parameters, arrays, strict=True):
                ops.assign(parameter, Tensor(array))  # compiled graphs do not see the effect of `set_data`


def use_huge_pages(array: np.ndarray) -> None:
    """Ask the kernel to keep an array's memory in pages of 2 MiB, which halves the time of its sum over ranks.

    Open MPI reads the other rank's memory directly, and each time the kernel looks up every page of it. The kernel may
    refuse: before Linux 6.1, it changes the pages only gradually.
    """
    start = -(-array.ctypes.data // HUGE_PAGE) * HUGE_PAGE
    length = (array.ctypes.data + array.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if length > 0 and sys.platform == "linux":
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


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
