"""What a rank prints: its log file gets everything, the terminal what is for the user.

MindSpore's C++ and the libraries below it write to the file descriptors 1 and 2, which are redirected to the
log. What Python prints is also shown if it is rank 0's. Errors of any rank are reported by its watchdog.
"""

import contextlib
import faulthandler
import io
import os
import pathlib
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TextIO

CRASH = "Fatal Python error: "
"""How faulthandler begins."""


class Tee(io.TextIOBase):
    """A text stream that writes to a log and, if given, to another stream."""

    def __init__(self, log: TextIO, shown: TextIO | None) -> None:
        self.log = log
        self.shown = shown

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # a full disk under the log must not end the run
            self.log.write(text)
        if self.shown:
            self.shown.write(text)
        return len(text)

    def isatty(self) -> bool:
        return bool(self.shown) and self.shown.isatty()


@contextlib.contextmanager
def log_to(path: pathlib.Path, rank: int) -> Iterator[None]:
    """Append what this process prints to a log file, whose folder exists; of rank 0, also show it."""
    sys.stdout.flush()
    sys.stderr.flush()
    before, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    with contextlib.ExitStack() as stack:
        log, out, err = (
            stack.enter_context(open(file, mode, encoding="utf-8", errors="backslashreplace", buffering=1))
            for file, mode in ((path, "a"), (kept[0], "w"), (kept[1], "w"))
        )
        command = shlex.join([sys.executable, *sys.argv])
        log.write(f"== {time.strftime('%F %T')}, rank {rank} on {socket.gethostname()}: {command}\n")
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.stdout, sys.stderr = Tee(log, None if rank else out), Tee(log, None if rank else err)
        faulthandler.enable(log)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda *values, file=None, line=None: log.write(
                    warnings.formatwarning(*values, line)
                )
                yield
        finally:
            faulthandler.disable()
            sys.stdout, sys.stderr = before
            for number, descriptor in zip((1, 2), kept):
                os.dup2(descriptor, number)


@contextlib.contextmanager
def only_logged() -> Iterator[None]:
    """Print to the log alone, if there is one: for importing MindSpore, whose messages keep the stream that they
    find then."""
    before = sys.stderr
    sys.stderr = getattr(before, "log", before)
    try:
        yield
    finally:
        sys.stderr = before


def last_line(path: str | None) -> str:
    """The last line of a log before the process crashed, or ""; of 300 characters at most."""
    if not path:
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - (1 << 16)))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = text.rpartition("\n== ")[2].partition(CRASH)[0].splitlines()[1:]
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
