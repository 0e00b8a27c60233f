"""What a job does when something fails: seconds until it has ended, its status, and what the user reads.

python tests/bench/failures.py [--only TEXT ...]

Jobs of tests/collective.py: two ranks on this machine, or ranks on three hosts that are network namespaces (needs
root, iproute2 and iptables). Each case happens while the ranks compute, unless its name says otherwise.
"""

import argparse
import contextlib
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import psutil

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import hosts
import tiny

PROGRAM = TESTS / "collective.py"
PORTS = {"OMPI_MCA_btl_tcp_port_min_v4": "20000", "OMPI_MCA_btl_tcp_port_range_v4": "1000"}
"""Where Open MPI's messages arrive, for the firewall."""
LIMIT = 500

Event = Callable[["Job"], None]
HostEvent = Callable[["Job", hosts.Hosts], None]


class Job:
    """A running job; `kill` and others act on one of its ranks.

    Args:
        network: hosts with a rank each; None: two ranks on this machine.
        environment: what tests/collective.py reads.
    """

    def __init__(self, folder: pathlib.Path, network: hosts.Hosts | None, **environment: str) -> None:
        self.network = network
        settings = [f"{key}={value}" for key, value in {**PORTS, **environment}.items()]
        logs = (folder / "local" if network else folder) / "logs"
        duration = 5 if {"LATE", "SLOW"} & environment.keys() else 1000
        command = ["env", *settings, sys.executable, PROGRAM, logs, duration]
        self.mpirun = network.mpirun(*command) if network else tiny.mpirun(2, *command)

    def processes(self, rank: int) -> list[psutil.Process]:
        """A rank's watchdog and the rank itself."""
        found = self.network.processes() if self.network else psutil.Process(self.mpirun.pid).children(recursive=True)
        own = [
            process
            for process in found
            if process.environ().get("OMPI_COMM_WORLD_RANK") == str(rank)
            and str(PROGRAM) in process.cmdline()
            and process.name() != "env"
        ]
        return sorted(own, key=lambda process: process.parent() in own)

    def signal(self, rank: int, number: int, watchdog: bool = False) -> None:
        self.processes(rank)[0 if watchdog else 1].send_signal(number)

    def wait_for(self, text: str) -> None:
        """Wait until a line of the job's stderr contains this text."""
        if not any(text in line for line in self.mpirun.stderr or ()):
            raise RuntimeError("the job ended before it computed")


def firewall(network: hosts.Hosts, target: str) -> None:
    """Have the hosts drop or reject what arrives at Open MPI's ports or comes from them."""
    for number in network.numbers:
        for way in ("--dport", "--sport"):
            subprocess.run(
                [
                    "ip",
                    "netns",
                    "exec",
                    f"{network.tag}h{number}",
                    "iptables",
                    "-A",
                    "INPUT",
                    "-p",
                    "tcp",
                    way,
                    "20000:21000",
                    "-j",
                    target,
                ],
                check=True,
            )


ON_ONE: dict[str, tuple[dict[str, str], Event | None]] = {
    "rank 1 is killed (-9)": ({}, lambda job: job.signal(1, signal.SIGKILL)),
    "rank 0 is killed (-9)": ({}, lambda job: job.signal(0, signal.SIGKILL)),
    "rank 1's watchdog is killed": ({}, lambda job: job.signal(1, signal.SIGKILL, watchdog=True)),
    "rank 0's watchdog is killed": ({}, lambda job: job.signal(0, signal.SIGKILL, watchdog=True)),
    "rank 1 is stopped (SIGSTOP)": ({}, lambda job: job.signal(1, signal.SIGSTOP)),
    "rank 1 hangs": ({"HANG": "1"}, None),
    "rank 1 raises an exception": ({"RAISE": "1"}, None),
    "rank 1 crashes in C++": ({"CRASH": "1"}, None),
    "data differ on rank 1": ({"DIFFERENT": "1"}, None),
    "a shard is missing on rank 1": ({"BROKEN": "1"}, None),
    "rank 1 starts 60 s late": ({"LATE": "1:60"}, None),
    "rank 1 checks its data for 60 s": ({"SLOW": "1:60"}, None),
    "mpirun gets SIGTERM": ({}, lambda job: job.mpirun.terminate()),
    "mpirun gets Ctrl-C": ({}, lambda job: job.mpirun.send_signal(signal.SIGINT)),
}
"""Name to what the ranks' environment holds and what happens."""
ON_HOSTS: dict[str, HostEvent] = {
    "host1 is cut off": lambda _, network: network.cut_off(1),
    "host2 is cut off": lambda _, network: network.cut_off(2),
    "host3 is cut off": lambda _, network: network.cut_off(3),
    "rank 2 on host3 is killed (-9)": lambda job, _: job.signal(2, signal.SIGKILL),
    "rank 2's watchdog on host3 is killed": lambda job, _: job.signal(2, signal.SIGKILL, watchdog=True),
    "a firewall drops Open MPI's messages": lambda _, network: firewall(network, "DROP"),
}
"""Name to what happens."""
BEFORE = {
    "a firewall drops Open MPI's messages from the start": "DROP",
    "a firewall rejects Open MPI's messages from the start": "REJECT",
}
"""Name to the firewall's target."""


def finish(name: str, job: Job, began: float) -> None:
    """Wait for a job's end and print a row."""
    try:
        _, err = job.mpirun.communicate(timeout=LIMIT)
        seconds, status = time.monotonic() - began, job.mpirun.returncode
    except subprocess.TimeoutExpired:
        job.mpirun.kill()
        _, err = job.mpirun.communicate()
        seconds, status = LIMIT, "none"
    lines = [line for line in err.splitlines() if "error: " in line]
    time.sleep(3)
    left = 0
    if job.network:
        left = len(job.network.processes())
    else:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                left += str(PROGRAM) in process.cmdline()
    print(f"| {name} | {seconds:.1f} | {status} | {left} | {' // '.join(lines) or '-'} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose names contain one of these texts")
    options = parser.parse_args()

    def wanted(name: str) -> bool:
        return not options.only or any(text in name for text in options.only)

    print("| what happens | s | status | processes left | the line |\n| --- | ---: | ---: | ---: | --- |", flush=True)
    for name, (environment, event) in ON_ONE.items():
        if wanted(name):
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                job = Job(pathlib.Path(folder), None, **environment)
                if event:
                    job.wait_for("sum 5 is 2")
                    began = time.monotonic()
                    event(job)
                elif {"HANG", "RAISE", "CRASH"} & environment.keys():
                    job.wait_for("sum 1 is 2")
                    began = time.monotonic()
                finish(name, job, began)
    for name in [*ON_HOSTS, *BEFORE] if hosts.are_possible() else ():
        if wanted(name):
            with tempfile.TemporaryDirectory() as folder, hosts.Hosts(folder, 3) as network:
                if name in BEFORE:
                    firewall(network, BEFORE[name])
                began = time.monotonic()
                job = Job(pathlib.Path(folder), network)
                if name in ON_HOSTS:
                    job.wait_for("sum 5 is 3")
                    began = time.monotonic()
                    ON_HOSTS[name](job, network)
                finish(name, job, began)


if __name__ == "__main__":
    main()
