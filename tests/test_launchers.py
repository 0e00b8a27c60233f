"""Jobs under what starts ranks beside this environment's mpirun: Debian's mpirun and Slurm's srun."""

import pathlib
import uuid

import pytest
import tiny
from test_jobs import PROGRAM, Job


class Launched(Job):
    """Two ranks of tests/collective.py under one of tiny.LAUNCHERS, with its output in stderr."""

    def __init__(self, launcher, folder) -> None:
        mark = str(uuid.uuid4())
        self.mark = f"TEST_MARK={mark}"
        self.mpirun = tiny.launch(launcher, PROGRAM, folder / "logs", 100, TEST_MARK=mark)

    def rank(self, number):
        """Process of a rank: the child of one with the same command."""
        ranks = []
        for process in self.processes():
            variables = process.environ()
            named = [variables[name] for name in ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID") if name in variables]
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
@pytest.mark.parametrize("launcher", tiny.LAUNCHERS)
def test_a_killed_rank_ends_the_job(launcher, tmp_path: pathlib.Path) -> None:
    """With one line that says why, and a status that is not 0."""
    job = Launched(launcher, tmp_path).started()
    job.rank(1).kill()
    status, err = job.ended()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status and len(lines) == 1, err
    assert "rank 1 on " in lines[0] and "signal 9" in lines[0] and "logs/rank-1.log" in lines[0]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
