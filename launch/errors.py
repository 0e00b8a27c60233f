"""Errors that a user can act on, and the one place where a command turns them into a line."""

import errno
import os
import re
import sys


class UserError(Exception):
    """A user's mistake or a bad input file; its text is the one line that the user sees.

    The text names the file, says what was found, what was expected and what to do.
    """


def run(main) -> None:
    """Run a command's `main()` and leave the process with its exit status.

    `main` takes no argument and returns None or an exit status. A UserError or an operating-system
    error becomes one line on stderr and status 1, Ctrl-C status 130; a bug keeps its traceback.
    """
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        drop_output()  # its reader (`| head`) has left
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
    """Drop what is left to print, at whose writing the flush at exit would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message) -> None:
    """Report the message and leave with status 1."""
    print_error(message)
    sys.exit(1)


def print_error(message) -> None:
    """Print `error: message` as one line on stderr."""
    print("error: " + one_line(message, None), file=sys.stderr, flush=True)


def one_line(text, longest=100) -> str:
    """The beginning of a text or error as one line that no control character of it rewrites."""
    return re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", str(text)).strip()[:longest]


def describe_os_error(error):
    """One line for an OSError: the file, what the system said and what to do about it."""
    advice = {
        errno.ENOSPC: "free some space or choose another disk, then run the same command again",
        errno.EDQUOT: "free some of your quota or choose another disk, then run it again",
        errno.EACCES: "check the permissions of the file and its folder",
        errno.EPERM: "check the permissions of the file and its folder",
        errno.EROFS: "the file system is read-only; choose another folder",
    }.get(error.errno)
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{text}; {advice}" if advice else text
