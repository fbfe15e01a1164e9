"""Attention over the paged cache."""

from __future__ import annotations

import numpy as np
import pytest
from op_attention import Rows
from op_backends import BACKENDS, numbers, of_torch, parameters, put, reference
from paged import Paged

from vllmlite.backends.base import Backend
from vllmlite.backends.kv_cache import QUANTIZED_KV, KVSpec
from vllmlite.weights.host import FLOAT_DTYPES

STEPS: list[tuple[list[int], list[int]]] = [
    ([0], [1]),
    ([1], [9]),
    ([2, 3, 4], [17, 5, 16]),
    ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1]),
    ([4, 0, 3, 5, 1, 2], [1, 6, 1, 40, 3, 33]),
    ([5, 2, 6, 0], [1, 1, 8, 70]),
    ([6, 5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1, 1]),
    ([0], [3]),
]
"""Slots and their tokens: single and mixed, decode and ragged prefill, with context and without."""


shapes = pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block"), [(4, 4, 16, 16), (6, 2, 32, 4), (8, 1, 24, 1), (2, 1, 256, 16)]
)


@shapes
def test_attention_with_windows(
    backend: Backend, heads: int, kv_heads: int, size: int, block: int, kv_dtype: str | None = None
) -> None:
    rows = Rows(
        backend,
        heads,
        kv_heads,
        size,
        block,
        num_blocks=-(-400 // block),
        kv_dtype=kv_dtype or backend.dtype,
    )
    for slot in range(7):
        rows.admit(slot)
    for slots, counts in STEPS:
        rows.step(slots, counts, (None, 1, 5, 32, 1000))


@shapes
def test_attention_over_int8(backend: Backend, heads: int, kv_heads: int, size: int, block: int) -> None:
    test_attention_with_windows(backend, heads, kv_heads, size, block, "int8")


@pytest.mark.parametrize(
    ("soft_cap", "biased", "kv_heads"), [(1.5, False, 2), (None, True, 6), (2.0, True, 1)]
)
def test_attention_with_edited_scores(
    backend: Backend, soft_cap: float | None, biased: bool, kv_heads: int
) -> None:
    rows = Rows(backend, 6, kv_heads, 32, 4)
    rows.soft_cap, rows.alibi = soft_cap, 2.0 ** -np.arange(6) if biased else None
    for slot in range(7):
        rows.admit(slot)
    for slots, counts in STEPS:
        rows.step(slots, counts, (None, 5))


@pytest.mark.parametrize(("kv_heads", "kv_dtype"), [(2, None), (6, None), (1, "int8")])
def test_attention_with_sinks(exact: Backend, kv_heads: int, kv_dtype: str | None) -> None:
    """Sinks below, among and above the scores, and one without effect."""
    if exact.name == "cuda":
        pytest.skip("the cuda backend does not have attention sinks")
    rows = Rows(exact, 6, kv_heads, 32, 4, kv_dtype=kv_dtype or exact.dtype)
    rows.sinks = np.array([-4.0, 0.0, 0.5, 3.0, 20.0, -1e30])
    for slot in range(7):
        rows.admit(slot)
    for slots, counts in STEPS:
        rows.step(slots, counts, (None, 5))


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3"])
def test_edited_scores_over_quantised_caches_and_long_contexts(exact: Backend, kv_dtype: str) -> None:
    edited_scores(exact, kv_dtype)


def edited_scores(backend: Backend, kv_dtype: str) -> None:
    scales = () if QUANTIZED_KV[kv_dtype].head_scales else ((1.0, 1.0), (0.03, 2.5))
    rows = Rows(backend, 4, 2, 16, 16, num_blocks=64, kv_dtype=kv_dtype, scales=scales)
    rows.soft_cap, rows.alibi = 3.0, np.array([0.5, 0.25, 0.01, 0.001])
    rows.admit(0)
    rows.step([0], [300])
    rows.step([0], [1])


def test_many_query_heads_per_key_head(backend: Backend) -> None:
    rows = Rows(backend, 71, 1, 16, 16)
    rows.admit(0)
    rows.admit(1)
    rows.step([0, 1], [40, 3])
    rows.step([0, 1], [1, 1])


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "fp8_e4m3"])
def test_attention_over_long_and_short_contexts(exact: Backend, kv_dtype: str) -> None:
    long_and_short_contexts(exact, (4, 2, 16), kv_dtype)


def long_and_short_contexts(backend: Backend, shape: tuple[int, int, int], kv_dtype: str) -> None:
    """``shape``: query heads, key/value heads, head size."""
    rows = Rows(backend, *shape, 16, num_blocks=96, kv_dtype=kv_dtype)
    for slot, length in enumerate((700, 300, 2, 30)):
        rows.admit(slot)
        rows.step([slot], [length])
    rows.step([0, 1, 2, 3], [1, 1, 1, 1], (None, 20, 256))
    rows.step([3, 2, 1, 0], [2, 1, 50, 60], (None, 20, 256))


