"""From the ranks of a launcher to MindSpore's own communication.

mpirun, Slurm's srun or MindSpore's msrun starts the ranks and tells them their numbers; `launch.world`
carries what they must agree on before MindSpore's cluster is there; everything after that is MindSpore's
collectives. On the CPU those need MindSpore's dynamic cluster, whose scheduler rank 0 starts. A keeper
beside each rank (`launch.keeper`) ends the job when any of that fails.
"""

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import secrets
import select
import socket
import subprocess
import sys
import time
import traceback

from launch import keeper, world
from launch import logs as log_files
from prep.errors import UserError, describe_os_error, report

ROOT = pathlib.Path(__file__).resolve().parent.parent

SCHEDULER_TIMEOUT = 120
"""Seconds for the scheduler to listen: importing MindSpore takes 4 to 20 of them."""

SCHEDULER = """
import ctypes, os, signal, socket, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with rank 0
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # those are for the ranks
    signal.signal(number, signal.SIG_IGN)
import mindspore.communication
with socket.create_server(("", 0)) as free:  # now, not before the import: others look for ports, too
    port = str(free.getsockname()[1])
os.environ["MS_SCHED_PORT"] = port
os.write(int(sys.argv[1]), port.encode())
os.close(int(sys.argv[1]))
mindspore.communication.init()
"""
"""The scheduler's program; its argument is a descriptor to which it writes its port."""

PACKAGES = ("mindspore", "numpy", "mpi4py", "opencv-python-headless", "zstandard")
"""Whose versions must be the same on all ranks, and are kept with a run."""


