"""attn_prep: norms, rotary embedding, and writing keys and values to the cache."""

from __future__ import annotations

import numpy as np
import pytest
from op_attention import Rows, rotated
from op_backends import check, numbers, put

from vllmlite.backends.base import Backend, Rope


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 12])
@pytest.mark.parametrize("norms", [None, "backend", "float32"])
def test_attn_prep(backend: Backend, interleaved: bool, rotary_dim: int, norms: str | None) -> None:
    rows = Rows(backend, 6, 2, 32, 4, max_context=60)
    if norms == "float32":
        rows.norm_dtype = norms
    angles = np.arange(60)[:, None] / 3 ** np.arange(rotary_dim // 2)
    rows.table = np.concatenate((np.cos(angles), np.sin(angles)), 1)
    rows.rope = Rope(backend.tensor(rows.table.astype(np.float32)), rotary_dim, interleaved)
    rows.interleaved = interleaved
    if norms:
        rows.norms = (numbers((32,), 100), numbers((32,), 101))
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


@pytest.mark.parametrize("size", [32, 24])
def test_norms_over_all_heads(backend: Backend, size: int) -> None:
    rows = Rows(backend, 6, 2, size, 4, max_context=60)
    angles = np.arange(60)[:, None] / 3 ** np.arange(size // 2)
    rows.table = np.concatenate((np.cos(angles), np.sin(angles)), 1)
    rows.rope = Rope(backend.tensor(rows.table.astype(np.float32)), size)
    rows.norms = (numbers((6 * size,), 100), numbers((2 * size,), 101))
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


def test_layer_norms_of_heads(backend: Backend) -> None:
    if backend.name == "cuda":
        pytest.skip("the cuda backend has no layer norms of heads")
    rows = Rows(backend, 6, 2, 32, 4, max_context=60)
    angles = np.arange(60)[:, None] / 3 ** np.arange(16)
    rows.table = np.concatenate((np.cos(angles), np.sin(angles)), 1)
    rows.rope = Rope(backend.tensor(rows.table.astype(np.float32)), 32)
    rows.norms = (numbers((6, 32), 100), numbers((2, 32), 101))
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


def test_embedding_of_positions(exact: Backend) -> None:
    rows = Rows(exact, 4, 2, 16, 4)
    table = numbers((50, 24))
    for slot, count in ((0, 3), (1, 7)):
        rows.admit(slot)
        rows.step([slot], [count])
    batch = rows.paged.upload(rows.paged.batch([1, 0], [2, 4]))
    found = exact.embedding(batch.positions, exact.tensor(table.astype(np.float32)))
    check(exact, found, table[[7, 8, 3, 4, 5, 6]])


def test_two_ropes_in_one_step(exact: Backend) -> None:
    rows = Rows(exact, 4, 2, 16, 4, max_context=5)
    rows.admit(0)
    host_side = rows.paged.batch([0], [5])
    batch = rows.paged.upload(host_side)
    qkv = numbers((5, 8, 16))
    for base in (3.0, 7.0, 3.0):
        angles = np.arange(5)[:, None] / base ** np.arange(8)
        table = np.concatenate((np.cos(angles), np.sin(angles)), 1)
        rope = Rope(exact.tensor(table.astype(np.float32)), 16)
        q = exact.attn_prep(put(exact, qkv.reshape(5, -1)), 4, rope, rows.paged.kv, 0, batch)
        check(exact, q, rotated(qkv[:, :4], table, False))
