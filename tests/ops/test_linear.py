"""Matrix products and the embedding."""

from __future__ import annotations

import numpy as np
import pytest
from op_backends import check, host, invariant, numbers, of_torch, put, reference

from vllmlite.backends.base import Backend
from vllmlite.weights.host import FLOAT_DTYPES


def test_embedding_and_tied_weight(backend: Backend) -> None:
    table = numbers((50, 64))
    weight = backend.tensor(host(backend, table), backend.dtype)
    ids = np.array([3, 49, 0, 3], np.int32)
    check(backend, backend.embedding(backend.tensor(ids), weight), table[ids])
    x = numbers((5, 64), 1)
    found = backend.logits(put(backend, x), backend.tied_weight(weight))
    assert backend.to_host(found).dtype == np.float32
    check(backend, found, x @ table.T)


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 70])
@pytest.mark.parametrize("biases", [False, True])
def test_linear(backend: Backend, num_tokens: int, biases: bool) -> None:
    x = numbers((num_tokens, 96))
    parts = [numbers((out, 96), out, 0.1) for out in (64, 32, 33)]
    bias = [numbers((len(part),), 9) for part in parts]
    weight = backend.linear_weight(
        [host(backend, p) for p in parts], [host(backend, b) for b in bias] if biases else ()
    )
    expected = x @ np.concatenate(parts).T + (np.concatenate(bias) if biases else 0)
    check(backend, backend.linear(put(backend, x), weight), expected)


@pytest.mark.parametrize("columns", [96, 512, 1032])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_batch_invariant_products(dtype: str, columns: int) -> None:
    backend = invariant(dtype)
    x = numbers((300, columns))
    weight = backend.linear_weight([host(backend, numbers((200, columns), 1, 0.1))])
    whole = backend.to_host(backend.linear(put(backend, x), weight))
    for first, last in ((0, 1), (7, 15), (3, 19), (40, 57), (100, 164), (30, 95), (290, 300)):
        part = backend.to_host(backend.linear(put(backend, x[first:last]), weight))
        assert (part == whole[first:last]).all()


@of_torch
def test_linear_in_dtypes_that_the_cpu_must_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmlite.backends.torch._blocked_layout_runs", lambda dtype: False)
    monkeypatch.setattr("vllmlite.backends.torch._multiplies", lambda dtype: False)
    monkeypatch.setattr("vllmlite.backends.torch._CONVERT_PART", 50)
    for dtype in FLOAT_DTYPES:
        test_linear(reference("cpu")(dtype), 16, True)
        test_linear(reference("cpu")(dtype), 15, False)


def test_linear_of_one_part(backend: Backend) -> None:
    x, part = numbers((4, 32)), numbers((48, 32), 1)
    check(backend, backend.linear(put(backend, x), backend.linear_weight([host(backend, part)])), x @ part.T)
