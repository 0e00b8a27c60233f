"""Jobs of a few collectives under real mpirun: what ends them, and what the user then reads."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import time
import uuid

import hosts
import psutil
import pytest
import tiny

PROGRAM = tiny.ROOT / "tests" / "collective.py"
LIMIT = 60
"""Seconds within which a failed job ends."""


class Job:
    """Ranks that sum ones until something happens to them.

    Args:
        logs: folder for the log files, which does not exist yet.
        seconds: how long the ranks run.
        ranks: how many.
        environment: what goes wrong; tests/collective.py lists it.
    """

    def __init__(self, logs: pathlib.Path, seconds: float = 0, ranks: int = 2, **environment: object) -> None:
        self.logs = logs
        self.mark = f"TEST_MARK={uuid.uuid4()}"
        settings = [f"{key}={value}" for key, value in environment.items()]
        program = ["env", self.mark, *settings, sys.executable, PROGRAM, logs, seconds]
        self.mpirun = tiny.mpirun(ranks, *program)

    def processes(self) -> list[psutil.Process]:
        """All processes of the job except mpirun."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/environ", "rb") as file:
                if self.mark.encode() in file.read().split(b"\0"):
                    found.append(process)
        return found

    def watchdogs(self) -> list[psutil.Process]:
        """The watchdogs, which are mpirun's children, in rank order."""
        return sorted(
            (process for process in self.processes() if process.ppid() == self.mpirun.pid),
            key=lambda process: process.environ()["OMPI_COMM_WORLD_RANK"],
        )

    def rank(self, number: int) -> psutil.Process:
        """A rank's process."""
        return self.watchdogs()[number].children()[0]

    def read_line(self) -> str:
        """The next line of stderr."""
        assert self.mpirun.stderr
        return self.mpirun.stderr.readline()

    def wait_for_start(self) -> None:
        """Wait for the first collective."""
        line = self.read_line()
        assert line.startswith("sum 1 is "), line + self.finish()[1]

    def finish(self) -> tuple[int, str]:
        """Wait until the job ends, within LIMIT seconds and leaving no process; returns (exit status, stderr)."""
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

    def fails(self, *words: str, status: int | None = None) -> str:
        """Check that the job ends with a non-zero status and one error line that has the words; returns stderr."""
        found, err = self.finish()
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert found and (status is None or found == status) and len(lines) == 1, err
        for word in words:
            assert word in lines[0], lines[0]
        assert "Traceback" not in err and "[WARNING]" not in err and "[ERROR]" not in err, err
        return err


def start_job(logs: pathlib.Path, seconds: float) -> Job:
    """Start a job and wait for its first collective."""
    job = Job(logs, seconds)
    job.wait_for_start()
    return job


