"""Starts a command on one rank or many: from the launcher's variables to MindSpore, ready to use."""

import argparse
import atexit
import contextlib
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from launch import gpus, logs, ranks, rendezvous, versions, watchdog
from launch.communicator import Communicator, MPICommunicator
from launch.errors import UserError, describe_os_error, print_error, print_line

Plan = TypeVar("Plan")
Prepare = Callable[[], tuple[dict[str, str], Plan]]
"""Returns (settings, plan): settings, texts by name, that must be the same on all ranks, and what to run with."""
Outcome = tuple[str, dict[str, str], str | None]
"""What the checks found on a rank: its name, settings, error."""


class JobError(UserError):
    """An error that all ranks raise together; rank 0 reports it once."""


class JobInterrupt(KeyboardInterrupt):
    """An interruption that all ranks raise together; rank 0 reports it once."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options whose values `start` takes."""
    parser.add_argument(
        "--device", default="cpu", type=str.lower, choices=("cpu", "gpu"), help="where the network runs"
    )
    parser.add_argument(
        "--collective",
        default="auto",
        choices=("auto", "nccl", "mpi"),
        help="how ranks on GPUs sum gradients: NCCL inside the graph, MPI through host memory, or "
        "auto: NCCL if it can be initialised, else MPI; CPUs always use MPI",
    )


@contextlib.contextmanager
def start(
    prepare: Prepare[Plan],
    device: str = "cpu",
    collective: str = "auto",
    log_folder: pathlib.Path | None = None,
) -> Iterator[tuple[Communicator, Plan]]:
    """Check everything on all ranks, then start MindSpore on each. Use it before anything imports MindSpore:

        with session.start(prepare) as (comm, plan):

    In a job of several ranks, the body runs in a child of the process that mpirun started, which becomes its watchdog.
    An error in it ends all ranks; the user sees the error of the rank that failed first.

    Args:
        prepare: called once on every rank, before MindSpore starts.
        device: "cpu" or "gpu"; each rank uses the GPU of its local rank.
        collective: "auto", "nccl" or "mpi"; see `add_options`.
        log_folder: for a log file per rank, on its host, created after all checks have passed; None for no logs.

    Yields:
        The communicator of all ranks, and the plan.

    Raises:
        UserError: in a job of one rank, `prepare` raised it. With several ranks, rank 0 prints the error and all
            exit with status 1; likewise if their settings, code or package versions differ.
    """
    rank = ranks.current()
    rank.claim_cores()
    log = log_folder and log_folder / f"rank-{rank.rank}.log"
    started = start_alone if rank.size == 1 else start_together
    with started(rank, prepare, device, collective, log) as (comm, plan):
        yield comm, plan


@contextlib.contextmanager
def start_alone(
    rank: ranks.Rank, prepare: Prepare[Plan], device: str, collective: str, log: pathlib.Path | None
) -> Iterator[tuple[Communicator, Plan]]:
    """The part of `start` for a job of one rank, without MPI and watchdog."""
    ranks.check_variables()
    _, plan = prepare()
    gpus.check_device(rank, device)
    with logs.log_to(log):
        start_mindspore(rank, device)
        comm = Communicator(rank)
        if device == "gpu" and collective == "nccl":  # no sum needs it; this shows that NCCL works
            use_nccl(comm, collective)
        yield comm, plan


@contextlib.contextmanager
def start_together(
    rank: ranks.Rank, prepare: Prepare[Plan], device: str, collective: str, log: pathlib.Path | None
) -> Iterator[tuple[Communicator, Plan]]:
    """The part of `start` for one of several ranks; an error in the body ends this process."""
    reporter = watchdog.watch(rank)
    comm = Communicator(rank)  # until MPI has started
    with contextlib.ExitStack() as stack:
        try:
            comm = MPICommunicator(rank, reporter)
            with agreement(comm) as settings:
                for name, connection in rendezvous.connect(comm, rank).items():
                    reporter.hand_over(name, connection)
                ranks.check_variables()
                own, plan = prepare()
                gpus.check_device(rank, device)
                settings.update({"MPI": comm.library, **versions.software(), **own})
            stack.enter_context(logs.log_to(log))
            reporter.report(log=str(log or ""))
            if device == "cpu" or collective == "mpi":
                hide_launcher()
            start_mindspore(rank, device)
            if device == "gpu" and collective != "mpi":
                use_nccl(comm, collective)
            comm.progress(watchdog.Phase.RUNNING)
            yield comm, plan
            comm.leave()
        except BaseException as error:
            give_up(error, comm, reporter)
    # MindSpore's destructors can crash or wait for ranks that have left.
    atexit.register(leave, 0)


