"""The backends that the op tests run on, and the comparison of their results with float64.

A new backend is added to ``BACKENDS``. Without torch, as on the machines that build only the native backend's package,
the reference backend is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from paged import host_tensor

from vllmlite.backends.base import Backend
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.native import load_extension
from vllmlite.errors import BackendError
from vllmlite.weights.host import HostTensor

Array = NDArray[Any]

BACKENDS: dict[str, Callable[[str], Backend]] = {}
HAS_TORCH = find_spec("torch") is not None
of_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


def reference(device: str) -> Callable[[str], Backend]:
    from vllmlite.backends.torch import TorchBackend

    return lambda dtype: TorchBackend(device, dtype)


def native(isa: str) -> Callable[[str], Backend]:
    return lambda dtype: CpuBackend(dtype, isa=isa)


def cuda(dtype: str) -> Backend:
    try:
        return CudaBackend("cuda", dtype)
    except BackendError as error:
        pytest.skip(str(error))


def invariant(dtype: str) -> Backend:
    try:
        return CudaBackend("cuda", dtype, batch_invariant=True)
    except BackendError as error:
        pytest.skip(str(error))


BACKENDS["cuda"] = cuda
BACKENDS["cuda-invariant"] = invariant
if HAS_TORCH:
    import torch

    BACKENDS["torch-cpu"] = reference("cpu")
    if torch.cuda.is_available():
        BACKENDS["torch-cuda"] = reference("cuda")
SLOW: set[str] = set()
"""Backends whose tests are marked slow: instruction sets between the baseline and the best that this CPU has."""
try:
    names = [f"cpu-{isa}" for isa in load_extension("_cpu").instruction_sets()]
    BACKENDS |= {name: native(name.removeprefix("cpu-")) for name in names}
    SLOW |= {*names[1:-1]}
except BackendError as error:
    warnings.warn(f"the cpu backend is not tested: {error}", stacklevel=1)


def parameters(*dtypes: str) -> list[Any]:
    """The names of all backends as test parameters, each combined with ``-`` and each of ``dtypes`` if given."""
    return [
        pytest.param(name + suffix, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in BACKENDS
        for suffix in ([f"-{dtype}" for dtype in dtypes] or [""])
    ]


ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of rounding to a dtype."""
TOLERANCE = {"float32": 1e-5, "float16": 8 * 2.0**-11, "bfloat16": 8 * 2.0**-8}
"""Largest error of a row, as a part of its largest element: in 16 bits a few roundings, in float32 another order of
sums."""


def numbers(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Array:
    """Normally distributed numbers that every float dtype holds exactly."""
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return (
        (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000))
        .view(np.float32)
        .astype(np.float64)
    )


def put(backend: Backend, values: Array) -> Any:
    return backend.tensor(np.ascontiguousarray(values, np.float32), backend.dtype)


def host(backend: Backend, values: Array) -> HostTensor:
    return host_tensor(values, backend.dtype)


def check(backend: Backend, found: Any, expected: Array, bound: Array | None = None) -> None:
    """Check that each element differs by at most ``bound``, by default ``TOLERANCE`` of the largest of its row (the
    last axis)."""
    array = backend.to_host(found)
    assert array.shape == expected.shape
    if bound is None:
        bound = TOLERANCE[backend.dtype] * np.abs(expected).max(-1, keepdims=True, initial=0)
    excess = np.abs(array.astype(np.float64) - expected) - bound
    at = np.unravel_index(excess.argmax(), excess.shape) if excess.size else ()
    assert excess.max(initial=-1) <= 0, f"{array[at]} at {at} is too far from {expected[at]}"
