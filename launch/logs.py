"""A rank's output: everything goes to its log file, and what the user should see to the terminal.

MindSpore's C++ code and the libraries below it write to file descriptors 1 and 2, which are redirected to the
log. The terminal also gets what Python prints on rank 0. Each rank's errors are reported by its watchdog.
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
"""How faulthandler's report begins."""


class Tee(io.TextIOBase):
    """A text stream that writes to a log and, if given, to a terminal."""

    def __init__(self, log: TextIO, terminal: TextIO | None) -> None:
        self.log = log
        self.terminal = terminal

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self.log.write(text)
        if self.terminal:
            self.terminal.write(text)
        return len(text)

    def isatty(self) -> bool:
        return self.terminal is not None and self.terminal.isatty()


def open_lines(file: pathlib.Path | int) -> TextIO:
    """Open a file or descriptor for appending text, flushed after each line."""
    return open(file, "a", encoding="utf-8", errors="backslashreplace", buffering=1)


@contextlib.contextmanager
def log_to(path: pathlib.Path, rank: int) -> Iterator[None]:
    """Append this process's output to a log file in an existing folder; rank 0 also shows it."""
    sys.stdout.flush()
    sys.stderr.flush()
    before, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    with contextlib.ExitStack() as stack:
        log, out, err = (stack.enter_context(open_lines(file)) for file in (path, *kept))
        command = shlex.join([sys.executable, *sys.argv])
        log.write(f"== {time.strftime('%F %T')}, rank {rank} on {socket.gethostname()}: {command}\n")
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.stdout, sys.stderr = Tee(log, None if rank else out), Tee(log, None if rank else err)
        faulthandler.enable(log)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: print(
                    warnings.formatwarning(message, category, filename, lineno, line), end="", file=log
                )
                yield
        finally:
            faulthandler.disable()
            sys.stdout, sys.stderr = before
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)


@contextlib.contextmanager
def only_logged() -> Iterator[None]:
    """Print to the log alone, if there is one: MindSpore's messages keep the stream that they find on import."""
    before = sys.stderr
    sys.stderr = getattr(before, "log", before)
    try:
        yield
    finally:
        sys.stderr = before


def last_line(path: str | None) -> str:
    """The last line, of at most 300 characters, that a log had before the process crashed; "" if there is none."""
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
