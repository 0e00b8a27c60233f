"""Versions of the code and the packages."""

import contextlib
import functools
import hashlib
import importlib.metadata
import subprocess
import sys

from launch.paths import ROOT

PACKAGES = ("mindspore", "numpy", "mpi4py", "opencv-python-headless", "zstandard")
"""Packages whose versions must be the same on all ranks, and are recorded with each run."""


@functools.cache  # it reads every source file
def software() -> dict[str, str]:
    """Versions that must be the same on all ranks: of the code, Python and `PACKAGES`."""
    digest = hashlib.sha256()
    for path in sorted(
        path
        for folder in ("launch", "prep", "model", "train")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu")
    ):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    versions = {"code": digest.hexdigest()[:16], "Python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def git_revision() -> str:
    """The revision of this checkout; "unknown" without git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
