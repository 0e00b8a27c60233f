"""What a command says where the packages that it needs are missing: one line instead of a traceback."""

import os
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ("launch", "model", "prep", "train")
"""This project's own."""


def check() -> None:
    """Have this process say what to do when it meets a missing package; a command calls it first,
    before it imports any. End the process if its Python is too old.

    It costs nothing until a package is missing.
    """
    sys.excepthook = explain
    if sys.version_info < (3, 10):
        sys.exit(
            f"error: {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, expected "
            f"3.10 to 3.12; {advice()}"
        )


def explain(kind: type, error: BaseException, trace: types.TracebackType) -> None:
    """`sys.excepthook`: one line for a package that is missing, a traceback for anything else."""
    package = (getattr(error, "name", None) or PACKAGES[0]).partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or package in PACKAGES:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {sys.executable} lacks the package {package}; {advice()}", file=sys.stderr)


def advice() -> str:
    """How to get the packages."""
    environment = os.path.join(ROOT, ".venv")
    if os.path.exists(os.path.join(environment, "bin", "activate")) and sys.prefix != environment:
        return f"activate the environment: . {environment}/bin/activate"
    if sys.prefix != sys.base_prefix:  # in a virtual environment
        return f"install what is missing: pip install -e {ROOT}"
    return (
        "make an environment with what it needs: "
        f"cd {ROOT} && python3 -m venv .venv && . .venv/bin/activate && pip install -e ."
    )
