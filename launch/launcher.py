"""The process that started the ranks of this host: mpirun, or its daemon."""

import contextlib
import os

import psutil

MPIRUN = ("mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.openmpi", "prterun", "orterun", "orterun_wrapper")
DAEMONS = ("prted", "orted")
SIGTERMS = 5
"""How many times to send SIGTERM, a second apart, before SIGKILL."""


def find_launcher() -> psutil.Process | None:
    """The ancestor of this process that is mpirun or its daemon; None if there is none."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if process.name() in MPIRUN + DAEMONS:
                return process
    return None


def is_mpirun_or_daemon(process: int) -> bool:
    """Whether mpirun, not srun, started this host's ranks, of which `process` is the parent."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process).name() in MPIRUN + DAEMONS
    return False


def print_on_mpirun(process: int, text: str) -> None:
    """Print a line on mpirun's own stderr if `process` is mpirun, which forwards no output once told to end."""
    with contextlib.suppress(psutil.Error, OSError):
        if psutil.Process(process).name() in MPIRUN:
            with open(f"/proc/{process}/fd/2", "a", encoding="utf-8") as stream:
                print(text, file=stream, flush=True)


def end_launcher(delay: float) -> None:
    """End mpirun, or its daemon on this host, which would wait forever for a host that is cut off.

    A new process does this, since mpirun kills the watchdogs first.

    Args:
        delay: seconds for it to end by itself.
    """
    launcher = find_launcher()
    if not launcher:
        return
    children = launcher.children(recursive=True)  # also its connections (ssh) to other hosts
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # mpirun waits until its ranks' output is closed
        os.dup2(null, number)
    os.closerange(3, null)
    for pause in (delay, *[1] * SIGTERMS):
        if not psutil.wait_procs([launcher], timeout=pause)[1]:
            break
        with contextlib.suppress(psutil.Error):
            launcher.terminate()  # the second time it does not wait
    for process in (launcher, *children):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(0)
