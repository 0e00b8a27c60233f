"""Calls functions of an operator library as MindSpore calls them."""

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import DTypeLike

GUARD = 64
"""NaNs on either side of an array: reading them spoils a result, writing them shows."""
OK, TENSOR_COUNT, DTYPE, SHAPE = range(4)
"""What the functions return, `Status` of model/native/abi.h."""
CUDA_ERROR = 1000
"""CUDA's own errors are added to this."""


def guarded(array: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """A larger array of NaN, and a copy of the array inside it, `shift` elements behind a multiple of 64 bytes."""
    blank = np.nan if array.dtype.kind == "f" else -1
    whole = np.full(array.size + 2 * GUARD + shift + 64, blank, array.dtype)
    start = -whole.ctypes.data % 64 // array.itemsize + GUARD + shift
    inner = whole[start : start + array.size].reshape(array.shape)
    inner[...] = array
    return whole, inner


def call(
    library: ctypes.CDLL,
    name: str,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[int, ...]],
    shift: int = 0,
    dtypes: Sequence[DTypeLike] | None = None,
) -> tuple[int, Sequence[np.ndarray]]:
    """Call a function with outputs of these shapes and dtypes, float32; returns its status and the outputs."""
    blank = [
        np.full(shape, np.nan, dtype)
        for shape, dtype in zip(outputs, dtypes or [np.float32] * len(outputs), strict=True)
    ]
    wholes, arrays = zip(*(guarded(array, shift) for array in (*inputs, *blank)), strict=True)
    count = len(arrays)
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    status = getattr(library, name)(
        count,
        (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
        (ctypes.c_int * count)(*(array.ndim for array in arrays)),
        (ctypes.POINTER(ctypes.c_int64) * count)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes)),
        (ctypes.c_char_p * count)(*(array.dtype.name.encode() for array in arrays)),
        None,
        None,
    )
    for whole, array in zip(wholes, arrays, strict=True):
        if array.dtype.kind == "f":
            assert np.isnan(whole).sum() == whole.size - array.size + np.isnan(array).sum()
    return status, arrays[len(inputs) :]


def results(
    library: ctypes.CDLL,
    name: str,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[int, ...]],
    shift: int = 0,
    dtypes: Sequence[DTypeLike] | None = None,
) -> Sequence[np.ndarray]:
    """The outputs of a call that must succeed."""
    status, arrays = call(library, name, inputs, outputs, shift, dtypes)
    assert status == OK
    return arrays


def check_refusals(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    """Calls with wrong counts, dtypes, ranks and shapes return a status and print one line that says what is wrong."""
    features = np.zeros((1, 2, 3, 4), np.float32)
    costs, flow = np.zeros((1, 81, 3, 4), np.float32), np.zeros((1, 2, 3, 4), np.float32)
    half = features.astype(np.float16)
    for name, inputs, outputs, expected, message in [
        ("CostVolume", (features,), [costs.shape], TENSOR_COUNT, "2 tensors, expected 3"),
        ("CostVolume", (features, half), [costs.shape], DTYPE, "features2 is float16, expected float32"),
        (
            "CostVolume",
            (features, features[:, 1:]),
            [costs.shape],
            SHAPE,
            "features2 has shape (1, 1, 3, 4), expected (1, 2, 3, 4)",
        ),
        (
            "CostVolume",
            (features, features[0]),
            [costs.shape],
            SHAPE,
            "features2 has shape (2, 3, 4), expected (1, 2, ",
        ),
        (
            "CostVolume",
            (features, features),
            [(1, 49, 3, 4)],
            SHAPE,
            "costs has shape (1, 49, 3, 4), expected (1, 81, 3, 4)",
        ),
        (
            "CostVolumeGradient",
            (features, features, costs, costs[:, :49]),
            [features.shape] * 2,
            SHAPE,
            "gradient has shape (1, 49, 3, 4)",
        ),
        ("Warp", (features, flow.astype(np.float16)), [features.shape], DTYPE, "flow is float16"),
        ("Warp", (features.astype(np.float64), flow), [features.shape], DTYPE, "features is float64"),
        ("Warp", (features, costs), [features.shape], SHAPE, "flow has shape (1, 81, 3, 4), expected (1, 2, 3, 4)"),
        ("WarpGradient", (features, flow), [features.shape] * 2, TENSOR_COUNT, "4 tensors, expected 5"),
    ]:
        assert call(library, name, inputs, outputs)[0] == expected
        line = capfd.readouterr().err
        assert line.startswith(f"{name}: ") and line.count("\n") == 1 and message in line, line
