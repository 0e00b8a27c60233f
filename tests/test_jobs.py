"""Jobs of a few collectives under real mpirun: what ends them, and what the user reads then."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import uuid

import hosts
import numpy as np
import psutil
import pytest
import tiny

PROGRAM = tiny.ROOT / "tests" / "collective.py"
LIMIT = 60
"""Seconds within which a job ends that has lost something."""


class Job:
    """Two ranks that add ones until something happens to them.

    Args:
        logs: folder for the log files, not yet there.
        seconds: how long the ranks go on.
        ranks: how many.
        environment: what goes wrong, as tests/collective.py says.
    """

    def __init__(self, logs, seconds=0, ranks=2, **environment) -> None:
        self.logs = logs
        self.mark = f"TEST_MARK={uuid.uuid4()}"
        settings = [f"{key}={value}" for key, value in environment.items()]
        program = ["env", self.mark, *settings, sys.executable, PROGRAM, logs, seconds]
        self.mpirun = tiny.mpirun(ranks, *program)

    def processes(self):
        """Those of the job, mpirun aside, as psutil.Process."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/environ", "rb") as file:
                if self.mark.encode() in file.read().split(b"\0"):
                    found.append(process)
        return found

    def watchdogs(self):
        """Process of each rank's watchdog, which mpirun started, in the order of the ranks."""
        return sorted(
            (process for process in self.processes() if process.ppid() == self.mpirun.pid),
            key=lambda process: process.environ()["OMPI_COMM_WORLD_RANK"],
        )

    def rank(self, number):
        """Process of a rank."""
        return self.watchdogs()[number].children()[0]

    def started(self):
        """Wait for the first collective."""
        line = self.mpirun.stderr.readline()
        assert line.startswith("sum 1 is "), line + self.mpirun.stderr.read()
        return self

    def ended(self):
        """(exit status, stderr) once all is over, at the latest after LIMIT seconds; no process of the
        job is left then."""
        try:
            _, err = self.mpirun.communicate(timeout=LIMIT)
        finally:
            self.mpirun.kill()
            deadline = time.monotonic() + 5
            while (left := self.processes()) and time.monotonic() < deadline:
                time.sleep(0.1)
            for process in left:
                process.kill()
        assert not left, left
        return self.mpirun.returncode, err

    def fails(self, *words, status=None):
        """The job ends with a status that is not 0, and one line about it that has the words."""
        found, err = self.ended()
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert found and (status is None or found == status) and len(lines) == 1, err
        for word in words:
            assert word in lines[0], lines[0]
        assert "Traceback" not in err and "[WARNING]" not in err and "[ERROR]" not in err, err
        return err


