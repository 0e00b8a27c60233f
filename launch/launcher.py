"""The processes above the ranks: mpirun, or its daemon on this host."""

import contextlib
import os
import signal

import psutil

MPIRUN = ("mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.openmpi", "prterun", "orterun", "orterun_wrapper")
DAEMONS = ("prted", "orted")
TRIES = 5
"""Seconds between the first SIGTERM and SIGKILL."""


def find_launcher() -> psutil.Process | None:
    """The process of mpirun, or of its daemon on this host, above this one."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if process.name() in MPIRUN + DAEMONS:
                return process
    return None


def print_on_mpirun(process: int, text: str) -> None:
    """Print a line on mpirun's own stderr if that is what `process` is. Once mpirun has been told to end, it
    no longer passes on what the ranks print."""
    with contextlib.suppress(psutil.Error, OSError):
        if psutil.Process(process).name() in MPIRUN:
            with open(f"/proc/{process}/fd/2", "a", encoding="utf-8") as stream:
                print(text, file=stream, flush=True)


def end_launcher(delay: float) -> None:
    """Have mpirun, or its daemon on this host, end: it would wait forever for a host that is cut off.

    A new process does that, since mpirun kills the watchdogs first.

    Args:
        delay: seconds for it to end by itself.
    """
    launcher = find_launcher()
    if not launcher or os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # mpirun also waits for the end of its ranks' output
        os.dup2(null, number)
    os.closerange(3, null)
    # The connections that mpirun has opened to other hosts end with it, but not the watchdog that called this.
    own = {os.getpid(), os.getppid()}
    below = [process for process in launcher.children(recursive=True) if process.pid not in own]
    for pause in (delay, *[1] * TRIES):
        if not psutil.wait_procs([launcher], timeout=pause)[1]:
            break
        with contextlib.suppress(psutil.Error):
            launcher.send_signal(signal.SIGTERM)  # the second time it does not wait
    for process in (launcher, *below):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(0)


def addresses() -> list[str]:
    """This host's IPv4 addresses, those of the loopback interface last."""
    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family.name == "AF_INET"
    ]
    return sorted(found, key=lambda address: address.startswith("127."))
