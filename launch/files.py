"""Files that appear under their names whole or not at all."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a path to write; afterwards what is there becomes the file at `path`, durably.

    If the body raises, nothing is left of it. The path to write is in the same folder and has the same suffix.

    Raises:
        OSError: the file, which it names, could not be written.
    """
    path = pathlib.Path(path)
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
    """Write a file whole or not at all; an OSError names it."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file whole or not at all. JSON has no NaN and no infinity: null stands for them."""
    text = json.dumps(_without_nan(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def sync(path: str | os.PathLike[str]) -> int:
    """Wait until a file, or the names in a folder, are on the disk; returns the size in bytes."""
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
    """This project's folder in the user's cache, made if necessary; None if there can be none."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    fallback = pathlib.Path(tempfile.gettempdir()) / f"pwcnet-mindspore-{os.getuid()}"
    for folder in (pathlib.Path(home) / "pwcnet-mindspore", fallback):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Nobody else may have put a library there for us to run.
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
    return None
