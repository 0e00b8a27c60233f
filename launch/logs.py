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
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TextIO

from launch import ranks
from launch.errors import print_line
from launch.files import naming

CRASH = "Fatal Python error: "
"""How faulthandler's report begins."""


def print_note(message: str, each_host: bool = False) -> None:
    """Print `note: message` as one line on the stderr of rank 0, or of the first rank of each host."""
    rank = ranks.current()
    if (rank.local_rank if each_host else rank.rank) == 0:
        print_line(f"note: {message}")


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
def log_to(path: pathlib.Path | None) -> Iterator[None]:
    """Append this process's output to a log file, if given; rank 0 also shows what Python prints."""
    # Without a log file, MindSpore's warnings would reach the terminal.
    os.environ.setdefault("GLOG_v", "2" if path else "3")
    if not path:
        yield
        return
    rank = ranks.current()
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with contextlib.ExitStack() as stack:
        log, out, err = (stack.enter_context(open_lines(file)) for file in (path, *kept))
        command = shlex.join([sys.executable, *sys.argv])
        begin = f"== {time.strftime('%F %T')}, {rank}: {command}\n"
        # Unbuffered, so that closing the file does not raise the error again without its name.
        with naming(path):
            os.write(log.fileno(), begin.encode(errors="backslashreplace"))
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(log.fileno(), number)
            stack.callback(os.dup2, before, number)
        stack.enter_context(contextlib.redirect_stdout(Tee(log, None if rank.rank else out)))
        stack.enter_context(contextlib.redirect_stderr(Tee(log, None if rank.rank else err)))
        faulthandler.enable(log)
        stack.callback(faulthandler.disable)
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = lambda *warning: log.write(warnings.formatwarning(*warning[:4]))
        yield


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
