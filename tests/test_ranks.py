"""How ranks are numbered, how they find each other and what they exchange, without starting a job."""

import concurrent.futures
import contextlib
import json
import os
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import gpus, ranks, rendezvous, session
from launch.communicator import decode, encode
from launch.errors import UserError
from launch.ranks import Rank
from launch.watchdog import SLOW_STEPS, STALLED, Phase, RankState, Watchdog

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
ARRAYS = st.builds(
    lambda shape, kind, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(kind),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["u1", "i8", "f4", "f8", "?"]),
    st.integers(0, 9),
)
VALUES = st.recursive(
    SCALARS | ARRAYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(one: object, other: object) -> bool:
    """Whether two values are equal; arrays in dtype, shape and bits."""
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@given(VALUES)
def test_what_ranks_exchange_arrives_unchanged(value: object) -> None:
    """Bit for bit, for every documented type."""
    assert same(decode(encode(value)), value)


def test_arrays_that_arrive_are_writable() -> None:
    """Checkpoints are restored into them; NaN and infinity survive."""
    array = decode(encode(np.array([np.nan, np.inf, 1e300, -0.0])))
    assert array.view(np.uint64).tolist() == np.array([np.nan, np.inf, 1e300, -0.0]).view(np.uint64).tolist()
    array[0] = 1


@pytest.mark.parametrize("value", [{1, 2}, object(), np.array(["text"]), np.array([object()]), b"bytes"])
def test_other_types_are_refused(value: object) -> None:
    """They are not silently converted."""
    with pytest.raises(TypeError):
        encode(value)


def test_a_pickle_from_another_rank_is_not_run() -> None:
    """By default mpi4py would unpickle it, which can run any code."""
    with pytest.raises((ValueError, json.JSONDecodeError)):
        decode(b"cbuiltins\nexit\n(tR.")


@pytest.mark.parametrize(
    "outcomes,words",
    [
        ([("rank 0 on a", {"x": "1"}, None), ("rank 1 on b", {"x": "1"}, None)], []),
        ([("rank 0 on a", {"x": "1"}, None), ("rank 1 on b", {"x": "2"}, None)], ["rank 1 on b", "x 2", "rank 0 on a"]),
        ([("rank 0 on a", {}, None), ("rank 1 on b", {}, "f.flo: cut short")], ["rank 1 on b: f.flo: cut short"]),
        ([("rank 0 on a", {}, "no recipe"), ("rank 1 on a", {}, "no recipe")], ["no recipe"]),
    ],
)
def test_the_error_of_ranks_that_disagree_names_rank_and_host(
    outcomes: list[session.Outcome], words: list[str]
) -> None:
    """Unless all ranks have an error."""
    problem = session.find_disagreement(outcomes) or ""
    assert bool(problem) == bool(words) and all(word in problem for word in words)


def test_strangers_at_rank_0_s_port_change_nothing() -> None:
    """Garbage, partial messages, an endless line, silence and a thousand connections, before the ranks and among them.

    What they send is not answered, and their connections are closed.
    """
    rng = np.random.default_rng(0)
    secret, names = "0123456789abcdef", [f"rank {number} on host" for number in (1, 2, 3)]
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor() as pool:
        server = stack.enter_context(rendezvous.listen("127.0.0.1"))
        address = server.getsockname()

        def intrude(message: bytes) -> socket.socket:
            stranger = stack.enter_context(socket.create_connection(address, timeout=10))
            with contextlib.suppress(OSError):
                stranger.sendall(message)
            return stranger

        def join(name: str) -> socket.socket:
            rank = rendezvous.reach("rank 0 on host", ["127.0.0.1"], address[1], secret, name)
            return stack.enter_context(rank)

        garbage = [b"", secret[:-1].encode(), b"GET / HTTP/1.0\r\n\r\n", b"{}\n" * 30, rng.bytes(200)]
        strangers = [intrude(message) for message in 20 * garbage]
        accepting = pool.submit(rendezvous.accept, server, secret, len(names), 30)
        for name in names:
            strangers += [intrude(message) for message in [b"x" * (1 << 26), *60 * garbage]]
            join(name)
        accepted = accepting.result()
        for connection in accepted.values():
            stack.enter_context(connection)
        assert list(accepted) == names
        server.close()
        for stranger in strangers:
            with contextlib.suppress(ConnectionError):
                stranger.sendall(b"x")  # only then the kernel tells it
                assert stranger.recv(1) == b""


def test_a_rank_that_cannot_reach_rank_0_says_where_it_tried() -> None:
    """Rank 0 stops waiting for it, so that all ranks end with this error."""
    with rendezvous.listen("127.0.0.1") as server:
        assert rendezvous.accept(server, "secret", 1, 0.1) == {}
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=f"rank 0 on host at 127.0.0.1 or 127.0.0.2, port {port}: open the TCP ports"):
        rendezvous.reach("rank 0 on host", ["127.0.0.1", "127.0.0.2"], port, "secret", "rank 1 on host")


