"""The rank of this process, its cores and its number of threads."""

import dataclasses
import functools
import os
import pathlib
import re
import socket
import sys

from launch.errors import UserError

VARIABLES = {
    "OMP_NUM_THREADS": (r" *[1-9]\d* *(, *[1-9]\d* *)*", "a number of threads, such as 4"),
    "OPENCV_FOR_THREADS_NUM": (r"\d+", "a number of threads, such as 4"),
    "GLOG_v": (r"[0-4]", "a level from 0 (debug) to 4 (critical)"),
}
"""Environment variables of the libraries: pattern of their values, and what is expected."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """One process of a job, numbered by mpirun or srun."""

    rank: int = 0
    size: int = 1
    """Ranks in the job."""
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this host."""
    cores: frozenset[int] = dataclasses.field(default_factory=lambda: usable_cores(0))
    """Cores that the job may use on this host."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    @property
    def threads(self) -> int:
        """Threads for this rank: OMP_NUM_THREADS if set, else its share of the host's cores."""
        # One number per level of nesting.
        given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        return int(given) if given.isdecimal() and int(given) else self.share

    @property
    def share(self) -> int:
        """Number of cores for this rank: those Slurm gives a task, else an equal share of the host's."""
        return int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or max(1, len(self.cores) // self.local_size)

    @property
    def single_host(self) -> bool:
        """Whether all ranks of the job are on this host."""
        return self.local_size == self.size

    def claim_cores(self) -> None:
        """Bind this process to its share of the host's cores, and size the thread pools to match.

        Unbound ranks migrate to each other's cores, and MindSpore's threads wait by spinning: a step of two ranks on
        two cores then takes 1.25 times as long. By default mpirun binds one or two ranks to a core each and more
        ranks to a socket; with --oversubscribe it binds none; on other hosts it may choose cores that are not the
        job's. Any other binding is the user's and is kept. Call this before importing the libraries, which read the
        variables on loading. OMP_NUM_THREADS takes precedence if set.
        """
        first = self.local_rank * self.share
        own = sorted(self.cores, key=physical_core)[first : first + self.share]
        bound = usable_cores(0)
        if len(own) == self.share and (bound == self.cores or len(bound) < self.share or not bound <= self.cores):
            os.sched_setaffinity(0, own)
        for name in VARIABLES:
            if os.environ.get(name) == "":  # counts as unset
                del os.environ[name]
        os.environ.setdefault("OMP_NUM_THREADS", str(self.share))
        os.environ.setdefault("OPENCV_FOR_THREADS_NUM", str(self.threads))


def check_variables() -> None:
    """Raise UserError if a variable has a value at which the libraries that read it on loading fail or crash."""
    for name, (pattern, expected) in VARIABLES.items():
        value = os.environ.get(name)
        if value is not None and not re.fullmatch(pattern, value):
            raise UserError(f"{name} is {value!r} in the environment; set it to {expected}, or unset it")


@functools.cache  # MindSpore must not see these variables, so they are removed later
def current() -> Rank:
    """The rank of this process; a job of one rank if no launcher started it.

    Raises:
        UserError: the launcher started several processes that cannot find each other.
    """
    variables = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    if all(name in os.environ for name in variables):
        # mpirun binds the ranks, but not itself.
        return Rank(*(int(os.environ[name]) for name in variables), cores=usable_cores(os.getppid()))
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "PMIX_RANK" not in os.environ:
            if os.environ.get("SLURM_PROCID") != "0":
                sys.exit(1)  # the first reports it
            raise UserError(
                "srun started several ranks without PMIx, so they cannot find each other: use srun --mpi=pmix "
                "(srun --mpi=list shows what is available; pmi2 is not supported), or mpirun inside the allocation"
            )
        return from_slurm()
    if int(os.environ.get("PMI_SIZE", 1)) > 1:  # MPICH, Intel MPI
        raise UserError(
            "another MPI's mpirun started this process, expected Open MPI's: use the mpirun of this environment, or "
            "put Open MPI's first on the PATH"
        )
    return Rank()


def from_slurm() -> Rank:
    """The rank described by the variables of a Slurm job step."""
    by_host: list[int] = []
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):  # such as "4(x2),3"
        tasks, _, repeats = part.partition("(x")
        by_host += [int(tasks)] * int(repeats.rstrip(")") or 1)
    rank, size, local_rank, host = (
        int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID")
    )
    return Rank(rank, size, local_rank, by_host[host], slurm_cores())


def slurm_cores() -> frozenset[int]:
    """Cores of all ranks that a Slurm job step has on this host; Slurm may have bound each rank to some of them."""
    if os.environ.get("SLURM_CPU_BIND_TYPE") != "mask_cpu:":
        return usable_cores(0)
    masks = [int(mask, 16) for mask in os.environ["SLURM_CPU_BIND_LIST"].split(",")]
    return frozenset(core for mask in masks for core in range(mask.bit_length()) if mask >> core & 1)


def usable_cores(process: int) -> frozenset[int]:
    """Cores that a process may run on; 0 is the calling process."""
    return frozenset(os.sched_getaffinity(process))


def physical_core(core: int) -> tuple[int, int, int]:
    """Sort key that puts the hardware threads of a physical core next to each other."""
    topology = pathlib.Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        package, number = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    except OSError:  # a container may hide them
        package, number = 0, core
    return package, number, core
