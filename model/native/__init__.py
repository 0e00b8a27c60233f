"""The project's own operators, compiled on first use: cost volume, warping and 3x3 convolution.

On GPUs, the convolution is MindSpore's, and only the bias and the LeakyReLU behind it are an operator here.

`cpu/` is C++ (convolutions also with oneDNN), `cuda/` is CUDA for NVIDIA GPUs; `build.py` compiles and loads them.
"""

import ctypes
from collections.abc import Callable
from typing import Any

from model.native import build


def available() -> bool:
    """Whether the operators can be used on MindSpore's current device; builds them if necessary."""
    return build.load_library(_device()) is not None


def has_operator(name: str) -> bool:
    """Whether the library for MindSpore's current device has this operator."""
    return hasattr(build.load_library(_device()), name)


def has_bfloat16() -> bool:
    """Whether the native convolutions can compute in bfloat16 on this processor, and not slower than in float32."""
    return has_operator("has_bfloat16") and bool(function("has_bfloat16", ctypes.c_int)())


def estimator_block(bfloat16: bool) -> int:
    """Channels in a block of the native flow estimator's features.

    0 if there is no such estimator: oneDNN must use blocked layouts on this processor.
    """
    return function("estimator_block", ctypes.c_int)(int(bfloat16)) if has_operator("estimator_block") else 0


def measure_peak(bfloat16: bool) -> float | None:
    """Floating-point operations in a second of a convolution that suits the processor; None without a native one."""
    return function("measure_peak", ctypes.c_double)(int(bfloat16)) if has_operator("measure_peak") else None


def function(name: str, result: Any) -> Callable[..., Any]:
    """A function of the library that is not an operator of a graph; `result` is its ctypes type.

    Raises:
        build.BuildError: the library for MindSpore's current device has no such function.
    """
    found = getattr(build.load_library(_device()), name, None)
    if found is None:
        raise build.BuildError(f"no function {name} for {_device()}")
    found.restype = result
    return found


def operator(name: str, infer_shape: Callable, infer_dtype: Callable, bprop: Callable | None = None) -> Any:
    """One of the operators, for use in a graph.

    Args:
        name: the exported function's.
        infer_shape: the inputs' shapes to the output's shape, or to a tuple of them.
        infer_dtype: the inputs' dtypes to the output's dtype, or to a tuple of them.
        bprop: (*inputs, output, gradient) to the gradients of the inputs. In a graph, MindSpore uses one of those with
            the same name for all operators of that name.

    Returns:
        A `mindspore.ops.Custom`.

    Raises:
        build.BuildError: the library for MindSpore's current device has no such operator.
    """
    from mindspore import ops

    library = build.load_library(_device())
    if library is None or not hasattr(library, name):
        raise build.BuildError(f"no operator {name} for {_device()}; use the backend mindspore")
    return ops.Custom(f"{library._name}:{name}", infer_shape, infer_dtype, "aot", bprop)


def _device() -> str:
    import mindspore

    return mindspore.get_context("device_target")
