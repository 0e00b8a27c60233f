"""The GPUs of this host."""

import ctypes
import socket

from launch.errors import UserError, counted
from launch.ranks import Rank


def check_device(rank: Rank, device: str) -> None:
    """Raise UserError if the device is "gpu" and this host does not have one for each of its ranks."""
    if device != "gpu":
        return
    count = count_gpus()
    if count is None:
        raise UserError(f"{socket.gethostname()} has no NVIDIA driver (libcuda.so.1): install it, or use --device cpu")
    if count < rank.local_size:
        raise UserError(
            f"{socket.gethostname()} has {counted(count, 'GPU')}, expected one for each of its "
            f"{counted(rank.local_size, 'rank')}: start as many ranks per host as it has GPUs (mpirun -n, --host "
            "NAME:GPUS); CUDA_VISIBLE_DEVICES may hide some"
        )


def count_gpus() -> int | None:
    """Number of GPUs that this process may use, according to CUDA; None without an NVIDIA driver."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def driver_version() -> tuple[int, int] | None:
    """Newest CUDA version that the NVIDIA driver supports, such as (13, 0); None without a driver."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return divmod(number.value // 10, 100) if number.value else None
