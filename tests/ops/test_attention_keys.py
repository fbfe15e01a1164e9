"""Attention reads every key: each query picks one key, so that a lost key is an error of order one.

Keys and values are codes of their positions. A query is the code of the key that it picks, large enough that all other
weights vanish. Rows share the blocks of one context, and each has a last block of its own.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from op_backends import BACKENDS, Array, put
from paged import Paged

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import SlotParams
from vllmlite.backends.kv_cache import QUANTIZED_KV, KVSpec
from vllmlite.weights.host import FLOAT_DTYPES


def codes(index: Array, size: int) -> Array:
    """The 16 low bits of each number as signs, repeated: ``[..., size]``."""
    return np.where(index[..., None] >> np.arange(size) % 16 & 1, 1.0, -1.0)


class Keys:
    """A context of ``length`` tokens in slot 0, whose blocks the other slots share."""

    def __init__(
        self, backend: Backend, heads: int, kv_heads: int, size: int, length: int, kv_dtype: str | None = None
    ) -> None:
        self.backend, self.heads, self.kv_heads, self.size, self.length = (
            backend,
            heads,
            kv_heads,
            size,
            length,
        )
        spec = KVSpec(1, kv_heads, size, 16, kv_dtype or backend.dtype)
        self.paged = Paged(
            backend, spec, num_blocks=length // 16 + 420, max_slots=48, max_context=length + 400
        )
        self.paged.admit(0)
        for begin in range(0, length, 2000):
            self.feed([0], [min(2000, length - begin)])
        self.shared = list(self.paged.owned[0])
        columns = np.arange(len(self.shared), dtype=np.int32)
        for slot in range(1, 48):
            backend.set_slot(self.paged.slots, slot, SlotParams())
            backend.append_blocks(
                self.paged.slots, np.full_like(columns, slot), columns, np.array(self.shared, np.int32)
            )

    def feed(self, slots: list[int], counts: list[int], picks: Array | None = None) -> tuple[Any, Any]:
        """The batch and queries of a step whose tokens pick the keys ``picks [tokens, heads]``."""
        host = self.paged.batch(slots, counts)
        batch = self.paged.upload(host)
        if picks is None:
            picks = np.zeros((host.num_tokens, self.heads), np.int64)
        positions = host.positions.astype(np.int64)[:, None]
        heads = np.arange(self.kv_heads)
        keys = np.repeat(codes(positions, self.size), self.kv_heads, 1)
        qkv = np.concatenate((16 * codes(picks, self.size), keys, self.value(positions, heads)), 1)
        q = self.backend.attn_prep(
            put(self.backend, qkv.reshape(host.num_tokens, -1)), self.heads, None, self.paged.kv, 0, batch
        )
        return batch, q

    def value(self, position: Array, kv_head: Array) -> Array:
        values: Array = codes(position * 7 + 3, self.size) * (1 + kv_head[..., None])
        return values

    def check(self, slots: list[int], count: int, picks: Array, window: int | None = None) -> None:
        """Check a step of ``count`` tokens for each of ``slots``, which continue the shared context."""
        for slot in slots:
            self.paged.free += self.paged.owned[slot][len(self.shared) :]
            self.paged.owned[slot], self.paged.lengths[slot] = list(self.shared), self.length
        batch, q = self.feed(slots, [count] * len(slots), picks)
        found = self.backend.to_host(self.backend.paged_attention(q, self.paged.kv, 0, batch, 1.0, window))
        expected = self.value(picks, np.arange(self.heads) * self.kv_heads // self.heads)
        wrong = np.abs(found.reshape(expected.shape) - expected).max(-1) > 0.05
        assert not wrong.any(), f"keys {np.unique(picks[wrong])} are lost at a context of {self.length}"


def boundaries(length: int, unit: int) -> Array:
    """Positions next to multiples of ``unit``, and the last positions."""
    near = np.arange(0, length, unit)[:, None] + np.array([-1, 0, 1])
    return np.unique(near[(near >= 0) & (near < length)])


SHAPES = [(8, 1, 64), (6, 2, 24)]
MORE_SHAPES = [(8, 2, 16), (12, 3, 80), (16, 2, 128), (4, 2, 256)]
"""Further shapes for GPUs, which are fast, and which have several kernels by size."""
cases = pytest.mark.parametrize(
    ("name", "dtype", "shape", "kv_dtype"),
    [
        pytest.param(name, dtype, shape, None, id=f"{name}-{dtype}-{shape}")
        for name in BACKENDS
        for dtype in FLOAT_DTYPES
        for shape in SHAPES + MORE_SHAPES * ("cuda" in name)
    ]
    + [
        pytest.param(name, "bfloat16", shape, kv_dtype, id=f"{name}-bfloat16-{shape}-{kv_dtype}")
        for name, shapes, kv_dtypes in (
            ("cuda", [(12, 3, 80), (16, 2, 128)], QUANTIZED_KV),
            ("cuda", [(8, 1, 64), (4, 2, 256)], ("int8", "fp8_e4m3")),
            ("cuda-invariant", [(16, 2, 128)], ("int8",)),
        )
        for shape, kv_dtype in product(shapes, kv_dtypes)
    ],
)


@cases
def test_decoding_loses_no_key(
    name: str, dtype: str, shape: tuple[int, int, int], kv_dtype: str | None
) -> None:
    """Rows of one token: a context is split among many thread blocks if rows are few, hardly if they are many."""
    backend = BACKENDS[name](dtype)
    heads, lengths = shape[0], [320] if backend.device == "cpu" else [640, 33008]
    for length in lengths:
        keys = Keys(backend, *shape, length, kv_dtype)
        for rows in (1, 20) if length < 1000 else (1, 3, 40):
            slots = list(range(1, rows + 1))
            wanted = boundaries(length + 1, 16 if length < 1000 else 64)
            if rows == 1:
                wanted = wanted[:: -(-len(wanted) // 400)]
            for at in range(0, len(wanted), rows * heads):
                keys.check(slots, 1, np.resize(wanted[at : at + rows * heads], (rows, heads)))
            for window in (1, 17, 64, 100, 257):
                first = length + 1 - window
                picks = np.resize([first, length, first + window // 2], (rows, heads))
                keys.check(slots, 1, picks, window)


@cases
def test_prefilling_loses_no_key(
    name: str, dtype: str, shape: tuple[int, int, int], kv_dtype: str | None
) -> None:
    """Rows of several tokens, whose queries pick keys up to their own position, and the first key of a window."""
    backend, length, heads = BACKENDS[name](dtype), 320, shape[0]
    keys = Keys(backend, *shape, length, kv_dtype)
    wanted = boundaries(length, 16)
    for count in (2, 140) if backend.device == "cpu" else (2, 33, 130, 390):
        positions = length + np.tile(np.arange(count), 2)[:, None]
        order = np.arange(2 * count * heads).reshape(2 * count, heads)
        keys.check([1, 2], count, wanted[order % len(wanted)])
        keys.check([1, 2], count, positions - order % np.minimum(positions - length + 1, 200))
        for window in (1, 17, 64, 129):
            keys.check([1, 2], count, positions - np.array([0, window - 1])[order % 2], window)


@cases
def test_few_queries_lose_no_key(
    name: str, dtype: str, shape: tuple[int, int, int], kv_dtype: str | None
) -> None:
    """Rows of 2 to 9 tokens at the end of a context, as when drafts are verified: the last keys are seen by some of a
    row's queries alone."""
    backend, heads = BACKENDS[name](dtype), shape[0]
    for length in [320] if backend.device == "cpu" else [640, 33008]:
        keys = Keys(backend, *shape, length, kv_dtype)
        wanted = boundaries(length, 16 if length < 1000 else 64)
        for count in (2, 9) if backend.device == "cpu" else range(2, 10):
            for slots in ([1], [1, 2, 3]) if length < 1000 else ([1], list(range(1, 41))):
                size = len(slots) * count
                positions = length + np.tile(np.arange(count), len(slots))[:, None]
                order = np.arange(size * heads).reshape(size, heads)
                keys.check(slots, count, wanted[order * 7 % len(wanted)])
                keys.check(slots, count, positions - order % np.minimum(positions + 1, 70))
                for window in (1, 5, 64, 100):
                    keys.check(slots, count, positions - np.array([0, window - 1])[order % 2], window)


@pytest.mark.parametrize("kv_dtype", [*QUANTIZED_KV, "float16"])
def test_other_caches_lose_no_key(exact: Backend, kv_dtype: str) -> None:
    keys = Keys(exact, 8, 2, 32, 320, kv_dtype)
    wanted = boundaries(321, 16)
    for at in range(0, len(wanted), 24):
        keys.check([1, 2, 3], 1, np.resize(wanted[at : at + 24], (3, 8)))
    keys.check([1], 130, np.resize(boundaries(320, 16), (130, 8)))


def test_a_lost_key_is_noticed(exact: Backend) -> None:
    """A test of this module: a key that is overwritten by its neighbour's is reported, and no other."""
    keys = Keys(exact, 8, 2, 32, 640)
    keys.paged.batch([0], [1])
    columns = np.array([20], np.int32)
    keys.backend.append_blocks(
        keys.paged.slots, np.ones_like(columns), columns, np.array(keys.shared[19:20], np.int32)
    )
    keys.check([1], 1, np.array([[0, 319, 336, 600, 500, 100, 150, 640]]))
    with pytest.raises(AssertionError, match=r"keys \[325 330\] are lost"):
        keys.check([1], 1, np.array([[0, 325, 336, 330, 500, 100, 150, 640]]))
