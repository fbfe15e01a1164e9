"""Round weights to integers with a scale, and perhaps a zero, for each group of a row's elements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import Floats, Scheme
from vllmlite.weights.packers import Rounded, stored_scales
from vllmlite.weights.schemes.gguf_blocks import BlockScheme

SHRINKS = 20
"""Number of ranges to try for a group: the whole range, and smaller and smaller ones."""
SMALLEST = 0.6
"""The smallest range to try, as a fraction of the whole."""
CHUNK = 1 << 20
"""Number of elements whose scales are searched at a time."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers to which a weight is rounded, and the scheme that stores them."""

    bits: int
    group_size: int
    symmetric: bool
    scheme: Scheme

    @property
    def signs(self) -> tuple[int, ...]:
        """Signs that a scale may have.

        There is one more code below the middle than above it. With either sign allowed, the element of the largest
        magnitude can have the lowest code. Only readers of GGUF files support negative scales."""
        return (1, -1) if isinstance(self.scheme, BlockScheme) else (1,)

    @property
    def largest(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def scales(self, low: Floats, high: Floats, shrink: float = 1.0, sign: int = 1) -> tuple[Floats, Floats]:
        """Return scales and zeros of groups with elements from ``low`` to ``high``, which cover the fraction ``shrink``
        of this range. ``sign``, one of :attr:`signs`, is the sign of the scales."""
        if self.symmetric:
            middle = (self.largest + 1) // 2
            below, above = (-low, high) if sign > 0 else (high, -low)
            scales = np.maximum(below / middle, above / (middle - 1)) * np.float32(shrink * sign)
            zeros = np.full_like(scales, middle)
        else:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            scales = (high - low) * np.float32(shrink / self.largest)
            zeros = np.zeros_like(scales)
        scales = stored_scales(self.scheme, np.asarray(scales, np.float32))
        if not self.symmetric:
            ratio = np.divide(-low * np.float32(shrink), scales, out=np.zeros_like(scales), where=scales > 0)
            zeros = np.clip(np.rint(ratio), 0, self.largest)
        return scales, zeros

    def codes(self, values: Floats, scales: Floats, zeros: Floats) -> Floats:
        """Return the nearest code of each value; all three broadcast."""
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
        found: Floats = values * inverse
        np.rint(found, out=found)
        found += zeros
        return np.clip(found, 0, self.largest, out=found)


def nearest(weight: Floats, grid: Grid, *, search: bool = True) -> Rounded:
    """Round ``weight [out, in]`` to nearest. With ``search``, the scale of each group is that of :data:`SHRINKS` ranges
    with the least squared error."""
    scales, zeros = group_scales(weight, grid, search=search)
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, grid.group_size)
    codes = np.empty(groups.shape, np.uint8)
    for part in chunks(rows, columns):
        codes[part] = grid.codes(groups[part], scales[part, :, None], zeros[part, :, None])
    return Rounded(codes.reshape(rows, columns), scales, zeros.astype(np.uint8))


def group_scales(
    weight: Floats, grid: Grid, gram: NDArray[np.float32] | None = None, *, search: bool = True
) -> tuple[Floats, Floats]:
    """Scales and zeros ``[out, groups]`` of ``weight``, chosen as by :func:`nearest`; with ``gram [in, in]``, the
    inputs' Gram matrix, by the least error of the output."""
    rows, columns = weight.shape
    size = grid.group_size
    groups = weight.reshape(rows, -1, size)
    shape = groups.shape[:2]
    best, zeros = np.empty(shape, np.float32), np.empty(shape, np.float32)
    blocks = None if gram is None else _diagonal_blocks(gram, size)
    for part in chunks(rows, columns):
        values = groups[part]
        low, high = values.min(-1), values.max(-1)
        best[part], zeros[part] = grid.scales(low, high)
        if not search:
            continue
        least = _errors(values, grid, best[part], zeros[part], blocks)
        for shrink, sign in product(np.linspace(SMALLEST, 1, SHRINKS + 1), grid.signs):
            scale, zero = grid.scales(low, high, float(shrink), sign)
            error = _errors(values, grid, scale, zero, blocks)
            better = error < least
            least = np.where(better, error, least)
            best[part] = np.where(better, scale, best[part])
            zeros[part] = np.where(better, zero, zeros[part])
    return best, zeros


def _errors(
    values: Floats, grid: Grid, scales: Floats, zeros: Floats, blocks: NDArray[np.float32] | None
) -> Floats:
    """Return the error ``[out, groups]`` of rounding ``values [out, groups, size]``."""
    errors = grid.codes(values, scales[..., None], zeros[..., None])
    errors -= zeros[..., None]
    errors *= scales[..., None]
    errors -= values
    if blocks is None:
        total: Floats = np.einsum("...i,...i->...", errors, errors)
        return total
    seen = np.matmul(errors.swapaxes(0, 1), blocks).swapaxes(0, 1)
    weighted: Floats = np.einsum("...i,...i->...", seen, errors)
    return weighted


def _diagonal_blocks(gram: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return the parts of ``gram`` within a group: ``[groups, size, size]``."""
    groups = len(gram) // size
    index = np.arange(groups)
    return np.ascontiguousarray(gram.reshape(groups, size, groups, size)[index, :, index])


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows with about :data:`CHUNK` elements each."""
    step = max(CHUNK // columns, 1)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def channel_error(weight: Floats, rounded: Floats, gram: NDArray[np.float32]) -> float:
    """Return the squared error of a product's outputs over inputs with the Gram matrix ``gram``."""
    errors = rounded - weight
    return float(np.sum((errors @ gram) * errors, dtype=np.float64))
