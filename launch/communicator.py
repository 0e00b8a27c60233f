"""How ranks exchange data: through Open MPI and mpi4py; a job of one rank needs neither.

All ranks must call the same methods in the same order. Values travel as JSON, not pickles, so data from another
rank cannot run code.
"""

import base64
import contextlib
import json
import os
import pathlib
import sysconfig
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil

from launch import launcher, watchdog
from launch.errors import UserError
from launch.ranks import Rank


class Communicator:
    """The ranks of a job: this class for one rank, `MPICommunicator` for several."""

    library = "none"
    """Name and version of the MPI library."""
    nccl = False
    """Whether MindSpore sums gradients by NCCL inside its graphs."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.size, self.threads, self.name = rank.rank, rank.size, rank.threads, str(rank)

    def progress(self, phase: watchdog.Phase, step: int | None = None) -> None:
        """Tell the watchdog that this rank is alive and what it does next; `step` is the last training step."""

    def gather(self, value: Any) -> list:
        """Return the values of all ranks, in rank order; `encode` lists the types allowed."""
        return [value]

    def sum(self, *arrays: np.ndarray) -> None:
        """Replace contiguous arrays by their elementwise sums over all ranks, each in its own dtype."""

    def leave(self) -> None:
        """Wait for all ranks and finalise MPI."""

    def barrier(self) -> None:
        """Wait for all ranks, without a time limit and without keeping a core busy."""
        self.gather(None)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; `encode` lists the types allowed."""
        return value

    def from_rank_0(self, read: Callable[[], Any]) -> Any:
        """Call `read()` on rank 0 and return its result on every rank.

        Raises:
            UserError: `read` raised it on rank 0; all ranks raise it.
        """
        value = error = None
        if self.rank == 0:
            try:
                value = read()
            except UserError as failure:
                error = str(failure)
        value, error = self.broadcast([value, error])
        if error:
            raise UserError(error)
        return value


ALONE = Communicator(Rank())
"""The communicator of a single process, for code that takes one."""


class MPICommunicator(Communicator):
    """The ranks of a job started by Open MPI's mpirun, or by Slurm's srun with PMIx."""

    def __init__(self, rank: Rank, reporter: watchdog.Reporter) -> None:
        super().__init__(rank)
        self._report = reporter.report
        configure_open_mpi()
        import mpi4py

        # Finalising at exit would wait for ranks that may have failed.
        mpi4py.rc(initialize=True, finalize=False, threads=False)
        from mpi4py import MPI

        MPI.pickle.__init__(encode, decode)
        self._mpi = MPI
        self._world = MPI.COMM_WORLD
        self.library = MPI.Get_library_version().partition(",")[0]
        if (self._world.rank, self._world.size) != (rank.rank, rank.size):
            raise UserError(
                f"the launcher started rank {rank.rank} of {rank.size}, but the MPI library ({self.library}) reports "
                f"rank {self._world.rank} of {self._world.size}: mpirun and library do not match; use the mpirun of "
                "this environment, or set MPI4PY_LIBMPI to the path of mpirun's libmpi.so.40"
            )

    def progress(self, phase: watchdog.Phase, step: int | None = None) -> None:
        self._report(phase=phase.name, step=step)

    def gather(self, value: Any) -> list:
        with self._together():
            return self._world.allgather(value)

    def broadcast(self, value: Any) -> Any:
        with self._together():
            return self._world.bcast(value)

    def sum(self, *arrays: np.ndarray) -> None:
        with self._together():
            for array in arrays:
                self._world.Allreduce(self._mpi.IN_PLACE, array)

    def leave(self) -> None:
        with self._together():
            self._mpi.Finalize()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Wait for all ranks, then run the body, which calls a collective."""
        self._report(waiting=True)
        request, pause = self._world.Ibarrier(), 1e-5
        while not request.Test():  # MPI would wait by spinning, on a core that another rank may need
            time.sleep(pause)
            pause = min(2 * pause, 1e-3)
        yield
        self._report(waiting=False)


def encode(value: Any, _protocol: Any = None) -> bytes:
    """Encode a value as JSON: None, bool, int, float, str, list, dict with str keys, or NumPy array of numbers.

    Tuples become lists.

    Raises:
        TypeError: the value holds something else.
    """

    def pack(array: Any) -> dict[str, Any]:
        if not isinstance(array, (np.ndarray, np.generic)) or array.dtype.kind not in "biuf":
            raise TypeError(f"{type(array).__name__} values cannot be sent to other ranks")
        return {"array": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}

    return json.dumps(value, default=pack).encode()


def decode(data: Any) -> Any:
    """Invert `encode`; arrays are writable."""

    def unpack(item: dict[str, Any]) -> Any:
        if item.keys() != {"array", "dtype", "shape"}:
            return item
        return np.frombuffer(bytearray(base64.b64decode(item["array"])), item["dtype"]).reshape(item["shape"])

    return json.loads(bytes(data), object_hook=unpack)


def configure_open_mpi() -> None:
    """Set the variables that Open MPI and PMIx read on loading, unless the user has set them."""
    # Docker and similar tools create a bridge with the same address on every host, which Open MPI would take for
    # the same host.
    if not {"OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"} & set(os.environ):
        os.environ.update(OMPI_MCA_btl_tcp_if_exclude=",".join(["127.0.0.0/8", *private_bridges()]))
    # The gradient is one long vector, for which Open MPI's default algorithm takes three times as long on one host.
    if not any(name.startswith("OMPI_MCA_coll_tuned_") for name in os.environ):
        os.environ.update(
            OMPI_MCA_coll_tuned_use_dynamic_rules="1",
            OMPI_MCA_coll_tuned_allreduce_algorithm="5",  # segmented ring
            OMPI_MCA_coll_tuned_allreduce_algorithm_segmentsize=str(1 << 20),
        )
    # Open MPI aborts ranks that cannot send. Delay that until the watchdog has ended the job, with the reason.
    os.environ.setdefault("OMPI_MCA_mpi_abort_delay", str(2 * watchdog.STALLED))
    os.environ.setdefault("OMPI_MCA_opal_signal", "")  # else crashes are delayed as well
    # mpi4py would load the environment's Open MPI even if the mpirun of another installation started this process.
    if library := find_library():
        os.environ.setdefault("MPI4PY_LIBMPI", library)
    # Slurm also offers munge, and the environment's PMIx prints a warning if it lacks that.
    if "native" in os.environ.get("PMIX_SECURITY_MODE", "").split(","):
        os.environ["PMIX_SECURITY_MODE"] = "native"


def find_library() -> str | None:
    """Path of the libmpi that belongs to the mpirun that started this process; None if not found."""
    with contextlib.suppress(psutil.Error):
        process = launcher.find_launcher()
        prefix = pathlib.Path(process.exe() if process else "/").resolve().parent.parent
        for folder in ("lib", "lib64", f"lib/{sysconfig.get_config_var('MULTIARCH')}"):
            library = prefix / folder / "libmpi.so.40"
            if library.exists():
                return str(library)
    return None


def private_bridges() -> list[str]:
    """Names of this host's network bridges that have no default route: those of containers and virtual machines."""
    routes = [line.split() for line in pathlib.Path("/proc/net/route").read_text().splitlines()[1:]]
    default = {name for name, destination, *_ in routes if destination == "00000000"}
    return sorted(
        path.parent.name for path in pathlib.Path("/sys/class/net").glob("*/bridge") if path.parent.name not in default
    )
