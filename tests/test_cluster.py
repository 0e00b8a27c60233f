"""Jobs of a few collectives under real mpirun: what ends them, and what the user reads then."""

import contextlib
import os
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
"""Seconds within which a job ends that has lost something."""


class Job:
    """Two ranks that add ones until something happens to them.

    Args:
        logs: folder for the log files, not yet there.
        seconds: how long the ranks go on.
        ranks: how many.
        environment: what goes wrong, as tests/collective.py says.
    """

    def __init__(self, logs, seconds=0, ranks=2, **environment):
        self.logs = logs
        self.mark = f"TEST_MARK={uuid.uuid4()}"
        settings = [f"{key}={value}" for key, value in {"GLOG_v": 2, **environment}.items()]
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

    def keepers(self):
        """Process of each rank's keeper, which mpirun started, in the order of the ranks."""
        return sorted((process for process in self.processes() if process.ppid() == self.mpirun.pid),
                      key=lambda process: process.environ()["OMPI_COMM_WORLD_RANK"])

    def rank(self, number):
        """Process of a rank."""
        return self.keepers()[number].children()[0]

    def scheduler(self):
        """Process of MindSpore's scheduler."""
        return self.rank(0).children()[0]

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
def test_output_is_for_the_user_and_the_rest_is_logged(tmp_path):
    """Rank 0's progress and nothing of MindSpore's; each rank has a log with both."""
    status, err = Job(tmp_path / "run" / "logs").ended()
    assert status == 0 and re.fullmatch("(sum . is 2\n)+", err), err
    first, second = ((tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert "sum 1 is 2" in first and "rank 0 says goodbye" in first
    assert "rank 1 says goodbye" in second and "sum 1" not in second
    assert "Cluster is successfully initialized" in first


@pytest.mark.slow
def test_a_crashed_rank_ends_the_job_with_its_last_words(tmp_path):
    """The other rank waits in MindSpore's C++ and is ended; the user reads why, where and what more."""
    job = Job(tmp_path / "logs", 100, CRASH=1)
    job.fails("rank 1 on ", "signal 6", "terminate called", f"{tmp_path}/logs/rank-1.log", status=134)


@pytest.mark.slow
def test_a_killed_scheduler_ends_the_job(tmp_path):
    """MindSpore's ranks would go on without it, or wait for it."""
    job = Job(tmp_path / "logs", 100).started()
    job.scheduler().kill()
    job.fails("rank 0 on ", "MindSpore's scheduler was ended", status=1)


@pytest.mark.slow
def test_a_terminated_mpirun_says_what_the_user_can_do(tmp_path):
    """It leaves the ranks half a second, in which they could only vanish without a word."""
    job = Job(tmp_path / "logs", 100).started()
    job.mpirun.terminate()
    job.fails("interrupted", "the same command goes on")


@pytest.mark.parametrize("problem,words", [
    ({"DIFFERENT": 1}, ["rank 1 on ", "has data other", "rank 0 on "]),
    ({"BROKEN": 1}, ["rank 1 on ", "data/shard-1: missing"]),
])
def test_checks_of_all_ranks_come_before_the_first_file(tmp_path, problem, words):
    """Data that differ or lack on one rank end the job, and the run's folder is not made."""
    Job(tmp_path / "run" / "logs", **problem).fails(*words, status=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("binding,user,threads", [
    ((), None, None), (("--bind-to", "core"), None, None), ((), "3", 3)])
def test_a_rank_has_its_share_of_the_cores(binding, user, threads):
    """Also where mpirun binds it to one core; what the user set stays."""
    program = ("import os, cv2; from launch import cluster; cluster.set_threads(cluster.place());"
               "print(os.environ['OMP_NUM_THREADS'], cv2.getNumThreads(), "
               "len(os.sched_getaffinity(0)))")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    given = [f"OMP_NUM_THREADS={user}"] if user else []
    done = subprocess.run(
        ["mpirun", *binding, "-n", "1", "env", *given, sys.executable, "-c", program],
        cwd=tiny.ROOT, capture_output=True, text=True, check=True, timeout=LIMIT,
        env={**environment, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    cores = len(os.sched_getaffinity(0))
    openmp, opencv, bound = map(int, done.stdout.split())
    assert openmp == opencv == (threads or cores)
    assert user or bound == cores


@pytest.mark.slow
@pytest.mark.skipif(not hosts.are_possible(), reason="takes root and iproute2 to make hosts")
def test_a_host_that_is_cut_off_ends_the_job(tmp_path):
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
