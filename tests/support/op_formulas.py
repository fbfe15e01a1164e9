"""The formulas of ops in float64."""

from __future__ import annotations

import math

import numpy as np
from op_backends import Array


def rms(x: Array, weight: Array, eps: float) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight)


def activated(x: Array, activation: str) -> Array:
    if activation == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    if activation == "gelu":
        return np.asarray(x * 0.5 * np.vectorize(math.erfc)(-x / np.sqrt(2)))
    if activation == "gelu_tanh":
        return np.asarray(x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    return np.maximum(x, 0)


def gated(x: Array, activation: str) -> Array:
    gate, up = np.split(x, 2, -1)
    if activation == "clamped_swiglu":
        gate = np.minimum(gate, 7)
        return np.asarray(gate / (1 + np.exp(-1.702 * gate)) * (np.clip(up, -7, 7) + 1))
    return np.asarray(activated(gate, activation) * up)
