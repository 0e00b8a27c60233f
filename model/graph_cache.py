"""Keeps compiled graphs in the user's cache folder, so that the next process need not compile them.

MindSpore's own compile cache numbers the graphs of a process and checks only the source files that they come from. Here
each graph has a file of its own, whose name is a hash of all that the graph depends on. MindSpore keeps to the first
folder that it is given, so each process has one folder for it. The folder exists only while a graph is compiled or
read, and holds only that graph.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence

import mindspore
from mindspore import Tensor, nn
from mindspore.common import api

import launch
from launch import ranks, versions
from launch.files import cache_folder
from launch.lock import wait_for_lock
from model.native import build

KEPT = 100
"""Number of graphs that are kept: those used last."""
SOURCE = pathlib.Path(launch.__file__)
"""A source file that imports nothing and hardly ever changes."""
VARIABLE = "PWCNET_GRAPH_CACHE"
"""Environment variable that, set to 0, disables the cache."""
PROCESS_FOLDER = f"process-{uuid.uuid4().hex}"

_used = 0
"""How often this process has used MindSpore's cache."""
_missed = False
"""Whether this process has looked for a graph that was not there. MindSpore reads none after that."""


def compile_graph(cell: nn.Cell, inputs: Sequence[Tensor], *key: object) -> None:
    """Compile a cell for inputs of these shapes, or read the graph if an earlier process compiled it.

    On a GPU, where reading was not tried, it always compiles.

    Args:
        cell: one that is not compiled for these shapes yet.
        inputs: those of its `construct`.
        key: texts or numbers that determine the graph, with the cell's class, the inputs, the versions and the source
            code: options of the network and the step, number format.
    """
    shapes = [(tensor.shape, str(tensor.dtype)) for tensor in inputs]
    file = find_file(type(cell).__name__, shapes, *key)
    if file:
        with contextlib.suppress(OSError):  # without space or permission there is no cache
            compile_with_cache(cell, inputs, file)
    cell.compile(*inputs)  # does nothing if it is compiled


def find_file(*key: object) -> pathlib.Path | None:
    """The file of a graph, which need not exist; None if there can be none."""
    cache = None if os.environ.get(VARIABLE) == "0" else cache_folder()
    context = mindspore.get_context("mode"), mindspore.get_context("device_target")
    if cache is None or context != (mindspore.GRAPH_MODE, "CPU"):
        return None
    library = build.load_library("CPU")
    # The library's name stands for the processor; oneDNN's variable makes it another one.
    machine = library and library._name, os.environ.get("ONEDNN_MAX_CPU_ISA"), ranks.current().threads
    known = (*key, *machine, versions.software(), sys.version)
    return cache / "graphs" / hashlib.sha256("\0".join(map(str, known)).encode()).hexdigest()[:32]


def compile_with_cache(cell: nn.Cell, inputs: Sequence[Tensor], file: pathlib.Path) -> None:
    """Compile a cell with the graph in a file, or write its graph there; do neither if MindSpore would not read it."""
    global _missed
    file.parent.mkdir(exist_ok=True)
    with open(file, "ab+") as stream:
        wait_for_lock(stream)  # one rank compiles it, and those that wait here read it
        stream.seek(0)
        digest, graph = stream.read(32), stream.read()
        if hashlib.sha256(graph).digest() != digest:  # it is new, or was not written completely
            _missed = True
            with mindspore_cache(file.parent) as path:
                cell.compile(*inputs)
                graph = path.read_bytes()
            stream.truncate(0)
            stream.write(hashlib.sha256(graph).digest() + graph)
            remove_old(file.parent)
            return
    os.utime(file)  # used last
    if not _missed:
        with mindspore_cache(file.parent) as path:
            path.write_bytes(graph)
            cell.compile(*inputs)


@contextlib.contextmanager
def mindspore_cache(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """A context in which MindSpore caches one graph; yields the path where it reads or writes that."""
    global _used
    folder = parent / PROCESS_FOLDER
    files = folder / "rank_0" / "graph_cache"
    try:
        files.mkdir(parents=True)
        # To see whether something has changed, MindSpore hashes the program that runs and all that it imports. It fails
        # if the program is not a file, and to look for a module it makes a new one, with which sys loses its redirected
        # streams. The name of a graph's file covers all changes, so give it another program, and the hash of that.
        api.entry_script_path = str(SOURCE)
        source = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
        (files / "compile_dependency.hash").write_text(hashlib.sha256(source.encode()).hexdigest())
        mindspore.set_context(enable_compile_cache=True, compile_cache_path=str(folder))
        _used += 1
        yield files / f"compile_cache_{_used - 1}.mindir"
    finally:
        mindspore.set_context(enable_compile_cache=False)
        shutil.rmtree(folder, ignore_errors=True)


def remove_old(folder: pathlib.Path) -> None:
    """Remove all but the last used graphs, and what ended processes left."""
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