@pytest.mark.parametrize("name", ["cuda", "cuda-invariant"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv_dtype", QUANTIZED_KV)
@pytest.mark.parametrize("shape", [(4, 2, 16), (8, 2, 64), (6, 2, 72), (8, 2, 128), (3, 1, 256)])
def test_quantised_caches_in_16_bits(
    name: str, dtype: str, kv_dtype: str, shape: tuple[int, int, int]
) -> None:
    """The tensor-core kernels, which differ by the size of heads and by the format of the cache."""
    backend = BACKENDS[name](dtype)
    long_and_short_contexts(backend, shape, kv_dtype)
    edited_scores(backend, kv_dtype)


@pytest.mark.parametrize(("size", "block"), [(64, 16), (80, 32), (128, 16)])
def test_attention_of_many_queries(backend: Backend, size: int, block: int) -> None:
    rows = Rows(backend, 4, 2, size, block, num_blocks=96)
    for slot in range(3):
        rows.admit(slot)
    rows.step([0, 1, 2], [1, 300, 129], (None, 150))
    rows.step([2, 0, 1], [260, 70, 1], (None, 150, 20))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 64), (4, 1, 128), (4, 2, 256)])
def test_attention_over_very_long_contexts(backend: Backend, heads: int, kv_heads: int, size: int) -> None:
    if backend.device == "cpu":
        pytest.skip("too long for a CPU")
    rows = Rows(backend, heads, kv_heads, size, 16, num_blocks=2600)
    lengths = (32000, 4097, 1, 2047, 300)
    for slot, length in enumerate(lengths):
        rows.admit(slot)
        for begin in range(0, length, 4000):
            rows.write([slot], [min(4000, length - begin)])
    slots = list(range(len(lengths)))
    for _ in range(2):
        rows.step(slots, [1] * len(slots), (None, 20, 5000))
    rows.step(slots, [1, 3, 1, 70, 1], (None, 5000))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 2, 32), (6, 6, 80), (14, 2, 64), (8, 1, 128), (16, 2, 256)]
)
def test_attention_of_few_queries(backend: Backend, heads: int, kv_heads: int, size: int) -> None:
    """Steps of 1 to 9 tokens a row, of as many in every row and of unequal numbers, with windows and edited scores."""
    on_cpu = backend.device == "cpu"
    if on_cpu and size > 32:
        pytest.skip("kernels for other sizes are for a GPU")
    rows = Rows(backend, heads, kv_heads, size, 16, num_blocks=96)
    for slot, length in enumerate((100 if on_cpu else 600, 63, 1, 130)):
        rows.admit(slot)
        rows.write([slot], [length])
    for count in (2, 3, 8, 9) if on_cpu else range(1, 10):
        rows.soft_cap = 2.0 if count % 3 == 0 else None
        rows.alibi = 2.0 ** -np.arange(heads) if count % 4 == 0 else None
        rows.step([0, 1, 2, 3], [count] * 4, (None, 70))
    rows.step([3, 0, 2, 1], [2, 9, 1, 5], (None, 70))


@pytest.mark.parametrize("place", parameters(*FLOAT_DTYPES))
@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("window", [None, 50])
def test_a_position_alone_equals_it_among_several(place: str, size: int, window: int | None) -> None:
    """Bit for bit, where the backend promises it: the same tokens one at a time and 1 to 9 at a time."""
    name, dtype = place.rsplit("-", 1)
    if name.startswith("torch") or (name == "cuda" and dtype != "float32"):
        pytest.skip("its sums may depend on the number of tokens")
    backend = BACKENDS[name](dtype)
    paged = Paged(backend, KVSpec(1, 2, size, 16, backend.dtype), max_slots=3)
    qkv = numbers((145, 12 * size), 4)

    def feed(slot: int, begin: int, count: int) -> list[bytes]:
        batch = paged.upload(paged.batch([slot], [count]))
        q = backend.attn_prep(put(backend, qkv[begin : begin + count]), 8, None, paged.kv, 0, batch)
        found = backend.to_host(backend.paged_attention(q, paged.kv, 0, batch, 0.2, window, 3.0))
        return [row.tobytes() for row in found]

    found: list[list[bytes]] = []
    for slot, counts in enumerate(([1] * 45, range(1, 10))):
        paged.admit(slot)
        feed(slot, 0, 100)
        begins = 100 + np.cumsum([0, *counts])
        found.append(
            [row for begin, count in zip(begins, counts, strict=False) for row in feed(slot, begin, count)]
        )
    assert found[0] == found[1]


def test_attention_in_chunks(exact: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hardly any memory allowed, the reference backend splits groups and rows; the result stays the same."""
    if exact.name != "torch":
        pytest.skip("a limit of the reference")
    monkeypatch.setattr("vllmlite.backends.torch_attention.LIMIT", 20000)
    monkeypatch.setattr("vllmlite.backends.torch_attention._KEEP_MASK", 0)
    test_attention_with_windows(exact, 6, 2, 32, 4)


@of_torch
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_attention_computed_in_float32(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for attends in (True, False):
        monkeypatch.setattr("vllmlite.backends.torch._attends", lambda dtype, attends=attends: attends)
        test_attention_with_windows(reference("cpu")(dtype), 6, 2, 32, 4)


def test_a_reused_slot_forgets_its_last_sequence(exact: Backend) -> None:
    rows = Rows(exact, 4, 2, 16, 4)
    rows.admit(0)
    rows.admit(1)
    rows.step([0, 1], [30, 9])
    rows.admit(0)
    rows.step([1, 0], [1, 5])
    rows.step([0, 1], [1, 1])
