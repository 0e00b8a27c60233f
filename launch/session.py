"""Starts a command on one rank or many: from the launcher's variables to MindSpore, ready to use."""

import argparse
import atexit
import contextlib
import os
import pathlib
import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from launch import gpus, launcher, logs, ranks, versions, watchdog
from launch.communicator import Communicator, MPICommunicator
from launch.errors import UserError, describe_os_error, print_error

Plan = TypeVar("Plan")


class JobError(UserError):
    """An error that all ranks raise together; rank 0 reports it once."""


class JobInterrupt(KeyboardInterrupt):
    """An interruption that all ranks raise together; rank 0 reports it once."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options whose values `start` takes."""
    parser.add_argument(
        "--device", default="cpu", type=str.lower, choices=("cpu", "gpu"), help="where the network runs (default: cpu)"
    )
    parser.add_argument(
        "--collective",
        default="auto",
        choices=("auto", "nccl", "mpi"),
        help="how ranks on GPUs sum gradients: NCCL inside the graph, MPI through host memory, or "
        "auto, NCCL if it can be initialised (default: auto); CPUs always use MPI",
    )


@contextlib.contextmanager
def start(
    prepare: Callable[[], tuple[dict[str, str], Plan]],
    device: str = "cpu",
    collective: str = "auto",
    log_folder: pathlib.Path | None = None,
) -> Iterator[tuple[Communicator, Plan]]:
    """Check everything on all ranks, then start MindSpore on each.

    Use it before anything imports MindSpore:

        with session.start(prepare) as (comm, plan):

    In a job of several ranks the code that follows runs in a child of the process that mpirun started, which
    becomes its watchdog. An error in the body ends all ranks; the user reads that of the rank that failed first.

    Args:
        prepare: called once on every rank, before MindSpore starts; returns (settings, plan). The settings, texts
            by name, must be the same on all ranks.
        device: "cpu" or "gpu"; on GPUs each rank takes the one of its local rank.
        collective: "auto", "nccl" or "mpi"; see `add_options`.
        log_folder: for a log file of each rank on its host, made after all checks have passed; None for no logs.

    Yields:
        The communicator of all ranks, and the plan.

    Raises:
        UserError: in a job of one rank, that of `prepare`. Of several ranks, rank 0 prints the error and all exit
            with status 1; so too if their settings, code or package versions differ.
    """
    rank = ranks.current()
    rank.claim_cores()
    log = log_folder and log_folder / f"rank-{rank.rank}.log"
    if rank.size == 1:
        _, plan = prepare()
        gpus.check_device(rank, device)
        with logged(log, rank.rank):
            start_mindspore(rank, device)
            yield Communicator(rank), plan
        return
    reporter = watchdog.watch(rank)
    comm: Communicator = Communicator(rank, reporter)
    with contextlib.ExitStack() as stack:
        try:
            comm = MPICommunicator(rank, reporter)
            plan = agree(comm, rank, prepare, device)
            connect_watchdogs(comm, rank, reporter, log)
            stack.enter_context(logged(log, rank.rank))
            if device == "cpu" or collective == "mpi":
                hide_launcher()
            start_mindspore(rank, device)
            if device == "gpu" and collective != "mpi":
                from launch.collective import start_nccl

                comm.nccl = start_nccl(comm)
                if collective == "nccl" and not comm.nccl:
                    raise JobError("--collective nccl: NCCL cannot be used; see above, or use --collective mpi")
            comm.progress(watchdog.Phase.RUNNING)
            yield comm, plan
            comm.leave()
        except BaseException as error:
            give_up(error, comm, reporter)
    # MindSpore's destructors can crash or wait for ranks that have left.
    atexit.register(leave, 0)


def agree(
    comm: Communicator, rank: ranks.Rank, prepare: Callable[[], tuple[dict[str, str], Plan]], device: str
) -> Plan:
    """Prepare on all ranks; raises JobError if one of them cannot, or if one differs from rank 0."""
    settings, plan, error = {}, None, None
    try:
        settings, plan = prepare()
        gpus.check_device(rank, device)
    except UserError as failure:
        error = str(failure)
    except OSError as failure:
        error = describe_os_error(failure)
    found = {"MPI": comm.library, **versions.software(), **settings}
    if problem := find_disagreement(comm.gather([socket.gethostname(), found, error])):
        raise JobError(problem)
    return plan


