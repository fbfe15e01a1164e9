"""The key/value cache: dtypes, sizes, copies, and blocks outside the pool."""

from __future__ import annotations

import numpy as np
import pytest
from op_attention import Rows, through_int8
from op_backends import Array, numbers, put
from paged import Paged, host_batch

from vllmlite.backends.base import Backend, KVSpec, Rope, SlotSpec
from vllmlite.errors import BackendError


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_cache_in_sixteen_bits(exact: Backend, kv_dtype: str) -> None:
    # The numbers fit either dtype, so only the conversion is tested.
    rows = Rows(exact, 4, 2, 16, 4, kv_dtype=kv_dtype)
    rows.admit(0)
    rows.admit(1)
    rows.step([0, 1], [3, 11])
    rows.step([0, 1], [1, 1])


def test_the_int8_cache_quantises_rotated_keys(exact: Backend) -> None:
    """The rotary table rotates nothing and doubles some elements, so that every code is known exactly."""
    rows = Rows(exact, 6, 2, 32, 4, kv_dtype="int8", max_context=60)
    rows.table = np.concatenate(
        (2.0 ** (np.arange(60)[:, None] % 3 * np.arange(16) % 4), np.zeros((60, 16))), 1
    )
    rows.rope = Rope(exact.tensor(rows.table.astype(np.float32)), 32)
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


def test_int8_of_extreme_heads(exact: Backend) -> None:
    """The attention of a single token is its value: tested with zeros, subnormal and huge numbers; what is not finite
    stays so."""
    paged = Paged(exact, KVSpec(1, 2, 24, 4, "int8"))
    values = numbers((7, 2, 24))
    values *= np.array([0, 1e-44, 1e-39, 1e-30, 1, 1e30, 1])[:, None, None]
    values[6, 0, 5], values[6, 1, 9] = np.nan, -np.inf
    for slot in range(7):
        paged.admit(slot)
    batch = paged.upload(paged.batch(range(7), [1] * 7))
    qkv = np.concatenate((numbers((7, 4, 24), 1), values), 1)
    q = exact.attn_prep(put(exact, qkv.reshape(7, -1)), 2, None, paged.kv, 0, batch)
    found = exact.to_host(exact.paged_attention(q, paged.kv, 0, batch, 0.25)).reshape(7, 2, 24)
    np.testing.assert_allclose(found[:6], through_int8(values[:6]), rtol=1e-6, atol=0)
    assert (np.abs(found[:2]) <= 2**-126).all()
    assert not np.isfinite(found[6]).any()


def test_cache_size(exact: Backend) -> None:
    assert exact.kv_bytes_per_block(KVSpec(3, 2, 16, 4, "bfloat16")) == 3 * 2 * 2 * 16 * 4 * 2
    if "int8" in exact.kv_dtypes:
        assert exact.kv_bytes_per_block(KVSpec(3, 2, 16, 4, "int8")) == 3 * 2 * 2 * (16 + 4) * 4
    spec = KVSpec(3, 2, 16, 4, "float32")
    with pytest.raises(BackendError, match="free"):
        exact.alloc_kv(spec, exact.memory().total // exact.kv_bytes_per_block(spec) + 1)


def test_cache_dtypes(exact: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dtype: str) -> None:
        accepted = ", ".join(exact.kv_dtypes)
        with pytest.raises(
            BackendError, match=f"kv cache dtype {dtype}: the {exact.name} backend has {accepted}$"
        ):
            exact.alloc_kv(KVSpec(3, 2, 16, 4, dtype), 1)

    refused("int4")
    monkeypatch.setattr(type(exact), "kv_dtypes", Backend.kv_dtypes)
    refused("int8")


@pytest.mark.parametrize(
    ("slot", "column", "block", "complaint"),
    [
        (1, 7, 40, "block 40 is not within 0 and 39"),
        (1, 7, -1, "block -1 is not within 0 and 39"),
        (1, 8, 0, "block table column 8 is not within 0 and 7"),
        (4, 0, 0, "slot 4 is not within 0 and 3"),
    ],
)
def test_blocks_outside_the_pool_are_refused(
    exact: Backend, slot: int, column: int, block: int, complaint: str
) -> None:
    """Nothing of the call is written: the row's own block keeps its contents."""
    spec = KVSpec(1, 2, 16, 4, "float32")
    kv, slots = exact.alloc_kv(spec, 40), exact.alloc_slots(SlotSpec(4, 8, 32, 10, 40))

    def append(*entries: tuple[int, int, int]) -> None:
        exact.append_blocks(slots, *(np.array(part, np.int32) for part in zip(*entries, strict=True)))

    def attend(start: int, count: int) -> Array:
        batch = exact.upload(host_batch([0], [start], [count]), slots, spec)
        qkv = numbers((3, 6 * 16))[start : start + count]
        q = exact.attn_prep(put(exact, qkv), 2, None, kv, 0, batch)
        return exact.to_host(exact.paged_attention(q, kv, 0, batch, 0.25))

    append((0, 0, 39))
    whole = attend(0, 3)
    attend(0, 2)
    with pytest.raises(IndexError, match=complaint):
        append((0, 0, 5), (slot, column, block))
    np.testing.assert_allclose(attend(2, 1), whole[2:], rtol=0, atol=1e-6)
