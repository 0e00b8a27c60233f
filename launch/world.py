"""What the ranks tell each other beside MindSpore's collectives, and before MindSpore's cluster is there.

MPI carries it where mpirun or srun started the ranks, MindSpore's own key-value store where msrun did.
All ranks must call the same functions in the same order.
"""

import contextlib
import datetime
import os
import pathlib
import pickle
import socket
import sysconfig
import time

from launch import keeper
from launch import logs as log_files
from prep.errors import UserError

CONNECT = 120
"""Seconds for rank 0 to open the store: importing MindSpore takes 4 to 20 of them."""
LOST = 30
"""Seconds without the store after which a rank fails by itself; before, its keeper ends it."""


class World:
    """All ranks; `name` is what carries their words, `rank` and `ranks` are this one's and their number."""

    def barrier(self):
        """Wait for all ranks, however long one takes, without taking its time."""
        arrived, pause = self.arrive(), 1e-5
        while not arrived():  # MPI's own waiting takes a whole core, the store's keeps Python's lock
            time.sleep(pause)
            pause = min(2 * pause, 0.01)


class MPI(World):
    """Ranks that Open MPI's mpirun, or Slurm's srun with PMIx, started."""

    def __init__(self, here):
        # Docker and the like give the same address to a bridge on every host, by which Open MPI would
        # take one host for another.
        if not {"OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"} & set(os.environ):
            os.environ["OMPI_MCA_btl_tcp_if_exclude"] = ",".join(["127.0.0.0/8", *private_bridges()])
        # Of several Open MPIs mpi4py takes the environment's; and MindSpore the one that is loaded.
        if library := find_library():
            os.environ.setdefault("MPI4PY_LIBMPI", library)
        # Slurm also offers munge, which the PMIx of the environment may lack and complain about.
        if "native" in os.environ.get("PMIX_SECURITY_MODE", "").split(","):
            os.environ["PMIX_SECURITY_MODE"] = "native"
        import mpi4py

        mpi4py.rc.finalize = False  # at exit it would wait for ranks that may have failed
        from mpi4py import MPI as module

        self.module, self.world = module, module.COMM_WORLD
        self.name = module.Get_library_version().partition(",")[0]
        self.rank, self.ranks = self.world.rank, self.world.size
        if (self.rank, self.ranks) != (here.rank, here.ranks):
            raise UserError(
                f"the launcher says rank {here.rank} of {here.ranks}, the MPI library ({self.name}) "
                f"rank {self.rank} of {self.ranks}: they do not belong together; use the mpirun of this "
                "environment, or name the launcher's libmpi.so.40 in MPI4PY_LIBMPI")

    def arrive(self):
        return self.world.Ibarrier().Test

    def gather(self, value):
        """The values of all ranks, a list in their order."""
        self.barrier()
        return self.world.allgather(value)

    def broadcast(self, value):
        """Rank 0's value."""
        self.barrier()
        return self.world.bcast(value)

    def leave(self):
        """The last barrier."""
        self.barrier()
        self.module.Finalize()


class Store(World):
    """Ranks that MindSpore's msrun started; the store is a thread of rank 0."""

    name = "none (MindSpore's TCPStore)"

    def __init__(self, here):
        self.rank, self.ranks = here.rank, here.ranks
        self.rounds = self.shown = 0
        self.lost = None
        host, port = os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"])
        # The first words are spoken before there is a log file, and MindSpore reads this only once.
        os.environ.setdefault("GLOG_v", "3")
        with log_files.hidden():
            from mindspore.mint.distributed import TCPStore

        try:
            self.store = TCPStore(
                host, port, self.ranks, is_master=self.rank == 0, wait_for_workers=False,
                timeout=datetime.timedelta(seconds=CONNECT))
        except RuntimeError:
            here = f"rank {self.rank} on {socket.gethostname()}"
            raise UserError(
                f"{here} cannot listen at msrun's --master_addr {host}, --master_port {port}: the address "
                "must be of the host with --node_rank=0, and the port free" if self.rank == 0 else
                f"{here} does not reach rank 0 at msrun's --master_addr {host}, --master_port {port}; "
                "has it failed, or is there a firewall?") from None

    def arrive(self):
        self.rounds += 1
        self.store.add("arrived", 1)
        return lambda: self.count("arrived") >= self.rounds * self.ranks

    def count(self, key):
        """A counter of the store's, 0 if the store is gone: why, the keepers say, who end the job."""
        try:
            return self.store.add(key, 0)
        except RuntimeError:
            self.lost = self.lost or time.monotonic()
            if time.monotonic() > self.lost + LOST:
                raise
            return 0

    def gather(self, value):
        """The values of all ranks, a list in their order."""
        self.show(value)
        return [self.seen(rank) for rank in range(self.ranks)]

    def broadcast(self, value):
        """Rank 0's value."""
        self.show(value if self.rank == 0 else None)
        return self.seen(0)

    def show(self, value):
        """Put a value where all ranks see it, once all have."""
        self.store.set(f"{self.rounds + 1}/{self.rank}", pickle.dumps(value))
        self.barrier()
        if self.shown:  # all have seen it, or they would not be here
            self.store.delete_key(f"{self.shown}/{self.rank}")
        self.shown = self.rounds

    def seen(self, rank):
        """What a rank has shown last."""
        return pickle.loads(self.store.get(f"{self.shown}/{rank}"))

    def leave(self):
        """The last barrier."""
        self.barrier()
        if self.rank:
            with contextlib.suppress(RuntimeError):  # rank 0 may not wait for the answer
                self.store.add("left", 1)
            return
        while self.count("left") < self.ranks - 1:
            time.sleep(0.01)


def find_library():
    """The libmpi of the mpirun above this process, which may not be this environment's; None if there is
    none, or none is found beside it."""
    launcher = keeper.find_launcher()
    if launcher:
        prefix = pathlib.Path(f"/proc/{launcher}/exe").resolve().parent.parent
        for folder in ("lib", "lib64", f"lib/{sysconfig.get_config_var('MULTIARCH')}"):
            library = prefix / folder / "libmpi.so.40"
            if library.exists():
                return str(library)
    return None


def private_bridges():
    """Names of this host's network bridges that no default route uses: of containers, of machines."""
    routes = [line.split() for line in pathlib.Path("/proc/net/route").read_text().splitlines()[1:]]
    default = {name for name, destination, *_ in routes if destination == "00000000"}
    return sorted(path.parent.name for path in pathlib.Path("/sys/class/net").glob("*/bridge")
                  if path.parent.name not in default)
