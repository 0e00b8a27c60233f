"""Which number format `model.precision` chooses, also on other processors."""

import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from model import native

CHOOSE = """
import sys
from launch import ranks, session
session.start_mindspore(ranks.Rank(), "cpu")
import numpy as np
from mindspore import Tensor
from model.precision import resolve_precision, set_precision
from model.pwcnet import PWCNet
network = PWCNet(backend=sys.argv[1])
precisions = [resolve_precision(choice, network.backend) for choice in sys.argv[2:]]
set_precision(network, precisions[0])
images = [Tensor(np.random.default_rng(seed).random((2, 3, 64, 64)).astype(np.float32)) for seed in (0, 1)]
print(*precisions, float(network(*images)[-1].abs().sum()) > 0)
"""


def choose(*choices: str, backend: str = "native", **environment: str) -> tuple[str, str]:
    """What a new process makes of choices, whether the first one computes, and the notes; `environment` changes its
    variables."""
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, backend, *choices],
        cwd=tiny.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("backend", ["native", "mindspore"])
def test_without_bfloat16_it_is_float32(backend: str) -> None:
    """A processor without it gets a note if it was asked for by name; "auto" is silent. The network runs."""
    if not native.available():
        pytest.skip("there is no compiler here")
    reason = (
        "neither AVX512-BF16 nor AMX"
        if backend == "native"
        else "MindSpore's convolutions on the CPU do not support bfloat16"
    )
    chosen, notes = choose("bfloat16", "auto", backend=backend, ONEDNN_MAX_CPU_ISA="AVX2")
    assert chosen == "float32 float32 True"
    assert notes.count("float32 instead of bfloat16") == 1 and reason in notes


def test_auto_is_bfloat16_where_the_processor_has_it() -> None:
    """Both ask for bfloat16, without a note."""
    flags = pathlib.Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].partition("\n")[0].split()
    if not native.available() or not {"avx512_bf16", "amx_bf16"} & set(flags):
        pytest.skip("this processor has no bfloat16")
    chosen, notes = choose("auto")
    assert chosen == "bfloat16 True" and "instead" not in notes