everyone = None
"""The `launch.world.World` of this rank; None with one rank."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among all ranks and among those of its machine."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    cores: frozenset = dataclasses.field(default_factory=lambda: cores_of(0))
    """Those that the machine gives to the job."""
    msrun: bool = False
    """Whether msrun started it, so that there is no MPI."""

    @property
    def threads(self):
        """This rank's share of the cores."""
        share = int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
        return share or max(1, len(self.cores) // self.local_ranks)


@functools.cache  # MindSpore may not see these variables, so they do not stay
def place():
    """The place that mpirun, srun or msrun gave to this process; else the only one.

    Raises:
        SystemExit: this is msrun's scheduler, in whose place rank 0 starts one that its keeper watches.
        UserError: several processes were started in a way that does not let them find each other.
    """
    values = [os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in
              ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    if None not in values:
        return Place(*map(int, values), cores=cores_of(os.getppid()))  # mpirun binds only the ranks
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "PMIX_RANK" not in os.environ:
            if os.environ.get("SLURM_PROCID") != "0":
                sys.exit(1)  # one of them says it
            raise UserError("srun started several ranks that cannot find each other: use srun --mpi=pmix "
                            "(not pmi2; srun --mpi=list says what is there), or mpirun within the "
                            "allocation")
        return slurm_place()
    return msrun_place() if os.environ.get("MS_ROLE") else Place()


def slurm_place():
    """The place that Slurm's variables describe."""
    by_host = []
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):  # as "4(x2),3"
        tasks, _, times = part.partition("(x")
        by_host += [int(tasks)] * int(times.rstrip(")") or 1)
    rank, ranks, local_rank, host = (int(os.environ[f"SLURM_{name}"]) for name in (
        "PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID"))
    return Place(rank, ranks, local_rank, by_host[host])


def msrun_place():
    """The place that msrun's variables and its command line describe: no variable has how many ranks are
    on this host."""
    command = keeper.read(os.getppid(), "cmdline").split("\0")
    if not any(word.endswith(("/msrun", "mindspore.parallel.cluster.run")) for word in command):
        raise UserError(f"MS_ROLE is {os.environ['MS_ROLE']} in the environment, but msrun did not start "
                        "this: unset MS_ROLE, or start the ranks by mpirun or msrun")
    if os.environ["MS_ROLE"] == "MS_SCHED":
        sys.exit(0)
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--local_worker_num", type=int, default=8)
    options.add_argument("--join", default="False")
    given, _ = options.parse_known_args(command)
    if given.join != "True":
        raise UserError("msrun leaves its ranks alone, and nobody would end them: give it --join=True")
    if "MS_NODE_ID" not in os.environ:
        raise UserError("msrun did not number its ranks: give it --node_rank=0 on the host of "
                        "--master_addr, and 1, 2, ... on the others")
    rank, ranks, local_rank = (int(os.environ[name]) for name in (
        "MS_NODE_ID", "MS_WORKER_NUM", "DEVICE_ID"))
    return Place(rank, ranks, local_rank, given.local_worker_num, cores_of(os.getppid()),
                 msrun=True)


def cores_of(process):
    """Numbers of the cores that a process may use; 0 is this one."""
    return frozenset(os.sched_getaffinity(process))


def add_options(parser):
    """Give an argparse parser the options for what `joined` takes."""
    parser.add_argument("--device", default="CPU", type=str.upper, choices=("CPU", "GPU"))
    parser.add_argument("--dynamic-cluster", action="store_true",
                        help="on GPUs start NCCL by MindSpore's dynamic cluster, as on the CPU and under "
                        "msrun, and not by MPI")


@contextlib.contextmanager
def joined(prepare, device="CPU", logs=None, dynamic=False):
    """Check on all ranks, then start MindSpore on each with communication between them.

    Use it before anything imports MindSpore:

        with cluster.joined(prepare) as (here, plan):

    One of several ranks is from here on a child of the process that mpirun started, its keeper.
    An error inside ends all ranks, and the user reads that of the rank that failed first.

    Args:
        prepare: called once on every rank, before MindSpore is started; returns (settings, plan),
            where settings must be the same on all ranks: a dict of strings.
        device: "CPU" or "GPU"; on GPUs each rank takes the one of its local rank, and MindSpore
            uses NCCL, started by MPI.
        logs: a folder (`pathlib.Path`) for a log file of each rank, on that rank's host, made when
            all checks have passed; None for no log files.
        dynamic: start NCCL by MindSpore's dynamic cluster, as where there is no MPI: on the CPU, and
            under msrun.

    Yields:
        The place of this rank, and plan.

    Raises:
        UserError: of prepare, with one rank. Of several ranks, rank 0 prints it and all exit with
            status 1; so too if their settings, code or package versions differ.
    """
    here = place()
    set_threads(here)
    log = logs and logs / f"rank-{here.rank}.log"
    if here.ranks == 1:
        _, plan = prepare()
        check_device(here, device)
        with log_to(log, here):
            start_mindspore(here, device)
            yield here, plan
        return
    line = keeper.part(here)
    enter(here)
    plan = agree(here, prepare, device)
    address = meet(here, line, log)
    with log_to(log, here) as stream:
        try:
            by_mpi = device == "GPU" and not (here.msrun or dynamic)
            start_mindspore(here, device, None if by_mpi else address, line)
            yield here, plan
            everyone.leave()
        except BaseException as error:
            give_up(error, line, stream)
        # The cluster's own farewell, at exit, is a race between ranks and scheduler that MindSpore
        # 2.8.0 now and then loses by a segmentation fault or ten seconds of waiting: leave without.
        atexit.register(leave, 0)


def enter(here):
    """Meet the other ranks."""
    global everyone
    everyone = (world.Store if here.msrun else world.MPI)(here)


def agree(here, prepare, device):
    """Prepare on all ranks; returns the plan, or ends the job if one cannot or is not like rank 0."""
    settings, plan, error = {}, None, None
    try:
        settings, plan = prepare()
        check_device(here, device)
    except UserError as failure:
        error = str(failure)
    except OSError as failure:
        error = describe_os_error(failure)
    outcomes = gather((socket.gethostname(), software() | settings, error))
    if problem := find_disagreement(outcomes):
        stop_together(UserError(problem))
    return plan


def meet(here, line, log):
    """Join the keepers, and find an address of rank 0's host that all ranks reach.

    Returns:
        (that address, this host's own on the way there).
    """
    host, addresses, port, secret = gather(
        (socket.gethostname(), keeper.addresses(), line.port, secrets.token_hex(16)))[0]
    if given := os.environ.get("MS_SCHED_HOST"):
        addresses = [given]
    elif here.local_ranks == here.ranks:
        addresses = ["127.0.0.1"]  # others may be blocked by a firewall, or go with a cable
    reached, own = line.join(addresses, port, secret, log)
    problem = None
    if log:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.open("a").close()
        except OSError as failure:
            problem = describe_os_error(failure)
    if not reached:
        problem = (f"reaches none of the addresses of rank 0's host {host} ({', '.join(addresses)}) at "
                   f"port {port}: let the hosts connect to each other's ports from 1024 on")
    outcomes = gather((socket.gethostname(), problem, reached))
    for rank, (name, problem, _) in enumerate(outcomes):
        if problem:
            stop_together(UserError(f"rank {rank} on {name}: {problem}"))
    common = [address for address in addresses if all(address in found for *_, found in outcomes)]
    if not common:
        found = "; ".join(f"{name}: {', '.join(found)}" for name, _, found in outcomes)
        stop_together(UserError(f"no address of rank 0's host {host} is one that all hosts reach "
                                f"({found}): set MS_SCHED_HOST to one that they shall use"))
    return common[0], own


@functools.cache  # it reads every source file
def software():
    """What must be the same on all ranks besides a command's own settings, a dict of strings."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.py", "*.cpp", "*.cu") for folder in (
            "launch", "model", "prep", "train") for path in (ROOT / folder).rglob(kind)):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    found = {"code": digest.hexdigest()[:16], "Python": sys.version.split()[0],
             "MPI": everyone.name if everyone else "none"}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def set_threads(here):
    """Give this rank its share of the machine's cores; OMP_NUM_THREADS, if set, is the user's word.

    mpirun binds each of two ranks to one core, and more to a socket: a rank may use its whole share.
    """
    if "OMP_NUM_THREADS" not in os.environ and len(cores_of(0)) < here.threads:
        os.sched_setaffinity(0, here.cores)
    # Read when the libraries load, or first work.
    os.environ.setdefault("OMP_NUM_THREADS", str(here.threads))
    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", os.environ["OMP_NUM_THREADS"])


def check_device(here, device):
    """Raise UserError unless this machine has a GPU for each of its ranks, if they are to have one."""
    if device != "GPU":
        return
    count = count_gpus()
    if count is None:
        raise UserError(f"{socket.gethostname()} has no NVIDIA driver (libcuda.so.1): install it, or "
                        "train with --device cpu")
    if count < here.local_ranks:
        raise UserError(f"{socket.gethostname()} has {count} GPU(s) for {here.local_ranks} "
                        "rank(s): start as many ranks on each host as it has GPUs (mpirun -n, "
                        "--host NAME:GPUS); CUDA_VISIBLE_DEVICES may hide some")


def count_gpus():
    """How many GPUs a process here may use, as CUDA counts them; None without NVIDIA's driver."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def log_to(log, here):
    """A context in which this rank's output goes to its log file, if it has one."""
    # Without a file for MindSpore's warnings nobody wants to read them.
    os.environ.setdefault("GLOG_v", "2" if log else "3")
    os.environ.setdefault("MS_SUBMODULE_LOG_v", f"{{DISTRIBUTED:{os.environ['GLOG_v']}}}")
    if not log:
        return contextlib.nullcontext()
    log.parent.mkdir(parents=True, exist_ok=True)
    return log_files.redirected(log, here.rank)


def give_up(error, line, log):
    """End this rank for an error, which its keeper passes on to the user."""
    status = 1
    if isinstance(error, SystemExit):  # the user was told
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    elif isinstance(error, KeyboardInterrupt):
        status = 130
        line.fail(str(error) or "interrupted")
    elif isinstance(error, UserError):
        line.fail(str(error))
    elif isinstance(error, OSError) and not isinstance(error, ConnectionError):
        line.fail(describe_os_error(error))
    else:
        traceback.print_exception(error, file=log)
        text = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
        line.fail(f"{type(error).__name__}: {text}")
    leave(status)


def leave(status):
    """End this process at once, without MindSpore's farewell."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def barrier():
    """Wait for all ranks, however long one takes, without taking its time.

    MindSpore's collectives on the CPU give up after 30 seconds; this belongs before one that some
    ranks may reach much later than others.
    """
    if everyone:
        everyone.barrier()


def broadcast(read):
    """What `read()` returns on rank 0, for every rank; its UserError is every rank's, too."""
    if not everyone:
        return read()
    value, error = None, None
    if everyone.rank == 0:
        try:
            value = read()
        except UserError as failure:
            error = str(failure)
    value, error = everyone.broadcast((value, error))
    if error:
        raise UserError(error)
    return value


def gather(value):
    """The values of all ranks, a list in their order, on every rank."""
    return everyone.gather(value) if everyone else [value]


def stop_together(error):
    """Raise a UserError or KeyboardInterrupt that all ranks have come to; one of them reports it."""
    if not everyone:
        raise error
    interrupted = isinstance(error, KeyboardInterrupt)
    if everyone.rank == 0:  # before the first exit makes mpirun end the rest
        print(error, file=sys.stderr, flush=True) if interrupted else report(str(error))
    everyone.leave()
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


def start_mindspore(here, device, address=None, line=None):
    """Import MindSpore and start its communication.

    Args:
        here: this rank's place.
        device: "CPU" or "GPU".
        address: for MindSpore's dynamic cluster, (of the scheduler's host, this host's own on the way
            there); None for MPI's own start-up, or for one rank.
        line: to this rank's keeper.
    """
    scheduler = None
    if address:
        # MindSpore takes the mere presence of these for a job on MPI's own collectives.
        for name in [name for name in os.environ if name.startswith(("OMPI_", "PMIX_", "PRTE_"))]:
            del os.environ[name]
        os.environ.update(MS_WORKER_NUM=str(here.ranks), MS_SCHED_HOST=address[0],
                          MS_WORKER_IP=address[1], MS_NODE_ID=str(here.rank),
                          MS_RETRY_INTERVAL_LOWER="1", MS_RETRY_INTERVAL_UPPER="1")  # seconds, not 3
        if here.rank == 0:
            scheduler = start_scheduler()
    with log_files.hidden():
        import mindspore
        import mindspore.communication as communication

    try:
        # MindSpore's threads wait by spinning: ranks with a thread for each core of the machine take
        # one another's time, twice as long a step with two ranks on two cores.
        mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target=device,
                              runtime_num_threads=threads(here))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"MindSpore cannot use a {device} here: {reason}") from None
    if here.ranks == 1:
        return
    if address:
        os.environ["MS_SCHED_PORT"] = broadcast(lambda: await_scheduler(*scheduler, line))
        os.environ["MS_ROLE"] = "MS_WORKER"
    communication.init()
    if (communication.get_rank(), communication.get_group_size()) != (here.rank, here.ranks):
        raise RuntimeError("MindSpore numbered the ranks differently from the launcher")
    mindspore.set_auto_parallel_context(parallel_mode=mindspore.ParallelMode.DATA_PARALLEL,
                                        gradients_mean=True, device_num=here.ranks)


