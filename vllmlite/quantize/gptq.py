"""GPTQ (Frantar et al. 2023): rounds a weight column by column, and corrects the columns that follow for the error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.quantize.rounding import Grid, group_scales
from vllmlite.weights.host import Floats
from vllmlite.weights.packers import Rounded

BLOCK = 128
"""Number of columns after which the columns beyond them are corrected."""
DAMPING = 0.01
"""The fraction of the mean of the Gram matrix's diagonal that is added to the diagonal."""


def gptq(weight: Floats, grid: Grid, gram: NDArray[np.float32], *, act_order: bool = False) -> Rounded:
    """Round ``weight [out, in]`` so that products stay close for inputs with the Gram matrix ``gram [in, in]``.

    ``act_order`` rounds columns with large inputs first, with scales of the original weight ("static groups")."""
    rows, columns = weight.shape
    size = grid.group_size
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(columns)
    factor = _inverse_factor(gram[np.ix_(order, order)] if act_order else gram)
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
    """The upper Cholesky factor of the inverse of ``gram``, whose diagonal is raised by :data:`DAMPING`; the diagonal
    of inputs that are always 0 is taken as 1."""
    damped = gram.astype(np.float64)
    diagonal = np.diagonal(damped).copy()
    diagonal[diagonal == 0] = 1
    np.fill_diagonal(damped, diagonal + DAMPING * diagonal.mean())
    try:
        factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError as error:
        raise ModelError(f"the products of its inputs cannot be inverted: {error}") from error
    return np.ascontiguousarray(factor, np.float32)
