"""Jobs under what starts ranks beside this environment's mpirun: Debian's, Slurm's srun, msrun."""

import os
import shutil
import socket
import subprocess
import sys
import uuid

import pytest
import tiny
from test_cluster import PROGRAM, Job

MPIRUN = "/usr/bin/mpirun"


def is_there(launcher):
    """Whether two ranks can be started here with it."""
    if launcher == "srun":
        return bool(shutil.which("srun")) and not subprocess.run(
            ["srun", "--mpi=pmix", "--immediate=5", "-n", "1", "true"], capture_output=True,
            check=False).returncode
    return bool(shutil.which(MPIRUN if launcher == "mpirun" else launcher))


@pytest.fixture(params=["mpirun", "srun", "msrun"])
def launcher(request, tmp_path):
    """A function from a Python program to the command of two ranks that run it."""
    if not is_there(request.param):
        pytest.skip(f"no {request.param} here beside this environment's mpirun")

    def command(*program):
        if request.param == "msrun":
            with socket.create_server(("", 0)) as free:
                port = free.getsockname()[1]
            return ["msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={port}",
                    "--join=True", f"--log_dir={tmp_path}/msrun", *program]
        start = {"mpirun": [MPIRUN, "--oversubscribe"], "srun": ["srun", "--mpi=pmix", "--overcommit"]}
        return [*start[request.param], "-n", "2", sys.executable, *program]

    return command


class Launched(Job):
    """A job of tests/collective.py under some launcher, with all its output in the launcher's stderr.

    Args:
        command: the launcher's, and the program's.
        environment: what goes wrong, as tests/collective.py says.
    """

    def __init__(self, command, **environment):
        self.mark = f"TEST_MARK={uuid.uuid4()}"
        key, _, value = self.mark.partition("=")
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self.mpirun = subprocess.Popen(
            ["sh", "-c", 'exec "$@" >&2', "sh", *map(str, command)], text=True, cwd=tiny.ROOT,
            env={**os.environ, **root, key: value, **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)

    def rank(self, number):
        """Process of a rank: the child of one with the same command."""
        ranks = []
        for process in self.processes():
            variables = process.environ()
            named = [variables[name] for name in ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "MS_NODE_ID")
                     if name in variables]
            if named[:1] == [str(number)] and process.cmdline() == process.parent().cmdline():
                ranks.append(process)
        assert len(ranks) == 1, ranks
        return ranks[0]

    def started(self):
        """Wait for the first collective."""
        lines = []
        while not (lines and lines[-1].startswith("sum 1 is 2")):
            lines.append(self.mpirun.stderr.readline())
            assert lines[-1], "".join(lines)
        return self


@pytest.mark.slow
def test_ranks_meet_and_part(launcher, tmp_path):
    """They add over both, each writes its log, and the launcher is content with how they end."""
    status, err = Launched(launcher(PROGRAM, tmp_path / "logs", 0)).ended()
    assert status == 0 and "sum 1 is 2" in err, err
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["killed", "raising"])
def test_a_failing_rank_ends_the_job(launcher, tmp_path, way):
    """With one line that says why, and a status that is not 0."""
    job = Launched(launcher(PROGRAM, tmp_path / "logs", 100),
                   **({"RAISE": "1"} if way == "raising" else {})).started()
    if way == "killed":
        job.rank(1).kill()
    status, err = job.ended()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status and len(lines) == 1 and "rank 1 on " in lines[0], err
    assert ("signal 9" if way == "killed" else "ValueError: as asked") in lines[0]
    assert "Traceback" not in err.partition("error: ")[0]
