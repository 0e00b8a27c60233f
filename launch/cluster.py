"""From the ranks of mpirun to MindSpore's own communication.

mpirun starts the ranks and tells them their numbers; Open MPI carries what they must agree on before
MindSpore is there; everything after that is MindSpore's collectives. On the CPU those need MindSpore's
dynamic cluster, whose scheduler rank 0 starts.
"""

import atexit
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import time

from prep.errors import UserError, report

SCHEDULER_TIMEOUT = 120
"""Seconds for the scheduler to listen: importing MindSpore takes 4 to 20 of them."""

SCHEDULER = """
import ctypes, signal
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with rank 0
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the ranks to answer
import mindspore.communication
mindspore.communication.init()
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among all ranks and among those of its machine."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1

    @property
    def threads(self):
        """This rank's share of the machine's cores."""
        return max(1, (os.cpu_count() or 1) // self.local_ranks)


def place():
    """The place that mpirun gave to this process, or the only one without mpirun."""
    values = [os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in
              ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    return Place() if None in values else Place(*map(int, values))


@contextlib.contextmanager
def joined(prepare, device="CPU"):
    """Check on all ranks, then start MindSpore on each with communication between them.

    Use it before anything imports MindSpore:

        with cluster.joined(prepare) as (here, plan):

    An error inside ends this process without a farewell to the others, upon which mpirun ends them.

    Args:
        prepare: called once on every rank, before MindSpore is imported; returns (settings, plan),
            where settings must be the same on all ranks: a dict of strings.
        device: "CPU" or "GPU"; on GPUs each rank takes the one of its local rank, and MindSpore
            uses NCCL, started by mpirun itself.

    Yields:
        The place of this rank, and plan.

    Raises:
        UserError: of prepare. Of several ranks, rank 0 prints it and all exit with status 1; so too
            if their settings differ.
    """
    here = place()
    # Read when the libraries load; what the user has set stays.
    os.environ.setdefault("OMP_NUM_THREADS", str(here.threads))
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("MS_SUBMODULE_LOG_v", "{DISTRIBUTED:3}")  # it does not heed GLOG_v
    if here.ranks == 1:
        _, plan = prepare()
        start_mindspore(here, device)
        yield here, plan
        return
    mpi = start_mpi(here)
    settings, plan, error = {}, None, None
    try:
        settings, plan = prepare()
    except UserError as failure:
        error = str(failure)
    outcomes = mpi.COMM_WORLD.allgather((socket.gethostname(), settings, error))
    if problem := find_disagreement(outcomes):
        if here.rank == 0:  # once; and before the first exit makes mpirun end the rest
            report(problem)
        mpi.COMM_WORLD.Barrier()
        sys.exit(1)
    address = None
    if device == "CPU":
        address = mpi.COMM_WORLD.bcast((socket.gethostname(), free_port()))
        if here.local_ranks == here.ranks:
            address = ("127.0.0.1", address[1])  # a machine's own name need not lead to it
    start_mindspore(here, device, address)
    # The cluster's own farewell, at exit, is a race between ranks and scheduler that MindSpore 2.8.0
    # now and then loses by a segmentation fault or ten seconds of waiting: leave without it.
    try:
        yield here, plan
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        atexit.register(leave, 130 if isinstance(error, KeyboardInterrupt) else status)
        raise
    mpi.COMM_WORLD.Barrier()
    mpi.Finalize()
    atexit.register(leave, 0)


def leave(status):
    """End this process at once, without MindSpore's farewell."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_mpi(here):
    """Initialise MPI and return mpi4py's module."""
    import mpi4py

    mpi4py.rc.finalize = False  # at exit it would wait for ranks that may have failed
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (here.rank, here.ranks):
        raise UserError(
            f"mpirun says rank {here.rank} of {here.ranks}, the MPI library says rank {world.rank} of "
            f"{world.size}: they are of two installations; use the mpirun of this environment")
    return MPI


def barrier():
    """Wait for all ranks, however long one takes.

    MindSpore's collectives on the CPU give up after 30 seconds; this belongs before one that some
    ranks may reach much later than others.
    """
    if "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].COMM_WORLD.Barrier()


def broadcast(read):
    """What `read()` returns on rank 0, for every rank; its UserError is every rank's, too."""
    if "mpi4py.MPI" not in sys.modules:
        return read()
    world, value, error = sys.modules["mpi4py.MPI"].COMM_WORLD, None, None
    if world.rank == 0:
        try:
            value = read()
        except UserError as failure:
            error = str(failure)
    value, error = world.bcast((value, error))
    if error:
        raise UserError(error)
    return value


