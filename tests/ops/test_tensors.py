"""Tensors to and from a backend."""

from __future__ import annotations

import numpy as np
import pytest
from op_backends import check, numbers, put
from paged import host_tensor

from vllmlite.backends.base import Backend
from vllmlite.weights.host import FLOAT_DTYPES, HostTensor


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_tensors_round_trip(exact: Backend, dtype: str) -> None:
    values = (numbers((5, 3), 1) * 3).astype(dtype)
    for given in (values, host_tensor(values, dtype)):
        found = exact.to_host(exact.tensor(given))
        assert found.dtype == values.dtype
        assert (found == values).all()


def test_tensor_converts(backend: Backend) -> None:
    values = numbers((4, 6))
    for dtype in FLOAT_DTYPES:
        check(backend, backend.tensor(host_tensor(values, dtype), backend.dtype), values)
    assert backend.to_host(backend.tensor(host_tensor(values, "bfloat16"))).dtype == np.float32


def test_read_only_memory_gives_no_warning(exact: Backend, recwarn: pytest.WarningsRecorder) -> None:
    data = np.frombuffer(numbers((8,)).astype("<f4").tobytes(), np.uint8)
    assert not data.flags.writeable
    exact.tensor(HostTensor("float32", (8,), data))
    assert not list(recwarn)


def test_empty_and_scalar_shapes(exact: Backend) -> None:
    assert exact.to_host(exact.empty((0, 3), "float32")).shape == (0, 3)
    assert exact.to_host(exact.tensor(host_tensor(np.zeros((), np.float32)))).shape == ()
    assert exact.to_host(exact.tensor(host_tensor(np.zeros((2, 0), np.float32)))).shape == (2, 0)


def test_rows_copies(backend: Backend) -> None:
    values = numbers((6, 4))
    index = np.array([5, 0, 5], np.int32)
    check(backend, backend.rows(put(backend, values), backend.tensor(index)), values[index])


def test_reported_memory_is_plausible(exact: Backend) -> None:
    memory = exact.memory()
    assert 0 < memory.free <= memory.total
