"""Errors that a user can act on, and how a command reports them."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A user's mistake or a bad input file; the user sees its text as one line.

    The text names the file and says what was found, what was expected and how to fix it.
    """


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main()`, which returns an exit status or None for 0, and exit.

    A UserError or OSError becomes one line on stderr and status 1, Ctrl-C becomes status 130; a bug keeps its
    traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may have characters that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        drop_output()  # the reader, such as `| head`, has exited
        sys.exit(0)
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:
            drop_output()
            error.filename = error.filename or "standard output"
        fail(describe_os_error(error))
    sys.exit(status)


def drop_output() -> None:
    """Discard buffered output, which the flush at exit would fail to write again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str) -> NoReturn:
    """Print the error and exit with status 1."""
    print_error(message)
    sys.exit(1)


def print_error(message: str) -> None:
    """Print `error: message` as one line on stderr."""
    print_line(f"error: {message}")


def print_warning(message: str) -> None:
    """Print `warning: message` as one line on stderr."""
    print_line(f"warning: {message}")


def print_line(text: str) -> None:
    """Print a text as one line on stderr."""
    print(one_line(text, None), file=sys.stderr, flush=True)


def one_line(text: object, limit: int | None = 100) -> str:
    """The start of a text or error as one line, without control characters."""
    return re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", str(text)).strip()[:limit]


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 pair" or "1,041 pairs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe_os_error(error: OSError) -> str:
    """An OSError as one line: the file, the problem and, for common ones, how to fix it."""
    hints = {
        errno.ENOSPC: "free some space or choose another disk, then run the same command again",
        errno.EDQUOT: "free some of your quota or choose another disk, then run the same command again",
        errno.EACCES: "check the permissions of the file and its folder",
        errno.EPERM: "check the permissions of the file and its folder",
        errno.EROFS: "the file system is read-only; choose another folder",
    }
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{text}; {hints[error.errno]}" if error.errno in hints else text
