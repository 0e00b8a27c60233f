"""Jobs under launchers other than this environment's mpirun: Debian's mpirun and Slurm's srun."""

import pathlib
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
@pytest.mark.parametrize("launcher", tiny.LAUNCHERS)
def test_a_killed_rank_ends_the_job_with_one_line_and_a_non_zero_status(launcher: str, tmp_path: pathlib.Path) -> None:
    job = Launched(launcher, tmp_path)
    job.wait_for_start()
    job.rank(1).kill()
    status, err = job.finish()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status and len(lines) == 1, err
    assert "rank 1 on " in lines[0] and "signal 9" in lines[0] and "logs/rank-1.log" in lines[0]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