@pytest.mark.slow
def test_output_is_for_the_user_and_the_rest_is_logged(tmp_path: pathlib.Path) -> None:
    """Rank 0's progress and nothing of MindSpore's; each rank has a log with both."""
    status, err = Job(tmp_path / "run" / "logs").ended()
    assert status == 0 and re.fullmatch("(sum . is 2\n)+", err), err
    first, second = ((tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "sum 1 is 2" in first and "rank 0 says goodbye" in first
    assert "rank 1 says goodbye" in second and "sum 1" not in second


@pytest.mark.slow
def test_a_crashed_rank_ends_the_job_with_its_last_words(tmp_path: pathlib.Path) -> None:
    """The other rank waits in MindSpore's C++ and is ended; the user reads why, where and what more."""
    job = Job(tmp_path / "logs", 100, CRASH=1)
    job.fails("rank 1 on ", "signal 6", "terminate called", f"{tmp_path}/logs/rank-1.log", status=134)


@pytest.mark.slow
def test_a_rank_whose_watchdog_is_killed_ends_the_job(tmp_path: pathlib.Path) -> None:
    """mpirun alone would name a number of a process."""
    job = Job(tmp_path / "logs", 100).started()
    job.watchdogs()[1].kill()
    job.fails("rank 1 on ", "was killed, and its watchdog with it")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(tmp_path: pathlib.Path) -> None:
    """It is alive and the other one waits for it: the line says which one, where, and after which step."""
    job = Job(tmp_path / "logs", 100, HANG=1).started()
    began = time.monotonic()
    job.fails("rank 1 on ", "no progress for ", "while training, after step 1", f"{tmp_path}/logs/rank-1.log")
    assert time.monotonic() < began + LIMIT


@pytest.mark.parametrize(
    "ranks,drifting,words", [(2, 1, ["rank 0 on ", ", rank 1 on "]), (3, 1, ["rank 1 on ", "against 2 others"])]
)
def test_ranks_whose_weights_differ(tmp_path: pathlib.Path, ranks, drifting, words) -> None:
    """One bit is enough, and the rank that is alone with its weights is named."""
    Job(tmp_path / "logs", 100, ranks=ranks, DRIFT=drifting).fails(
        "after step 3 the weights of ranks differ", *words, status=1
    )


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job(tmp_path: pathlib.Path) -> None:
    """Its watchdog still answers for it."""
    job = Job(tmp_path / "logs", 100).started()
    job.rank(1).suspend()
    job.fails("rank 1 on ", "stopped (SIGSTOP)", "while training, after step ")


def test_strangers_at_the_watchdogs_port(tmp_path: pathlib.Path) -> None:
    """Garbage, partial messages, an endless line, silence and a thousand connections change nothing, and
    ranks of one host listen to that host alone."""
    job = Job(tmp_path / "logs", 12).started()
    (port,) = (
        entry.laddr.port for entry in job.watchdogs()[0].net_connections("tcp") if entry.status == psutil.CONN_LISTEN
    )
    (address,) = (
        entry.laddr.ip for entry in job.watchdogs()[0].net_connections("tcp") if entry.status == psutil.CONN_LISTEN
    )
    assert address == "127.0.0.1"
    rng = np.random.default_rng(0)
    strangers = []
    for number in range(1000):
        stranger = socket.create_connection((address, port), timeout=5)
        with contextlib.suppress(OSError):
            stranger.sendall((b"", b"x", b"GET / HTTP/1.0\r\n\r\n", b"{}\n" * 30, rng.bytes(200))[number % 5])
        strangers.append(stranger)
    with contextlib.suppress(OSError):
        for _ in range(1000):
            strangers[-1].sendall(b"x" * (1 << 16))
    status, err = job.ended()
    assert status == 0 and re.fullmatch("(sum .* is 2\n)*", err), err


@pytest.mark.slow
def test_a_terminated_mpirun_says_what_the_user_can_do(tmp_path: pathlib.Path) -> None:
    """It leaves the ranks half a second, too little to say anything."""
    job = Job(tmp_path / "logs", 100).started()
    job.mpirun.terminate()
    job.fails("interrupted", "the same command resumes")


@pytest.mark.parametrize(
    "problem,words",
    [
        ({"DIFFERENT": 1}, ["rank 1 on ", "has data other", "rank 0 on "]),
        ({"BROKEN": 1}, ["rank 1 on ", "data/shard-1: missing"]),
    ],
)
def test_checks_of_all_ranks_come_before_the_first_file(tmp_path: pathlib.Path, problem, words) -> None:
    """Data that differ or lack on one rank end the job, and the run's folder is not made."""
    Job(tmp_path / "run" / "logs", **problem).fails(*words, status=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks,user", [(1, None), (2, None), (1, "3")])
@pytest.mark.parametrize("binding", [("--bind-to", "core"), ("--oversubscribe",)])
def test_a_rank_is_bound_to_its_share_of_the_cores(ranks: int, user: str | None, binding: tuple[str, ...]) -> None:
    """Whether mpirun binds it to one core or to none; the number of threads that the user set stays."""
    program = (
        "import os; from launch import ranks; ranks.current().claim_cores(); import cv2;"
        "print(os.environ['OMP_NUM_THREADS'], cv2.getNumThreads(), "
        "','.join(map(str, os.sched_getaffinity(0))))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    given = [f"OMP_NUM_THREADS={user}"] if user else []
    done = subprocess.run(
        ["mpirun", *binding, "-n", str(ranks), "env", *given, sys.executable, "-c", program],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
        env={**environment, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
    )
    share = len(os.sched_getaffinity(0)) // ranks
    taken: list[int] = []
    for line in done.stdout.splitlines():
        openmp, opencv, cores = line.split()
        assert openmp == opencv == str(user or share)
        taken += map(int, cores.split(","))
    assert len(taken) == len(set(taken)) == share * ranks


@pytest.mark.slow
@pytest.mark.skipif(not hosts.are_possible(), reason="takes root and iproute2 to make hosts")
def test_a_host_that_is_cut_off_ends_the_job(tmp_path: pathlib.Path) -> None:
    """Three hosts without a common file system compute, until the packets of one are dropped."""
    with hosts.Hosts(tmp_path, 3) as network:
        logs = tmp_path / "local" / "logs"
        job = network.mpirun(sys.executable, PROGRAM, logs, 100)
        try:
            while not (line := job.stderr.readline()).startswith("sum 1 is 3"):
                assert line, job.communicate()
            network.cut_off(3)
            _, err = job.communicate(timeout=LIMIT)
        finally:
            job.kill()
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert job.returncode and len(lines) == 1, err
        assert "rank 2 on host3 has not answered" in lines[0]
        for number in network.numbers:
            names = [path.name for path in (tmp_path / f"host{number}" / "logs").iterdir()]
            assert names == [f"rank-{number - 1}.log"]
        deadline = time.monotonic() + 30
        while (left := network.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, left
