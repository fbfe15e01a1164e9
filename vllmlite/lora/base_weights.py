"""The weights of the base model that are needed to read some kinds of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.adapter import EMBEDDING, HEAD, LowRank
from vllmlite.weights.checkpoint import Weights
from vllmlite.weights.host import (
    HostTensor,
    HostWeight,
    PackedWeight,
    as_floats,
    float_tensor,
    float_values,
)
from vllmlite.weights.parts import TABLE, Source

Floats: TypeAlias = NDArray[np.float32]
Stored: TypeAlias = tuple[Mapping[str, Source], Weights]
"""For each tensor of the model, where it is stored; and the stored tensors."""

ELEMENTS = 1 << 17
"""Maximum number of elements of a weight that are converted and multiplied at a time."""


class BaseWeights:
    """The stored weights of a model. They are opened when they are first needed, and never copied as a whole."""

    def __init__(self, open_weights: Callable[[], Stored], pace: Callable[[], None]) -> None:
        """``pace`` is called between pieces of work."""
        self._open, self._pace = open_weights, pace
        self._opened: Stored | None = None

    def gain(self, place: str, change: LowRank, magnitudes: Floats) -> Floats:
        """Return the gain ``[2, out]`` by which the rows of the changed weight get the norms ``magnitudes [out]``.

        This is DoRA (Liu et al. 2024): ``m * (W + scale * b @ a) / ||W + scale * b @ a||``, by rows of W. The gain's
        second row corrects the bias, which must not be multiplied."""
        squares = np.concatenate(list(self._squares(place, change)))
        if place == EMBEDDING:  # the table is stored as [V, hidden]: its columns are the weight's rows
            squares = squares.reshape(-1, len(magnitudes)).sum(0)
        factors = magnitudes / np.sqrt(squares)
        bias = f"{place}.bias" in self._weights()[0] and float_values(
            as_floats(self._tensor(f"{place}.bias"))
        )
        shift = (1 - factors) * bias
        return np.stack([factors, shift]).astype(np.float32)

    def may_equal(self, place: str, tensor: HostTensor) -> bool:
        """Return whether ``tensor`` may be a copy of the weight ``place``: whether their values are equal once those of
        one are rounded to the other's dtype. A weight that is stored quantised is not compared. The embedding is
        compared as the table ``[V, hidden]``."""
        weight = self._stored(place)
        if isinstance(weight, PackedWeight):
            return True
        step = _rows_at_a_time(weight)
        for at in range(0, weight.shape[0], step):
            self._pace()
            own, other = _rows(weight, at, step), _rows(tensor, at, step)
            if not (
                np.array_equal(float_values(float_tensor(own, tensor.dtype)), other)
                or np.array_equal(float_values(float_tensor(other, weight.dtype)), own)
            ):
                return False
        return True

    def _squares(self, place: str, change: LowRank) -> Iterator[Floats]:
        """Yield the sums of squares of rows of the changed weight; for the embedding, of its columns, piece by
        piece."""
        weight = as_floats(self._stored(place))
        a, b = float_values(change.a), float_values(change.b) * np.float32(change.scale)
        step = _rows_at_a_time(weight)
        for at in range(0, weight.shape[0], step):
            self._pace()
            values = _rows(weight, at, step)
            if place == EMBEDDING:
                yield np.square(values + (b @ a[:, at : at + step]).T).sum(0)
            else:
                yield np.square(values + b[at : at + step] @ a).sum(1)

    def _stored(self, place: str) -> HostWeight:
        name = f"{place}.weight"
        return self._tensor(TABLE if place == HEAD and name not in self._weights()[0] else name)

    def _tensor(self, name: str) -> HostWeight:
        sources, stored = self._weights()
        return sources[name].take(stored.tensor(sources[name].key))

    def _weights(self) -> Stored:
        if self._opened is None:
            self._opened = self._open()
        return self._opened


def _rows_at_a_time(tensor: HostTensor) -> int:
    return max(1, ELEMENTS // tensor.shape[1])


def _rows(tensor: HostTensor, at: int, count: int) -> Floats:
    """Return up to ``count`` rows of a matrix, from ``at`` on, as float32."""
    row = tensor.data.size // tensor.shape[0]
    data = tensor.data[at * row : (at + count) * row]
    return float_values(HostTensor(tensor.dtype, (data.size // row, tensor.shape[1]), data))
