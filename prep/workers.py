"""Worker processes: they inherit their work by fork, and end with their parent, however that ends."""

import concurrent.futures
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

from launch.processes import end_with_parent
from prep import memory

Task = Callable[[int], None]

_task: Task
"""What a worker calls. Workers inherit it by fork, so that neither it nor its data need to be pickled."""


class WorkersKilled(Exception):
    """Workers ended without an exception, as by the kernel when memory runs out."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(pids)
        self.pids = pids


def run_in_workers(task: Task, number: int, workers: int, poll: Callable[[], object]) -> None:
    """Call task(0) to task(number - 1) in forked processes, and meanwhile `poll` several times a second.

    The first exception of a task ends all workers at once, as does Ctrl-C.

    Raises:
        WorkersKilled: workers ended without an exception.
    """
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _start_worker, (os.getpid(), task)
    )
    # A terminal sends Ctrl-C to all processes, but only this one should handle it: workers inherit the blocked signal.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pending = {pool.submit(_run_task, index) for index in range(number)}
    processes = multiprocessing.active_children()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        while pending:
            completed, pending = concurrent.futures.wait(pending, 0.2, concurrent.futures.FIRST_COMPLETED)
            poll()
            for future in completed:
                future.result()
    except BrokenProcessPool:
        pool.shutdown()  # it has terminated the others
        killed = [process.pid for process in processes if process.exitcode not in (0, -signal.SIGTERM)]
        raise WorkersKilled([pid for pid in killed if pid]) from None
    finally:
        for process in processes:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int, task: Task) -> None:
    global _task
    _task = task
    memory.keep_freed_blocks()
    end_with_parent(parent)


def _run_task(index: int) -> None:
    _task(index)