@pytest.mark.slow
def test_output_is_for_the_user_and_the_rest_is_logged(tmp_path: pathlib.Path) -> None:
    """The terminal shows rank 0's progress and nothing from MindSpore; each rank has its own log."""
    status, err = Job(tmp_path / "run" / "logs").finish()
    assert status == 0 and re.fullmatch("(sum . is 2\n)+", err), err
    first, second = ((tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "sum 1 is 2" in first and "rank 0 says goodbye" in first
    assert "rank 1 says goodbye" in second and "sum 1" not in second


@pytest.mark.slow
def test_a_crashed_rank_ends_the_job_with_its_last_log_line(tmp_path: pathlib.Path) -> None:
    """The other rank waits in MPI and is killed; the user reads which rank crashed, why, and where its log is."""
    job = Job(tmp_path / "logs", 100, CRASH=1)
    job.fails("rank 1 on ", "signal 6", "terminate called", f"{tmp_path}/logs/rank-1.log", status=134)


@pytest.mark.slow
def test_a_rank_whose_watchdog_is_killed_ends_the_job(tmp_path: pathlib.Path) -> None:
    """The error names the rank and host; mpirun alone would give a process number."""
    job = start_job(tmp_path / "logs", 100)
    job.watchdogs()[1].kill()
    job.fails("rank 1 on ", "was killed, and its watchdog with it")


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(tmp_path: pathlib.Path) -> None:
    """It is alive and the other rank waits for it: the error says which rank hangs, where, and after which step."""
    job = Job(tmp_path / "logs", 100, HANG=1)
    job.wait_for_start()
    began = time.monotonic()
    job.fails("rank 1 on ", "no progress for ", "while training, after step 1", f"{tmp_path}/logs/rank-1.log")
    assert time.monotonic() < began + LIMIT


@pytest.mark.parametrize(
    "ranks,drifting,words", [(2, 1, ["rank 0 on ", ", rank 1 on "]), (3, 1, ["rank 1 on ", "against 2 others"])]
)
def test_weights_that_differ_in_one_bit_end_the_job(
    tmp_path: pathlib.Path, ranks: int, drifting: int, words: list[str]
) -> None:
    """The error names the rank whose weights differ from the others'."""
    Job(tmp_path / "logs", 100, ranks=ranks, DRIFT=drifting).fails(
        "after step 3 the weights of ranks differ", *words, status=1
    )


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job(tmp_path: pathlib.Path) -> None:
    """Its watchdog still runs, and reports it."""
    job = start_job(tmp_path / "logs", 100)
    job.rank(1).suspend()
    job.fails("rank 1 on ", "stopped (SIGSTOP)", "while training, after step ")


def test_watchdogs_of_a_running_job_have_no_open_port(tmp_path: pathlib.Path) -> None:
    """Nobody else can reach them: each has one connection, on the loopback interface if all ranks are on one host."""
    job = start_job(tmp_path / "logs", 2)
    for watchdog in job.watchdogs():
        ((local, remote, status),) = [entry[3:6] for entry in watchdog.net_connections("tcp")]
        assert (local.ip, remote.ip, status) == ("127.0.0.1", "127.0.0.1", psutil.CONN_ESTABLISHED)
    status, err = job.finish()
    assert status == 0 and re.fullmatch("(sum .* is 2\n)*", err), err


@pytest.mark.slow
def test_a_terminated_mpirun_says_how_to_resume(tmp_path: pathlib.Path) -> None:
    """mpirun leaves the ranks too little time to print anything themselves."""
    job = start_job(tmp_path / "logs", 100)
    job.mpirun.terminate()
    job.fails("interrupted", "the same command resumes")


@pytest.mark.parametrize(
    "problem,words",
    [
        ({"DIFFERENT": 1}, ["rank 1 on ", "has data other", "rank 0 on "]),
        ({"BROKEN": 1}, ["rank 1 on ", "data/shard-1: missing"]),
    ],
)
def test_all_ranks_are_checked_before_the_first_file_is_created(
    tmp_path: pathlib.Path, problem: dict[str, int], words: list[str]
) -> None:
    """Data that differ, or are missing, on one rank end the job, and the run folder is not created."""
    Job(tmp_path / "run" / "logs", **problem).fails(*words, status=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks,user", [(1, None), (2, None), (1, "3")])
@pytest.mark.parametrize("binding", [("--bind-to", "core"), ("--oversubscribe",)])
def test_a_rank_is_bound_to_its_share_of_the_cores(ranks: int, user: str | None, binding: tuple[str, ...]) -> None:
    """Whether mpirun binds it to one core or to none; a number of threads set by the user is kept."""
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
@pytest.mark.skipif(not hosts.are_possible(), reason="network namespaces need root and iproute2")
def test_a_host_that_is_cut_off_ends_the_job(tmp_path: pathlib.Path) -> None:
    """Three hosts without a shared file system compute until all packets of one are dropped."""
    with hosts.Hosts(tmp_path, 3) as network:
        logs = tmp_path / "local" / "logs"
        job = network.mpirun(sys.executable, PROGRAM, logs, 100)
        try:
            assert job.stderr
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
        assert not (left := network.remaining(30)), left
