"""What ranks find out about each other and exchange, without starting a job."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import gpus, ranks, session
from launch.communicator import decode, encode
from launch.errors import UserError
from launch.ranks import Rank

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
    """Whether two values are equal, arrays in dtype, shape and bits."""
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
def test_what_ranks_exchange_arrives_unchanged(value) -> None:
    """Bit for bit, of every type that is documented."""
    assert same(decode(encode(value)), value)


def test_arrays_that_arrive_can_be_written_to() -> None:
    """Checkpoints are restored into them; float64 keeps its nan and infinity."""
    array = decode(encode(np.array([np.nan, np.inf, 1e300, -0.0])))
    assert array.view(np.uint64).tolist() == np.array([np.nan, np.inf, 1e300, -0.0]).view(np.uint64).tolist()
    array[0] = 1


@pytest.mark.parametrize("value", [{1, 2}, object(), np.array(["text"]), np.array([object()]), b"bytes"])
def test_other_types_are_refused(value) -> None:
    """Rather than sent in some other form."""
    with pytest.raises(TypeError):
        encode(value)


def test_a_pickle_from_another_rank_is_not_run() -> None:
    """mpi4py would unpickle by default, which can run any code."""
    with pytest.raises((ValueError, json.JSONDecodeError)):
        decode(b"cbuiltins\nexit\n(tR.")


@pytest.mark.parametrize(
    "outcomes,words",
    [
        ([("a", {"x": "1"}, None), ("b", {"x": "1"}, None)], None),
        ([("a", {"x": "1"}, None), ("b", {"x": "2"}, None)], ["rank 1 on b", "x 2", "rank 0 on a"]),
        ([("a", {}, None), ("b", {}, "f.flo: cut short")], ["rank 1 on b: f.flo: cut short"]),
        ([("a", {}, "no recipe"), ("a", {}, "no recipe")], ["no recipe"]),
    ],
)
def test_ranks_that_disagree(outcomes, words) -> None:
    """The line names the rank and host that differs, unless all failed alike."""
    found = session.find_disagreement([session.Outcome(*outcome) for outcome in outcomes])
    assert (found is None) == (words is None)
    for word in words or []:
        assert word in found


def test_slurms_variables_are_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of srun --mpi=pmix; without PMIx they would all be rank 0 and write to the same run."""
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


def test_another_mpis_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPICH's mpirun would start as many runs of one rank, all with the same folder."""
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(UserError, match="Open MPI"):
        ranks.current.__wrapped__()


def test_a_role_of_mindspores_own_cluster_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore would start as a scheduler or a worker, or end without a word."""
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    with pytest.raises(UserError, match="unset MS_ROLE"):
        session.start_mindspore(Rank(), "cpu")


def test_more_ranks_than_gpus_are_refused() -> None:
    """In words, on each host, before MindSpore is imported; as is a machine without a driver."""
    with pytest.raises(UserError, match="GPU|driver"):
        gpus.check_device(Rank(0, 100, 0, 100), "gpu")