def test_waiting_for_other_ranks_does_not_make_a_rank_late() -> None:
    """It does not while it waits and not after: it then has as long as ever for what it does next."""
    state = RankState()
    state.update(phase="TRAINING", step=7)
    state.update(waiting=True)
    state.since -= 1000
    assert not state.is_overdue and state.wait > 999
    state.update(waiting=False)
    assert not state.is_overdue and state.wait == 0
    state.since -= STALLED + 1
    assert state.is_overdue and str(state) == "training, after step 7"


def test_a_step_may_take_five_times_as_long_as_the_slowest_recent_one() -> None:
    """A slow machine or a large batch is not a rank that hangs."""
    state = RankState()
    state.update(phase="TRAINING", step=1)
    state.since -= STALLED - 1
    state.update(phase="TRAINING", step=2)
    state.since -= SLOW_STEPS * (STALLED - 1) - 1
    assert not state.is_overdue
    state.since -= 2
    assert state.is_overdue
    state.update(phase="VALIDATING", step=2)
    state.since -= Phase.VALIDATING.limit + 1
    assert state.is_overdue


@pytest.mark.parametrize(
    "status,reason", [(14, "ended with status 14"), (1, "ended with status 1"), (-9, "killed by signal 9 (Killed)")]
)
def test_the_end_of_a_rank_that_gave_no_reason_is_explained(status: int, reason: str) -> None:
    """Open MPI's abort ends a process with a status, a crash with a signal."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Watchdog(Rank(), os.getpid(), ours).explain_exit(status) == reason


def test_slurm_s_variables_number_the_ranks_if_it_has_pmix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PMIx they would all be rank 0 and write to the same run."""
    given = {"STEP_NUM_TASKS": "11", "STEP_TASKS_PER_NODE": "4(x2),3", "PROCID": "9", "LOCALID": "1", "NODEID": "2"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit):  # rank 0 reports it
        ranks.current.__wrapped__()
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(UserError, match="srun --mpi=pmix"):
        ranks.current.__wrapped__()
    monkeypatch.setenv("SLURM_PROCID", "9")
    monkeypatch.setenv("PMIX_RANK", "9")
    rank = ranks.current.__wrapped__()
    assert (rank.rank, rank.size, rank.local_rank, rank.local_size) == (9, 11, 1, 3)
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert ranks.current.__wrapped__().local_size == 4


@pytest.mark.parametrize(
    "binding,masks,cores,share",
    [
        ("mask_cpu:", "0x00ff,0xff00", 16, 8),  # two ranks, each bound to a socket of eight cores
        ("mask_cpu:", "0x1,0x2", 2, 1),
        ("none", "", 4, 2),
    ],
)
def test_ranks_that_slurm_has_bound_use_all_their_cores(
    binding: str, masks: str, cores: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an equal part of them, as ranks that share the cores of a host do."""
    given = {"STEP_TASKS_PER_NODE": "2", "STEP_NUM_TASKS": "2", "PROCID": "1", "LOCALID": "1", "NODEID": "0"}
    for name, value in {**given, "CPU_BIND_TYPE": binding, "CPU_BIND_LIST": masks}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(ranks, "usable_cores", lambda process: frozenset(range(4)))
    rank = ranks.from_slurm()
    assert (len(rank.cores), rank.share) == (cores, share)


@pytest.mark.parametrize("value,threads", [("2,1", 2), (" 3 , 1 ", 3), ("", 4), ("4", 4)])
def test_openmp_s_numbers_of_threads_are_understood(value: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each level of nesting; OpenCV gets the first."""
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setenv("OPENCV_FOR_THREADS_NUM", "")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    rank = Rank(cores=frozenset())
    rank.claim_cores()
    ranks.check_variables()
    assert rank.threads == threads
    assert os.environ["OPENCV_FOR_THREADS_NUM"] == str(threads) and os.environ["OMP_NUM_THREADS"] == (value or "4")


@pytest.mark.parametrize(
    "name,values",
    [
        ("OMP_NUM_THREADS", ["abc", "-1", "1.5", "0", "2,"]),
        ("OPENCV_FOR_THREADS_NUM", ["x", "2,1"]),
        ("GLOG_v", ["x", "9"]),
    ],
)
def test_a_variable_that_would_make_a_library_fail_is_refused(
    name: str, values: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in values:
        monkeypatch.setenv(name, value)
        with (
            pytest.raises(UserError, match=f"{name} is '{value}' in the environment; set it to a "),
            session.start(lambda: ({}, None)),
        ):
            pass


def test_ranks_of_another_mpi_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPICH's mpirun would start several runs of one rank, all with the same folder."""
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="Open MPI"):
        ranks.current.__wrapped__()


def test_a_role_in_mindspore_s_own_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore would start as a scheduler or worker, or exit silently."""
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    with pytest.raises(UserError, match="unset MS_ROLE"):
        session.start_mindspore(Rank(), "cpu")


def test_more_ranks_than_gpus_are_refused() -> None:
    """On each host, before MindSpore is imported; as is a host without a driver."""
    with pytest.raises(UserError, match=r"GPU|driver"):
        gpus.check_device(Rank(0, 100, 0, 100), "gpu")
