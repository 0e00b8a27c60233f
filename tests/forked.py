"""Run a Python script in a fork of a process that has imported MindSpore: the import takes most of a short command."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mindspore.mindrecord"])


def run(words: list[str], cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script, the first of the words, as `subprocess.run` does, with what it prints as text."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=run_here, args=(words, cwd or Path.cwd(), *paths))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in paths))


def run_here(words: list[str], cwd: Path, out: Path, err: Path) -> None:
    """Run a script in this process, with its output in files."""
    os.chdir(cwd)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