def threads(here):
    """How many threads this rank may have: OMP_NUM_THREADS, else its share of the cores."""
    number = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, int(number)) if number.isdecimal() else here.threads


def start_scheduler():
    """Start the dynamic cluster's scheduler with the MS_* variables of this process.

    Returns:
        (its process, a descriptor from which to read its port).
    """
    reading, writing = os.pipe()
    output = None if log_files.is_active() else subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-c", SCHEDULER, str(writing)], env=dict(os.environ, MS_ROLE="MS_SCHED"),
        pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    os.close(writing)
    return process, reading


def await_scheduler(process, reading, line):
    """Wait until the scheduler listens: a worker that finds none backs off for half a minute.

    Returns:
        Its port, as a text.
    """
    host, deadline = socket.gethostname(), time.monotonic() + SCHEDULER_TIMEOUT
    while time.monotonic() < deadline:
        if select.select([reading], [], [], 1)[0]:
            port = os.read(reading, 16).decode()
            while port and process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    socket.create_connection((os.environ["MS_SCHED_HOST"], int(port)), 1).close()
                    line.watch("MindSpore's scheduler", process.pid)
                    return port
                time.sleep(0.05)
            raise UserError(f"MindSpore's scheduler on {host} ended before it listened; start again, "
                            "and with GLOG_v=1 to see why")
    raise UserError(f"MindSpore's scheduler on {host} does not listen after {SCHEDULER_TIMEOUT} s: is "
                    "that machine busy? Start again")


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
