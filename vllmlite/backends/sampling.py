"""The values that the sampling ops of a backend take and return, and their random numbers.

Letters in shapes are those of :mod:`vllmlite.backends.base`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.batch import Tensor


@dataclass(slots=True)
class BeamRows:
    """Groups of sampled positions among which :meth:`Backend.choose_beams` chooses; host arrays. M rows, G groups."""

    rows: NDArray[np.int32]
    """[M] index into N of each row's sampled position."""
    groups: NDArray[np.int32]
    """[G + 1]: group g has rows ``groups[g]`` up to ``groups[g + 1]``."""
    scores: NDArray[np.float32]
    """[M] sums of the log-probabilities of each row's output."""
    temperatures: NDArray[np.float32]
    """[M] temperatures by which each row's logits are divided, above 0."""


@dataclass(slots=True)
class Continuations:
    """The ``k`` best continuations of each group, descending: int32 ``rows [G, k]``, counted within the group, int32
    ``ids [G, k]`` and float32 ``scores [G, k]``. Where a group has fewer, row and id are -1, and the score is -inf."""

    rows: Tensor
    ids: Tensor
    scores: Tensor


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of N rows: float32 ``chosen [N]``, int32 ``rank [N]`` (1 = most likely), and the ``k`` most
    likely, descending: int32 ``top_ids [N, k]``, float32 ``top [N, k]``. Equal logits rank by ascending id."""

    chosen: Tensor
    rank: Tensor
    top_ids: Tensor
    top: Tensor


@dataclass(slots=True)
class Sampled:
    """The int32 ``ids [N]`` of a step and, if requested, their log-probabilities."""

    ids: Tensor
    logprobs: Logprobs | None = None


def uniform(seed: int, position: int) -> float:
    """Return the random number of (``seed``, ``position``): a float in [0, 1) with 24 bits, by SplitMix64 (Steele, Lea
    & Flood 2014) over the position, keyed by the mixed seed. Every backend computes the same bits."""
    return (_mix64(_mix64(seed + _GOLDEN) + (position + 1) * _GOLDEN) >> 40) * 2.0**-24


_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def _mix64(z: int) -> int:
    z &= _MASK64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
    return z ^ (z >> 31)
