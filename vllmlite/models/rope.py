"""Tables of rotary position embeddings (Su et al. 2021) with the usual ways to extend the context, in float64.

The row for a position depends only on that position, so results do not depend on chunked prefill or prefix hits. For
``dynamic`` that is a choice: position p is rotated with the base of a sequence of max(p + 1, original_max_position)
tokens, as in token-by-token decoding. For ``longrope`` the engine's longest sequence decides: if it exceeds the
original context length, the long factors are used for all positions.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vllmlite.models.spec import RopeSpec

KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

_CHUNK = 8192  # positions per chunk; bounds the float64 temporaries


def cos_sin(spec: RopeSpec, num_positions: int, max_model_len: int) -> NDArray[np.float32]:
    """Return the float32 table ``[num_positions, rotary_dim]`` for positions from 0: cosines, then sines.

    ``max_model_len`` is the engine's longest sequence in tokens."""
    half = spec.rotary_dim // 2
    table = np.empty((num_positions, 2 * half), np.float32)
    frequencies = None if spec.kind == "dynamic" else inverse_frequencies(spec, max_model_len)
    for start in range(0, num_positions, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, num_positions), dtype=np.float64)[:, None]
        angles = positions * (_dynamic(spec, positions) if frequencies is None else frequencies)
        rows = table[start : start + _CHUNK]
        rows[:, :half] = np.cos(angles) * spec.attention_factor
        rows[:, half:] = np.sin(angles) * spec.attention_factor
    return table


def inverse_frequencies(spec: RopeSpec, max_model_len: int) -> NDArray[np.float64]:
    """Return radians per position for each of the ``rotary_dim / 2`` pairs; not for ``dynamic``, where they vary."""
    plain = spec.theta ** -(np.arange(0, spec.rotary_dim, 2, dtype=np.float64) / spec.rotary_dim)
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "yarn":
        return _yarn(spec, plain)
    if spec.kind == "llama3":
        return _llama3(spec, plain)
    if spec.kind == "longrope":  # Ding et al. 2024
        long = max_model_len > spec.original_max_position
        return np.asarray(plain / np.array(spec.long_factors if long else spec.short_factors))
    return plain


def _dynamic(spec: RopeSpec, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the frequencies of NTK-aware scaling (bloc97 and emozilla, 2023), whose base grows with the length: ``[P,
    1] -> [P, half]``."""
    stretch = np.maximum(positions + 1, spec.original_max_position) / spec.original_max_position
    dim = spec.rotary_dim
    base = spec.theta * (spec.factor * stretch - (spec.factor - 1)) ** (dim / (dim - 2))
    return np.asarray(base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim))


def _yarn(spec: RopeSpec, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the frequencies of YaRN (Peng et al. 2023), which interpolates slow dimensions and keeps fast ones, with a
    linear ramp between them."""

    def dimension(rotations: float) -> float:
        turns = spec.original_max_position / (rotations * 2 * math.pi)
        return spec.rotary_dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(spec.rotary_dim // 2) - low) / (high - low), 0, 1)
    return np.asarray(plain * (1 - ramp) + plain / spec.factor * ramp)


def _llama3(spec: RopeSpec, plain: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the frequencies of Llama 3.1 (Dubey et al. 2024), which interpolates long wavelengths and keeps short
    ones, with a smooth transition between them."""
    turns = spec.original_max_position * plain / (2 * math.pi)
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return np.asarray(plain * blend + plain / spec.factor * (1 - blend))
