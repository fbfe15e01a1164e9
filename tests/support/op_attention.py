"""Attention in float64, and rows on which a backend computes attention step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
from op_backends import ROUNDING, TOLERANCE, Array, check, numbers, put
from op_formulas import rms
from paged import Paged

from vllmlite.backends.base import Backend, Rope
from vllmlite.backends.kv_cache import KVSpec


def rotated(x: Array, table: Array, interleaved: bool) -> Array:
    """``x [T, heads, D]`` rotated by ``table [T, rotary_dim]`` of its tokens."""
    half = table.shape[1] // 2
    turns = (table[:, :half] + 1j * table[:, half:])[:, None]
    out = x.copy()
    first, second = (np.s_[0 : 2 * half : 2], np.s_[1 : 2 * half : 2]) if interleaved else (
        np.s_[:half],
        np.s_[half : 2 * half],
    )  # fmt: skip
    turned = (x[..., first] + 1j * x[..., second]) * turns
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    alibi: Array | None = None,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """Attention of one row: ``q [n, H, D]`` are its last tokens, ``k`` and ``v`` are ``[context, K, D]``. Returns the
    result ``[n, H * D]`` and its sensitivity to independent relative rounding errors of the weights: the root of the
    sum of squares of weight times value."""
    heads, kv_heads = q.shape[1], k.shape[1]
    out, spread = np.empty_like(q), np.empty_like(q)
    at = np.arange(len(k) - len(q), len(k))[:, None]
    keys = np.arange(len(k))[None]
    seen = (keys <= at) & (True if window is None else keys > at - window)
    for head in range(heads):
        group = head * kv_heads // heads
        scores = q[:, head] @ k[:, group].T * scale
        # A score's own rounding is a relative error of its weight as well.
        largest = np.abs(np.where(seen, scores, 0)).max(-1, keepdims=True)
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if alibi is not None:
            scores = scores + alibi[head] * (keys - at)
        scores = np.where(seen, scores, -np.inf)
        sink = -np.inf if sinks is None else sinks[head]
        most = np.maximum(scores.max(-1, keepdims=True), sink)
        weights = np.exp(scores - most)
        weights /= weights.sum(-1, keepdims=True) + np.exp(sink - most)
        out[:, head] = weights @ v[:, group]
        spread[:, head] = (1 + largest) * np.sqrt(weights**2 @ v[:, group] ** 2)
    return out.reshape(len(q), -1), spread.reshape(len(q), -1)


def attention_bound(dtype: str, expected: Array, spread: Array) -> Array:
    """The largest allowed error of each element of :func:`attention`. The result, weights and scores, and what these
    are made of, are rounded; the errors are independent and add up to a few standard deviations."""
    bound: Array = ROUNDING[dtype] * (2 * np.abs(expected) + 6 * spread)
    if dtype == "float16":
        bound += 2.0**-22  # small numbers have fewer bits
    if dtype == "float32":
        bound = TOLERANCE[dtype] * (np.abs(expected).max(-1, keepdims=True) + spread)
    return bound


def float8(exponent_bits: int, largest: float) -> Array:
    """The magnitudes of an 8-bit float format up to ``largest``, in the order of their codes."""
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = np.divmod(np.arange(127.0), 2**mantissa_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    normal = np.ldexp(1 + mantissa / 2**mantissa_bits, (exponent - bias).astype(int))
    subnormal = np.ldexp(mantissa / 2**mantissa_bits, 1 - bias)
    values: Array = np.where(exponent == 0, subnormal, normal)
    return np.asarray(values[values <= largest])


CODES = {"int8": np.arange(128.0), "float8_e4m3": float8(4, 448.0), "float8_e5m2": float8(5, 57344.0)}
"""Magnitudes that a quantised cache stores, by dtype of its elements."""


def through_cache(x: Array, spec: KVSpec, scales: Array | float = 1.0) -> Array:
    """Heads ``x [..., D]`` after storing them in a cache of ``spec`` with these layer scales."""
    if spec.format is None:
        return x
    x, codes = x.astype(np.float32), CODES[spec.format.element]
    scale = np.asarray(scales, np.float32)
    if spec.format.head_scales:
        absmax = np.abs(x).max(-1, keepdims=True)
        scale = np.maximum(absmax / np.float32(codes[-1]), np.float32(2**-126))
    y = (x / scale).astype(np.float64)
    middles = (codes[1:] + codes[:-1]) / 2
    below, upto = np.searchsorted(middles, np.abs(y)), np.searchsorted(middles, np.abs(y), "right")
    stored = codes[np.where(below % 2 == 0, below, upto)]
    return np.asarray(scale.astype(np.float64) * np.copysign(np.where(np.isnan(y), np.nan, stored), y))


class Rows:
    """Rows fed to :class:`Paged` step by step, with all keys and values kept on the host to compare with."""

    def __init__(
        self, backend: Backend, heads: int, kv_heads: int, size: int, block_size: int, **options: Any
    ) -> None:
        kv_dtype, scales = options.pop("kv_dtype", backend.dtype), options.pop("scales", ())
        spec = KVSpec(2, kv_heads, size, block_size, kv_dtype, scales)
        self.backend, self.heads, self.kv_heads, self.size = backend, heads, kv_heads, size
        self.paged = Paged(backend, spec, **options)
        self.rope: Rope | None = None
        self.table: Array | None = None
        self.norms: tuple[Array, Array] | None = None
        self.norm_dtype = backend.dtype
        self.interleaved = False
        self.soft_cap: float | None = None
        self.alibi: Array | None = None
        self.sinks: Array | None = None
        self.keys: dict[int, Array] = {}
        self.values: dict[int, Array] = {}
        self.seed = 0

    def admit(self, slot: int) -> None:
        self.paged.admit(slot)
        self.keys[slot] = self.values[slot] = np.zeros((0, self.kv_heads, self.size))

    def step(self, slots: list[int], counts: list[int], windows: tuple[int | None, ...] = (None,)) -> None:
        """One step of layer 1, compared for each of ``windows``."""
        self.attend(*self.write(slots, counts), slots, counts, windows)

    def write(self, slots: list[int], counts: list[int]) -> tuple[Any, Any, Array]:
        """Write the keys and values of a step; return its batch, and its queries as computed and as expected."""
        backend, heads, kv_heads, size = self.backend, self.heads, self.kv_heads, self.size
        host_side = self.paged.batch(slots, counts)
        batch = self.paged.upload(host_side)
        self.seed += 1
        qkv = numbers((host_side.num_tokens, heads + 2 * kv_heads, size), self.seed)
        q_norm, k_norm = (
            (backend.tensor(weight.astype(np.float32), self.norm_dtype) for weight in self.norms)
            if self.norms
            else (None, None)
        )
        q = backend.attn_prep(
            put(backend, qkv.reshape(len(qkv), -1)),
            heads,
            self.rope,
            self.paged.kv,
            1,
            batch,
            q_norm,
            k_norm,
            1e-5,
        )
        new_q, new_k, new_v = np.split(qkv, [heads, heads + kv_heads], 1)
        if self.norms is not None:
            new_q, new_k = (
                (part - part.mean(-1, keepdims=True)) / np.sqrt(part.var(-1, keepdims=True) + 1e-5) * weight
                if weight.ndim == 2
                else rms(part.reshape(len(part), -1, len(weight)), weight, 1e-5).reshape(part.shape)
                for part, weight in zip((new_q, new_k), self.norms, strict=True)
            )
        if self.table is not None:
            rows = self.table[host_side.positions]
            new_q, new_k = rotated(new_q, rows, self.interleaved), rotated(new_k, rows, self.interleaved)
        check(backend, q, new_q)
        key_scale, value_scale = (self.paged.spec.scales or [(1.0, 1.0)] * 2)[1]
        new_k = through_cache(new_k, self.paged.spec, key_scale)
        new_v = through_cache(new_v, self.paged.spec, value_scale)
        begin = host_side.query_start_loc
        for row, slot in enumerate(slots):
            own = slice(begin[row], begin[row + 1])
            self.keys[slot] = np.concatenate((self.keys[slot], new_k[own]))
            self.values[slot] = np.concatenate((self.values[slot], new_v[own]))
        return batch, q, new_q

    def attend(
        self,
        batch: Any,
        q: Any,
        exact_q: Array,
        slots: list[int],
        counts: list[int],
        windows: tuple[int | None, ...],
    ) -> None:
        pieces = np.split(exact_q, np.cumsum(counts)[:-1])
        for window in (*windows, max(1, batch.max_context - 1), max(1, batch.max_query_len - 1)):
            expected, spread = (
                np.concatenate(parts)
                for parts in zip(
                    *(
                        attention(
                            piece,
                            self.keys[slot],
                            self.values[slot],
                            0.25,
                            window,
                            self.soft_cap,
                            self.alibi,
                            self.sinks,
                        )
                        for piece, slot in zip(pieces, slots, strict=True)
                    ),
                    strict=True,
                )
            )
            slopes, sinks = (
                None if values is None else self.backend.tensor(values.astype(np.float32))
                for values in (self.alibi, self.sinks)
            )
            found = self.backend.paged_attention(
                q, self.paged.kv, 1, batch, 0.25, window, self.soft_cap, slopes, sinks
            )
            check(self.backend, found, expected, attention_bound(self.backend.dtype, expected, spread))
