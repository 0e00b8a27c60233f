"""Keeps compiled graphs in the user's cache folder, so that the next process need not compile them.

MindSpore's own compile cache numbers the graphs of a process and checks only the source files that they come from. Here
each set of graphs has a folder of its own, whose name is a hash of all that the graphs depend on. It appears when it is
complete. MindSpore keeps to the first folder that it is given, so that there is one set in a process.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import mindspore
from mindspore.common import api

import launch
from launch import ranks, versions
from launch.files import cache_folder
from model.native import build

KEPT = 20
"""Sets of graphs that are kept: those used last."""
ROOT = pathlib.Path(__file__).parent.parent
VARIABLE = "PWCNET_GRAPH_CACHE"
"""Environment variable that, set to 0, disables the cache."""
GRAPHS, DIGEST = "compile_*", "digest"
"""In a folder: pattern of the names of the files that MindSpore writes, and the file with their hash."""
_was_used = False


@contextlib.contextmanager
def cached(*parts: object) -> Iterator[None]:
    """A context in which graphs are compiled in a fixed order, or read from the cache if an earlier process did that.

    It does nothing but once in a process, and nothing on a GPU, where it was not tried.

    Args:
        parts: texts or numbers that, with the versions and the source code, determine the graphs: options of the
            network and the step, shapes, number format.
    """
    global _was_used
    folder = None if _was_used or os.environ.get(VARIABLE) == "0" else find_folder(parts)
    _was_used = True
    if folder is None:
        yield
    elif is_complete(folder):
        with contextlib.suppress(OSError):
            os.utime(folder)  # used last
        with use(folder):
            yield
    elif ranks.current().local_rank == 0:
        with writing(folder):
            yield
    else:
        yield


def find_folder(parts: tuple[object, ...]) -> pathlib.Path | None:
    """The folder of a set of graphs; None if there can be none."""
    cache = cache_folder()
    if cache is None or mindspore.get_context("device_target") != "CPU":
        return None
    library = build.load_library("CPU")
    # The library's name stands for the processor; oneDNN's variable makes it another one.
    machine = library and library._name, os.environ.get("ONEDNN_MAX_CPU_ISA"), ranks.current().threads
    known = (*parts, *machine, versions.software(), sys.version, hash_sources())
    return cache / "graphs" / hashlib.sha256("\0".join(map(str, known)).encode()).hexdigest()[:32]


@functools.cache
def hash_sources() -> str:
    """A hash of the code that graphs are made from."""
    return hash_files(ROOT / "model", "*.py") + hash_files(ROOT / "train", "*.py")


@contextlib.contextmanager
def use(folder: pathlib.Path) -> Iterator[None]:
    """A context in which MindSpore's compile cache is this folder."""
    # To see whether something has changed, MindSpore reads the program that runs and all that it imports. It fails if
    # the program is no file, and to look for a module it makes a new one, with which sys loses its redirected streams.
    # The folder's name covers all changes, so give it a file that imports nothing.
    api.entry_script_path = launch.__file__
    mindspore.set_context(enable_compile_cache=True, compile_cache_path=str(folder))
    try:
        yield
    finally:
        mindspore.set_context(enable_compile_cache=False)


def is_complete(folder: pathlib.Path) -> bool:
    """Whether a folder has what was written to it; removes one that is damaged."""
    try:
        if (folder / DIGEST).read_text() == hash_files(folder, GRAPHS):
            return True
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass
    return False


def hash_files(folder: pathlib.Path, pattern: str) -> str:
    """A hash of the files below a folder whose names match a pattern."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob(pattern)):
        digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """A context in which MindSpore writes to a new folder, which becomes `folder`. Without space, there is no cache."""
    try:
        folder.parent.mkdir(exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    except OSError:
        yield
        return
    try:
        with use(partial):
            yield
        with contextlib.suppress(OSError):  # another process was faster, or the disk is full
            (partial / DIGEST).write_text(hash_files(partial, GRAPHS))
            partial.rename(folder)
            remove_old(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_old(root: pathlib.Path) -> None:
    """Remove all but the last used sets of graphs."""
    folders = sorted(root.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
