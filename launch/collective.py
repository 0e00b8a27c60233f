"""Sums gradients over ranks: by MPI through host memory, or by NCCL inside MindSpore's graph."""

import ctypes
import functools
import importlib

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from launch.communicator import Communicator
from launch.logs import print_note

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of madvise(2)


class HostSum:
    """Sums Parameters over ranks by MPI between two graphs; does nothing if NCCL sums them inside a graph.

    Attributes:
        in_place: whether to sum in the Parameters' own memory, as on the CPU, instead of in copies.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.in_place = mindspore.get_context("device_target") == "CPU"

    def __call__(self, *parameters: Parameter) -> None:
        if self._comm.size == 1 or self._comm.nccl:
            return
        arrays = [parameter.asnumpy() for parameter in parameters]
        if self.in_place:
            for array in arrays:
                use_huge_pages(array.ctypes.data, array.nbytes)
            self._comm.sum(*arrays)
            return
        arrays = [array.copy() for array in arrays]
        self._comm.sum(*arrays)
        for parameter, array in zip(parameters, arrays, strict=True):
            ops.assign(parameter, Tensor(array))  # compiled graphs do not see the effect of `set_data`


@functools.cache  # once for each array
def use_huge_pages(address: int, size: int) -> None:
    """Ask the kernel to keep an array's memory in pages of 2 MiB, which halves the time of its sum over ranks.

    Open MPI reads the other rank's memory directly, and each time the kernel looks up every page of it. The kernel may
    refuse: before Linux 6.1, it changes the pages only gradually.
    """
    start = -(-address // HUGE_PAGE) * HUGE_PAGE
    length = (address + size - start) // HUGE_PAGE * HUGE_PAGE
    if length > 0:
        for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


class Sum(nn.Cell):
    """Sums a tensor over all ranks by NCCL."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = ops.AllReduce()

    def construct(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor)


def start_nccl(comm: Communicator) -> bool:
    """Initialise NCCL through MindSpore and sum once; returns whether all ranks could. If not, rank 0 says why."""
    from mindspore import communication

    problem = None
    try:
        importlib.import_module("mpi4py.MPI")  # the MPI library that MindSpore's plugin needs, if not loaded yet
        communication.init("nccl")
        if (communication.get_rank(), communication.get_group_size()) != (comm.rank, comm.size):
            raise RuntimeError("MindSpore numbered the ranks differently from the launcher")
        Sum()(Tensor(np.ones(1, np.float32))).asnumpy()
    except (RuntimeError, ValueError, TypeError) as error:
        problem = f"{comm.name}: {str(error).strip().splitlines()[0]}"
    if problems := [problem for problem in comm.gather(problem) if problem]:
        print_note(f"NCCL cannot be initialised ({problems[0]}); gradients are summed by MPI through host memory")
        return False
    mindspore.set_auto_parallel_context(
        parallel_mode=mindspore.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=comm.size
    )
    return True
