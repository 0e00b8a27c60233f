"""The GPUs of this host."""

import ctypes
import socket

from launch.errors import UserError
from launch.ranks import Rank


def check_device(rank: Rank, device: str) -> None:
    """Raise UserError unless this host has a GPU for each of its ranks, if they are to use one."""
    count = count_gpus() if device == "gpu" else rank.local_size
    if count is None:
        raise UserError(f"{socket.gethostname()} has no NVIDIA driver (libcuda.so.1): install it, or use --device cpu")
    if count < rank.local_size:
        raise UserError(
            f"{socket.gethostname()} has {count} GPU(s) for {rank.local_size} rank(s): start as many ranks "
            "on each host as it has GPUs (mpirun -n, --host NAME:GPUS); CUDA_VISIBLE_DEVICES may hide some"
        )


def count_gpus() -> int | None:
    """How many GPUs this process may use, as CUDA counts them; None without NVIDIA's driver."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that this host's NVIDIA driver supports, such as (13, 0); None without a driver."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return divmod(number.value // 10, 100) if number.value else None