def find_disagreement(outcomes: list[Any]) -> str | None:
    """A line on what keeps ranks from starting together: an error, or settings that differ from rank 0's.

    Args:
        outcomes: [host, settings, error or None] of each rank.
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
                return (
                    f"rank {rank} on {host} has {key} {value}, rank 0 on {first_host} has {expected.get(key)}: "
                    "start all ranks with the same code, recipe and data"
                )
    return None


def connect_watchdogs(
    comm: Communicator, rank: ranks.Rank, reporter: watchdog.Reporter, log: pathlib.Path | None
) -> None:
    """Connect the watchdogs to that of rank 0 and create the log files; raises JobError if a rank cannot."""
    addresses = ["127.0.0.1"] if rank.single_host else launcher.addresses()
    addresses, port, secret, host = comm.broadcast(
        [addresses, reporter.port, secrets.token_hex(16), socket.gethostname()]
    )
    problem = None
    if not reporter.join(addresses, port, secret, log and str(log)):
        problem = (
            f"cannot reach rank 0's host {host} at {' or '.join(addresses)}, port {port}: open the TCP ports "
            "from 1024 on between the hosts"
        )
    elif log:
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.open("a").close()
        except OSError as failure:
            problem = describe_os_error(failure)
    for number, (name, problem) in enumerate(comm.gather([socket.gethostname(), problem])):
        if problem:
            raise JobError(f"rank {number} on {name}: {problem}")


def hide_launcher() -> None:
    """Remove the launcher's variables, in which MindSpore would see a job for its own MPI start-up."""
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMIX_", "PRTE_"))]:
        del os.environ[name]


def start_mindspore(rank: ranks.Rank, device: str) -> None:
    """Import MindSpore in graph mode on a device, with this rank's threads.

    Raises:
        UserError: MindSpore cannot use the device.
    """
    if os.environ.get("MS_ROLE"):
        raise UserError(
            f"MS_ROLE is {os.environ['MS_ROLE']} in the environment, which makes MindSpore start a cluster "
            "of its own: unset MS_ROLE, and start several ranks by mpirun"
        )
    with logs.only_logged():
        import mindspore
    try:
        # MindSpore's threads wait by spinning. With a thread for each core of the host, two ranks on two cores
        # take twice as long for a step.
        mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target=device.upper(), runtime_num_threads=rank.threads)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"MindSpore cannot use a {device.upper()} here: {reason}") from None


def logged(log: pathlib.Path | None, rank: int) -> contextlib.AbstractContextManager:
    """A context in which this rank's output goes to its log file, if it has one."""
    # Without a log file nobody wants to read MindSpore's warnings.
    os.environ.setdefault("GLOG_v", "2" if log else "3")
    if not log:
        return contextlib.nullcontext()
    log.parent.mkdir(parents=True, exist_ok=True)
    return logs.log_to(log, rank)


def give_up(error: BaseException, comm: Communicator, reporter: watchdog.Reporter) -> NoReturn:
    """End this rank for an error, which its watchdog passes on to the user."""
    status = 1
    if isinstance(error, (JobError, JobInterrupt)):
        status = 1 if isinstance(error, JobError) else 130
        if comm.rank == 0:  # before the first exit makes mpirun end the other ranks
            print_error(str(error)) if status == 1 else print(error, file=sys.stderr, flush=True)
        reporter.fail("")
        comm.leave()
    elif isinstance(error, SystemExit):  # the user has been told
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        reporter.fail("")
    elif isinstance(error, KeyboardInterrupt):
        status = 130
        reporter.fail(str(error) or "interrupted")
    elif isinstance(error, UserError):
        reporter.fail(str(error))
    elif isinstance(error, OSError) and not isinstance(error, ConnectionError):
        reporter.fail(describe_os_error(error))
    else:
        traceback.print_exception(error, file=getattr(sys.stderr, "log", sys.stderr))
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
        reporter.fail(": ".join([type(error).__name__, *lines[:1]]))
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process at once, without destructors."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
