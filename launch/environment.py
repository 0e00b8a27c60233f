"""Reports a missing package as one line that says how to install it, instead of a traceback."""

import os
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ("launch", "model", "prep", "train")
"""This project's own packages."""


def check() -> None:
    """Report packages that are missing from now on; exit if Python is too old. Call it before importing packages."""
    sys.excepthook = explain
    if sys.version_info < (3, 10):  # noqa: UP036 - commands can be started with any Python
        sys.exit(
            f"error: {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, expected "
            f"3.10 to 3.12; {advice()}"
        )


def explain(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """A `sys.excepthook`: one line for a missing package or Ctrl-C during imports, a traceback for any other error."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
        return
    package = (getattr(error, "name", None) or PACKAGES[0]).partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or package in PACKAGES:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {sys.executable} lacks the package {package}; {advice()}", file=sys.stderr)


def advice() -> str:
    """How to install the packages."""
    environment = os.path.join(ROOT, ".venv")
    if os.path.exists(os.path.join(environment, "bin", "activate")) and sys.prefix != environment:
        return f"activate the environment: . {environment}/bin/activate"
    if sys.prefix != sys.base_prefix:  # in a virtual environment
        return f"install what is missing: pip install -e {ROOT}"
    return f"create an environment: cd {ROOT} && python3 -m venv .venv && . .venv/bin/activate && pip install -e ."