def use_nccl(comm: Communicator, collective: str) -> None:
    """Start NCCL; JobError if it is required and cannot be used."""
    from launch.collective import start_nccl

    comm.nccl = start_nccl(comm)
    if collective == "nccl" and not comm.nccl:
        raise JobError("--collective nccl: NCCL cannot be used; see above, or use --collective mpi")


@contextlib.contextmanager
def agreement(comm: Communicator) -> Iterator[dict[str, str]]:
    """Run the checks in the body on all ranks; it adds the settings that must be the same on all of them.

    Raises:
        JobError: the body raised a UserError or OSError on a rank, or settings differ; all ranks raise it.
    """
    settings, error = {}, None
    try:
        yield settings
    except (UserError, OSError) as failure:
        error = describe(failure)
    if problem := find_disagreement(comm.gather([comm.name, settings, error])):
        raise JobError(problem)


def find_disagreement(outcomes: list[Outcome]) -> str | None:
    """The first rank's error, else the first setting that differs from rank 0's, as one line; None if there is none."""
    if errors := [f"{rank}: {error}" for rank, _, error in outcomes if error]:
        return errors[0] if len(errors) < len(outcomes) else outcomes[0][2]
    first, expected, _ = outcomes[0]
    for rank, settings, _ in outcomes:
        for key, value in settings.items():
            if value != expected.get(key):
                return (
                    f"{rank} has {key} {value}, {first} has {expected.get(key)}: start all ranks with the same code, "
                    "recipe and data"
                )
    return None


def hide_launcher() -> None:
    """Remove the launcher's variables, because of which MindSpore would initialise MPI itself."""
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMIX_", "PRTE_")):
            del os.environ[name]


def start_mindspore(rank: ranks.Rank, device: str) -> None:
    """Import MindSpore and set graph mode, the device and this rank's number of threads.

    Raises:
        UserError: MindSpore cannot use the device.
    """
    if os.environ.get("MS_ROLE"):
        raise UserError(
            f"MS_ROLE is {os.environ['MS_ROLE']} in the environment, which makes MindSpore start its own cluster: "
            "unset MS_ROLE, and start several ranks with mpirun"
        )
    # MindSpore's messages keep the stream that they find on import: the log, if there is one.
    with interrupted_later(), contextlib.redirect_stderr(getattr(sys.stderr, "log", sys.stderr)):
        import mindspore
    try:
        # MindSpore's threads wait by spinning: with a thread per core of the host, a step of two ranks on two
        # cores takes twice as long.
        mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target=device.upper(), runtime_num_threads=rank.threads)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"MindSpore cannot use the {device.upper()} here: {reason}") from None


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """A context in which Ctrl-C has to wait: during MindSpore's import it crashes Python.

    Blocking the signal would not do, as the libraries' threads receive it, too.
    """
    if threading.current_thread() is not threading.main_thread() or not signal.getsignal(signal.SIGINT):
        yield
        return
    received = []
    previous = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        signal.raise_signal(signal.SIGINT)


def give_up(error: BaseException, comm: Communicator, reporter: watchdog.Reporter) -> NoReturn:
    """End this rank because of an error, which its watchdog reports to the user unless all ranks have it."""
    status = 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, (JobError, JobInterrupt)):
        if comm.rank == 0:  # before the first exit makes mpirun end the other ranks
            print_error(str(error)) if status == 1 else print_line(str(error))
        reporter.report(reason="")
        comm.leave()
    elif isinstance(error, SystemExit):  # the user has been told
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        reporter.report(reason="")
    else:
        reporter.report(reason=describe(error))
    leave(status)


def describe(error: BaseException) -> str:
    """An error as one line for the user; the traceback of a bug goes to the log."""
    if isinstance(error, (UserError, KeyboardInterrupt)):
        return str(error) or "interrupted"
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return describe_os_error(error)
    traceback.print_exception(error, file=getattr(sys.stderr, "log", sys.stderr))
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    return ": ".join([type(error).__name__, *lines[:1]])


def leave(status: int) -> NoReturn:
    """End this process at once, without destructors."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
