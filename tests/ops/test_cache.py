"""The key/value cache: dtypes, sizes, copies, and blocks outside the pool."""

from __future__ import annotations

import numpy as np
import pytest
from op_attention import CODES, Rows, through_cache
from op_backends import Array, numbers, put
from paged import Paged, host_batch

from vllmlite.backends.base import Backend, Rope
from vllmlite.backends.batch import SlotSpec
from vllmlite.backends.kv_cache import KV_DTYPES, QUANTIZED_KV, KVSpec
from vllmlite.errors import BackendError


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_cache_in_sixteen_bits(exact: Backend, kv_dtype: str) -> None:
    # The numbers fit either dtype, so only the conversion is tested.
    rows = Rows(exact, 4, 2, 16, 4, kv_dtype=kv_dtype)
    rows.admit(0)
    rows.admit(1)
    rows.step([0, 1], [3, 11])
    rows.step([0, 1], [1, 1])


@pytest.mark.parametrize("kv_dtype", QUANTIZED_KV)
@pytest.mark.parametrize("size", [32, 24])
def test_a_quantised_cache_quantises_rotated_keys(exact: Backend, kv_dtype: str, size: int) -> None:
    """The rotary table rotates nothing and doubles some elements, so that every code is known exactly."""
    scales = () if QUANTIZED_KV[kv_dtype].head_scales else ((1.0, 1.0), (0.03, 0.7))
    rows = Rows(exact, 6, 2, size, 4, kv_dtype=kv_dtype, scales=scales, max_context=60)
    rows.table = np.concatenate(
        (2.0 ** (np.arange(60)[:, None] % 3 * np.arange(size // 2) % 4), np.zeros((60, size // 2))), 1
    )
    rows.rope = Rope(exact.tensor(rows.table.astype(np.float32)), size)
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 2], [3, 11])
    rows.step([2, 1, 0], [1, 20, 1])


@pytest.mark.parametrize("kv_dtype", QUANTIZED_KV)
def test_every_code_of_a_quantised_cache(exact: Backend, kv_dtype: str) -> None:
    """The attention of a single token is its value: tested with all codes and numbers between them, at several scales,
    and beyond the largest."""
    form = QUANTIZED_KV[kv_dtype]
    codes = np.array(CODES[form.element])
    between = [codes[:-1] + part * np.diff(codes) for part in (0, 0.49, 0.5, 0.51)]
    values = np.concatenate((*between, [codes[-1]] * 4)) * (1.0 if form.head_scales else 0.375)
    if not form.head_scales:
        values = np.concatenate((values, [1.04 * values[-1], 1.1 * values[-1], 1e30, np.inf]))
    values = np.resize(np.concatenate((values, -values)).astype(np.float32), (47, 1, 24)).astype(np.float64)
    values[:, 0, 0] = codes[-1]  # makes a head's own scale 1
    spec = KVSpec(1, 1, 24, 16, kv_dtype, () if form.head_scales else ((1.0, 0.375),))
    paged = Paged(exact, spec, max_slots=len(values))
    np.testing.assert_array_equal(single(exact, paged, values), through_cache(values, spec, 0.375))
    if not form.head_scales:
        values[1, 0, 3] = np.nan
        expected = np.isnan(values)
        np.testing.assert_array_equal(np.isnan(single(exact, paged, values)), expected)


def single(backend: Backend, paged: Paged, values: Array) -> Array:
    """The attention of rows of one token each, whose value it is."""
    rows, heads, size = values.shape
    for slot in range(rows):
        paged.admit(slot)
    batch = paged.upload(paged.batch(range(rows), [1] * rows))
    qkv = np.concatenate((numbers((rows, 2 * heads, size), 1), values), 1)
    q = backend.attn_prep(put(backend, qkv.reshape(rows, -1)), heads, None, paged.kv, 0, batch)
    found: Array = backend.to_host(backend.paged_attention(q, paged.kv, 0, batch, 0.25))
    return found.reshape(rows, heads, size)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_per_token_head"])
def test_head_scales_of_extreme_heads(exact: Backend, kv_dtype: str) -> None:
    """The attention of a single token is its value: tested with zeros, subnormal and huge numbers; what is not finite
    stays so."""
    paged = Paged(exact, KVSpec(1, 2, 24, 4, kv_dtype))
    values = numbers((7, 2, 24))
    values *= np.array([0, 1e-44, 1e-39, 1e-30, 1, 1e30, 1])[:, None, None]
    values[6, 0, 5], values[6, 1, 9] = np.nan, -np.inf
    found = single(exact, paged, values)
    np.testing.assert_allclose(found[:6], through_cache(values[:6], paged.spec), rtol=1e-6, atol=0)
    assert (np.abs(found[:2]) <= 2**-126).all()
    assert not np.isfinite(found[6]).any()


def test_cache_size(exact: Backend) -> None:
    assert exact.kv_bytes_per_block(KVSpec(3, 2, 16, 4, "bfloat16")) == 3 * 2 * 2 * 16 * 4 * 2
    assert exact.kv_dtypes == KV_DTYPES
    for kv_dtype, form in QUANTIZED_KV.items():
        bytes_of_head = 16 + 4 * form.head_scales
        assert exact.kv_bytes_per_block(KVSpec(3, 2, 16, 4, kv_dtype)) == 3 * 2 * 2 * bytes_of_head * 4
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