def gather(value):
    """The values of all ranks, a list in their order, on every rank."""
    if "mpi4py.MPI" not in sys.modules:
        return [value]
    return sys.modules["mpi4py.MPI"].COMM_WORLD.allgather(value)


def stop_together(error):
    """Raise a UserError or KeyboardInterrupt that all ranks have come to; one of them reports it."""
    if "mpi4py.MPI" not in sys.modules:
        raise error
    world, interrupted = sys.modules["mpi4py.MPI"].COMM_WORLD, isinstance(error, KeyboardInterrupt)
    if world.rank == 0:  # before the first exit makes mpirun end the rest
        print(error, file=sys.stderr, flush=True) if interrupted else report(str(error))
    world.Barrier()
    sys.exit(130 if interrupted else 1)


def find_disagreement(outcomes):
    """What keeps the ranks from starting together: a rank that failed to prepare or that prepared
    something else than rank 0.

    Args:
        outcomes: by rank, (host, settings, error or None).

    Returns:
        A line for the user, or None.
    """
    errors = [(rank, host, error) for rank, (host, _, error) in enumerate(outcomes) if error]
    if len(errors) == len(outcomes):
        return errors[0][2]
    if errors:
        rank, host, error = errors[0]
        return f"rank {rank} on {host}: {error}"
    first_host, expected, _ = outcomes[0]
    for rank, (host, settings, _) in enumerate(outcomes):
        for key, value in settings.items():
            if value != expected.get(key):
                return (f"rank {rank} on {host} has {key} {value}, rank 0 on {first_host} has "
                        f"{expected.get(key)}: start all ranks with the same code, recipe and data")
    return None


def free_port():
    """A TCP port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def start_mindspore(here, device, address=None):
    """Import MindSpore and start its communication, on the CPU with a scheduler at this address."""
    scheduler = None
    if address:
        # MindSpore takes the mere presence of these for a job on MPI's own collectives.
        for name in [name for name in os.environ if name.startswith(("OMPI_", "PMIX_", "PRTE_"))]:
            del os.environ[name]
        os.environ.update(MS_WORKER_NUM=str(here.ranks), MS_SCHED_HOST=address[0],
                          MS_SCHED_PORT=str(address[1]), MS_NODE_ID=str(here.rank))
        if here.rank == 0:
            scheduler = start_scheduler()
    import mindspore
    import mindspore.communication as communication

    try:
        # MindSpore's threads wait by spinning: ranks with a thread for each core of the machine take
        # one another's time, twice as long a step with two ranks on two cores.
        mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target=device,
                              runtime_num_threads=here.threads)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"MindSpore cannot use a {device} here: {reason}") from None
    if here.ranks == 1:
        return
    if address:
        wait_for(address, scheduler)
        os.environ["MS_ROLE"] = "MS_WORKER"
    communication.init()
    if (communication.get_rank(), communication.get_group_size()) != (here.rank, here.ranks):
        raise RuntimeError("MindSpore numbered the ranks differently from mpirun")
    mindspore.set_auto_parallel_context(parallel_mode=mindspore.ParallelMode.DATA_PARALLEL,
                                        gradients_mean=True, device_num=here.ranks)


def start_scheduler():
    """Start the dynamic cluster's scheduler with the MS_* variables of this process."""
    return subprocess.Popen(
        [sys.executable, "-c", SCHEDULER], env=dict(os.environ, MS_ROLE="MS_SCHED"),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(address, scheduler=None):
    """Wait until the scheduler listens: a worker that finds none backs off for half a minute."""
    deadline = time.monotonic() + SCHEDULER_TIMEOUT
    while time.monotonic() < deadline:
        if scheduler is not None and scheduler.poll() is not None:
            raise UserError(
                f"MindSpore's scheduler ended with status {scheduler.returncode} before it listened "
                f"on port {address[1]}; start again, and with GLOG_v=1 to see why")
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise UserError(
        f"no scheduler at {address[0]}:{address[1]} within {SCHEDULER_TIMEOUT} s; rank 0 starts it: "
        "is that machine reachable from here under this name and port?")


def all_reduce(array):
    """Sum a float32 NumPy array over all ranks, which must all call this; returns a new array."""
    import mindspore
    from mindspore import nn, ops

    class AllReduce(nn.Cell):  # a graph: launched by itself, the operator fails on the CPU
        def __init__(self):
            super().__init__()
            self.sum = ops.AllReduce()

        def construct(self, x):
            return self.sum(x)

    barrier()
    return AllReduce()(mindspore.Tensor(array)).asnumpy()
