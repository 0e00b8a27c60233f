"""Jobs under launchers other than this environment's mpirun: Debian's mpirun and Slurm's srun."""

import pathlib
import signal
import subprocess
import sys
import uuid

import psutil
import pytest
import tiny
from test_jobs import PROGRAM, Job


class Launched(Job):
    """Two ranks of tests/collective.py under one of tiny.LAUNCHERS, with all output in stderr."""

    def __init__(self, launcher: str, folder: pathlib.Path) -> None:
        mark = str(uuid.uuid4())
        self.mark = f"TEST_MARK={mark}"
        self.mpirun = tiny.launch(launcher, PROGRAM, folder / "logs", 100, TEST_MARK=mark)

    def rank(self, number: int) -> psutil.Process:
        """A rank's process: it has the same command as its parent, the watchdog."""
        ranks = []
        for process in self.processes():
            variables = process.environ()
            named = [variables[name] for name in ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID") if name in variables]
            parent = process.parent()
            if named[:1] == [str(number)] and parent and process.cmdline() == parent.cmdline():
                ranks.append(process)
        assert len(ranks) == 1, ranks
        return ranks[0]

    def wait_for_start(self) -> None:
        """Wait for the first collective."""
        lines = [""]
        while not lines[-1].startswith("sum 1 is 2"):
            lines.append(self.read_line())
            assert lines[-1], "".join(lines)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_one_line_and_a_non_zero_status(launcher: str, tmp_path: pathlib.Path) -> None:
    job = Launched(launcher, tmp_path)
    job.wait_for_start()
    job.rank(1).kill()
    status, err = job.finish()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status and len(lines) == 1, err
    assert "rank 1 on " in lines[0] and "signal 9" in lines[0] and "logs/rank-1.log" in lines[0]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


LAUNCHER = """
import os, signal, subprocess, sys
rank = subprocess.Popen([PYTHON, "-c", RANK], stdout=subprocess.PIPE, start_new_session=True)
rank.stdout.readline()
os.killpg(rank.pid, signal.SIGTERM)
sys.exit(rank.wait())
"""
"""Starts a rank and sends SIGTERM to it and its watchdog; exits with its status."""

RANK = """
import os, signal, time
from launch import watchdog
from launch.ranks import Rank
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # before the launcher can send it
watchdog.watch(Rank(1, 2, 1, 2))
print(flush=True)
signal.sigwait([signal.SIGTERM])
time.sleep(1)
os._exit(130)
"""
"""Takes a second to stop after SIGTERM."""


@pytest.mark.parametrize("launcher,status", [("slurmstepd", 130), ("prted", 128 + signal.SIGTERM)])
def test_after_sigterm_a_rank_may_save_a_checkpoint_unless_mpirun_sent_it(
    launcher: str, status: int, tmp_path: pathlib.Path
) -> None:
    """mpirun would kill it in a moment; Slurm, which sends SIGTERM on scancel and at the time limit, waits for it."""
    program = tmp_path / launcher
    program.symlink_to(sys.executable)  # the process has its name
    code = f"PYTHON, RANK = {sys.executable!r}, {RANK!r}\n{LAUNCHER}"
    done = subprocess.run([program, "-c", code], cwd=tiny.ROOT, timeout=60, check=False)
    assert done.returncode == status
