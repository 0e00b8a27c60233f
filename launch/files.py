"""Output files and folders that appear when they are complete, and the cache folder."""

import contextlib
import errno
import json
import os
import pathlib
import shlex
import tempfile
from collections.abc import Iterator
from typing import Any

from launch.errors import UserError


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add a path to an OSError that names no file, as when the disk is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def partial_of(out: str | os.PathLike[str]) -> pathlib.Path:
    """The work folder that is renamed to the output folder `out`, or what that links to, when it is complete."""
    path = os.path.realpath(out) if os.path.islink(out) else os.path.normpath(out)
    return pathlib.Path(f"{path}.partial")


def check_replaceable(out: pathlib.Path) -> None:
    """Raise UserError if `out` is an empty folder to which a complete one cannot be renamed."""
    if not out.is_dir() or os.listdir(out):
        return
    import psutil  # seldom needed, and this module is imported by every command

    # os.path.ismount misses mounts that are bound from the same file system.
    mounts = {partition.mountpoint for partition in psutil.disk_partitions(all=True)}
    reason = "a mount point" if os.path.realpath(out) in mounts else ""
    if out.samefile(os.curdir):
        reason = "the current folder"
    if reason:
        raise UserError(
            f"{out}: is {reason}, so the finished folder cannot take its place; name a new folder in it, such as "
            f"{shlex.quote(str(out / 'data'))}"
        )


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a temporary path to write to; afterwards that file atomically and durably replaces `path`.

    The temporary path has the same folder and suffix. If the body raises, the file is removed.

    Raises:
        OSError: the file could not be written; the error names `path`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except OSError as error:
        if error.filename in (None, str(partial), partial):
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write a file atomically; an OSError names it."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file atomically, with null for NaN and infinity, which JSON lacks."""
    text = json.dumps(_without_nan(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def sync(path: str | os.PathLike[str]) -> int:
    """Flush a file, or the entries of a folder, to disk; returns its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(descriptor)


def cache_folder() -> pathlib.Path | None:
    """This project's folder in the user's cache, created if necessary; None if none is writable."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    fallback = pathlib.Path(tempfile.gettempdir()) / f"pwcnet-mindspore-{os.getuid()}"
    for folder in (pathlib.Path(home) / "pwcnet-mindspore", fallback):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Libraries are loaded from it, so it must not belong to another user.
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
    return None
