"""What a rank prints: its log file gets everything, the user what is for the user.

MindSpore's C++ and the libraries beneath it write to the file descriptors 1 and 2, which become the
log's. Python's sys.stdout and sys.stderr keep the ones from before: of rank 0 both are shown, of the
other ranks the errors, with rank and host before each line.
"""

import contextlib
import faulthandler
import os
import shlex
import socket
import sys
import time
import warnings

CRASH = "Fatal Python error: "
"""How faulthandler begins."""


class Stream:
    """A text stream that writes to a log and, unless `shown` is None, to another stream.

    Args:
        shown: a text stream, or None.
        log: a text stream.
        prefix: comes before each line that is shown.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, shown, log, prefix=""):
        self.shown = shown
        self.log = log
        self.prefix = prefix
        self.rest = ""

    def write(self, text):
        self.log.write(text)
        if not self.shown:
            return len(text)
        if not self.prefix:
            self.shown.write(text)
            return len(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.shown.write(f"{self.prefix}{line}\n")
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        self.log.flush()
        if self.shown:
            self.shown.flush()

    def isatty(self):
        return bool(self.shown) and self.shown.isatty()

    def fileno(self):
        return self.shown.fileno() if self.shown else self.log.fileno()

    def writable(self):
        return True


@contextlib.contextmanager
def redirected(path, rank):
    """Write what this process prints to a log file, and show what is for the user.

    Args:
        path: of the file, to which is added; its folder is there.
        rank: this process's.

    Yields:
        The log, a text stream, for what shall not be shown.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    before, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    with open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1) as log:
        command = shlex.join([sys.executable, *sys.argv])
        log.write(f"== {time.strftime('%F %T')}, rank {rank} on {socket.gethostname()}: {command}\n")
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        out, err = (open(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
                    for number in kept)
        if rank == 0:
            sys.stdout, sys.stderr = Stream(out, log), Stream(err, log)
        else:
            sys.stdout = Stream(None, log)
            sys.stderr = Stream(err, log, f"rank {rank} on {socket.gethostname()}: ")
        faulthandler.enable(log)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda *values, file=None, line=None: log.write(
                    warnings.formatwarning(*values, line))
                yield log
        finally:
            faulthandler.disable()
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
            for number, descriptor in zip((1, 2), kept):
                os.dup2(descriptor, number)
            out.close()
            err.close()


def is_active():
    """Whether this process's output goes to a log file."""
    return isinstance(sys.stderr, Stream)


@contextlib.contextmanager
def hidden():
    """Print what Python prints to the log alone, if there is one: for an import of MindSpore, whose
    messages keep the stream that they find there."""
    before = sys.stderr
    sys.stderr = getattr(before, "log", before)
    try:
        yield
    finally:
        sys.stderr = before


def last_words(path):
    """The last line of a log before the process crashed, or ""; of 300 characters at most."""
    if not path:
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - (1 << 16)))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    run = text.rpartition("\n== ")[2]
    lines = [line.strip() for line in run.partition(CRASH)[0].splitlines()[1:]]
    return next((line[:300] for line in reversed(lines) if line), "")
