"""GPTQ (Frantar et al. 2023): rounds a weight column by column, and corrects the columns that follow for the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.quantize.rounding import Grid, group_scales
from vllmlite.weights.host import Floats
from vllmlite.weights.packers import Rounded

BLOCK = 128
"""Number of columns that are rounded before the columns after them are corrected."""
DAMPING = 0.01
"""The fraction of the mean of the Gram matrix's diagonal that is added to the diagonal."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The properties of a product's inputs that GPTQ needs; all products with the same inputs can share them."""

    gram: NDArray[np.float32]
    """``[in, in]``: the Gram matrix of the inputs."""
    order: NDArray[np.int64] | None
    """The order in which columns are rounded; None: from first to last."""
    factor: NDArray[np.float32]
    """The upper Cholesky factor of the inverse of the damped Gram matrix in that order."""

    @classmethod
    def of(cls, gram: NDArray[np.float32], act_order: bool = False) -> Inputs:
        """Prepare rounding for a layer whose inputs ``x [tokens, in]`` have the Gram matrix ``x.T @ x``. ``act_order``:
        round columns with large inputs first. Raises ModelError for values that are not finite."""
        if not act_order:
            return cls(gram, None, _inverse_factor(gram))
        order = np.argsort(-np.diagonal(gram), kind="stable")
        return cls(gram, order, _inverse_factor(gram[np.ix_(order, order)]))


def gptq(weight: Floats, grid: Grid, inputs: Inputs) -> Rounded:
    """Round ``weight [out, in]`` so that products stay close for ``inputs``.

    Columns that are rounded in another order get the scales of the original weight ("static groups")."""
    rows, columns = weight.shape
    size, gram, factor, act_order = grid.group_size, inputs.gram, inputs.factor, inputs.order is not None
    order = np.arange(columns) if inputs.order is None else inputs.order
    left = np.ascontiguousarray(weight.T[order])
    codes = np.empty((columns, rows), np.uint8)
    scales = np.empty((columns // size, rows), np.float32)
    zeros = np.empty_like(scales)
    if act_order:
        found = group_scales(weight, grid, gram)
        scales[:], zeros[:] = found[0].T, found[1].T
    step = size * max(BLOCK // size, 1) if size <= BLOCK else BLOCK if size % BLOCK == 0 else size
    for first in range(0, columns, step):
        last = min(first + step, columns)
        errors = np.empty((last - first, rows), np.float32)
        for at in range(first, last):
            group = order[at] // size
            if not act_order and at % size == 0:
                span = slice(at, at + size)
                found = group_scales(np.ascontiguousarray(left[span].T), grid, gram[span, span])
                scales[group], zeros[group] = found[0][:, 0], found[1][:, 0]
            scale, zero = scales[group], zeros[group]
            code = grid.codes(left[at], scale, zero)
            codes[order[at]] = code
            error = (left[at] - (code - zero) * scale) / factor[at, at]
            left[at + 1 : last] -= factor[at, at + 1 : last, None] * error
            errors[at - first] = error
        left[last:] -= factor[first:last, last:].T @ errors
    return Rounded(
        np.ascontiguousarray(codes.T),
        np.ascontiguousarray(scales.T),
        np.ascontiguousarray(zeros.T.astype(np.uint8)),
    )


def _inverse_factor(gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the upper Cholesky factor of the inverse of ``gram``, whose diagonal is raised by :data:`DAMPING`; the
    diagonal of inputs that are always 0 is taken as 1.

    If U is the upper triangle with ``gram = U @ U.T``, that factor is the inverse of U. U is the Cholesky factor of the
    matrix with rows and columns reversed, reversed again."""
    damped = gram[::-1, ::-1].astype(np.float64)
    diagonal = np.diagonal(damped).copy()
    diagonal[diagonal == 0] = 1
    np.fill_diagonal(damped, diagonal + DAMPING * diagonal.mean())
    try:
        upper = np.linalg.cholesky(damped)[::-1, ::-1]
    except np.linalg.LinAlgError as error:
        raise ModelError(f"the products of its inputs cannot be inverted: {error}") from error
    return np.ascontiguousarray(_inverse_of_triangle(upper), np.float32)


def _inverse_of_triangle(upper: NDArray[Any]) -> NDArray[Any]:
    """Return the inverse of an upper triangular matrix, by halves, so that most of the work is matrix products."""
    size = len(upper)
    if size <= BLOCK:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    found = np.zeros_like(upper)
    found[:half, :half] = _inverse_of_triangle(upper[:half, :half])
    found[half:, half:] = _inverse_of_triangle(upper[half:, half:])
    found[:half, half:] = -found[:half, :half] @ (upper[:half, half:] @ found[half:, half:])
    return found
