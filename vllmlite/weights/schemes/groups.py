"""Base of the schemes that store integers in groups: each group of a row's elements has a scale, and may have a
zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.host import Floats, HostTensor, PackedWeight, Scheme, Shape

Codes = NDArray[np.integer]


def group_count(columns: int, group_size: int | None) -> int:
    """Return the number of groups in a row of ``columns`` elements; the last may be short. ``group_size`` None: the row
    is one group."""
    return 1 if group_size is None else -(-columns // group_size)


def group_indices(
    weight: PackedWeight, group_size: int | None, groups: int, suffix: str = ""
) -> NDArray[np.int64] | None:
    """Return the group of each column: the elements of the part ``suffix`` if it is stored (``desc_act``), else
    consecutive groups. None if the groups are runs of equally many columns. Raises ModelError for indices out of
    range."""
    stored, columns = weight.parts.get(suffix), weight.shape[1]
    size = columns if group_size is None else group_size
    in_order = np.arange(columns) // size
    found = in_order if stored is None else stored.data.view("<i4").astype(np.int64)
    if found.min(initial=0) < 0 or found.max(initial=0) >= groups:
        raise ModelError(
            f"{suffix} holds groups from {found.min()} to {found.max()}; accepted: 0 to {groups - 1}"
        )
    return None if columns == size * groups and np.array_equal(found, in_order) else found


def check_scales(scales: Floats) -> None:
    """Raise ModelError if a scale is not finite."""
    if not np.isfinite(scales).all():
        raise ModelError("a scale is not finite")


def scaled(
    codes: Codes | Floats, zeros: Codes | int, scales: Floats, index: NDArray[np.int64] | None
) -> Floats:
    """Return ``(codes - zeros) * scales`` as float32 ``[out, in]``, from codes ``[out, in]``, zeros and scales ``[out,
    groups]``, and the result ``index [in]`` of :func:`group_indices`. Raises ModelError for scales that are not
    finite."""
    check_scales(scales)

    def by_column(values: Floats) -> Floats:
        return values[..., None] if index is None else values[:, index]

    values = codes.astype(np.float32)
    if index is None:
        values = values.reshape(len(codes), scales.shape[1], -1)
    values -= zeros if isinstance(zeros, int) else by_column(zeros.astype(np.float32))
    values *= by_column(scales)
    return values.reshape(codes.shape)


@dataclass(frozen=True, slots=True)
class Axes:
    """How a part is sliced when its weight is sliced: the axes of the part that correspond to rows and to columns of
    the weight (None: the part is not sliced with these), and how many rows and columns one element of the part
    covers."""

    rows: int | None = None
    columns: int | None = None
    per_row: Fraction = Fraction(1)
    per_column: Fraction = Fraction(1)


class SlicedScheme(Scheme):
    """A scheme whose parts are sliced along the axes that :meth:`axes` names."""

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        raise NotImplementedError

    def take_rows(self, weight: PackedWeight, spans: Sequence[tuple[int, int]]) -> PackedWeight:
        """Return the rows of the spans ``(first, last)``, ``last`` excluded, one span after another. Bounds are
        multiples of :attr:`row_unit`, or the number of rows."""
        axes, parts = self.axes(), {}
        index = None if len(spans) == 1 else np.concatenate([np.arange(first, last) for first, last in spans])
        for suffix, part in weight.parts.items():
            axis, per = axes[suffix].rows, axes[suffix].per_row
            if index is not None and per == 1 and axis is not None and len(part.shape) > axis:
                taken = _elements(part).take(index, axis)
                parts[suffix] = HostTensor(part.dtype, taken.shape[:-1], taken.reshape(-1))
                continue
            cut = [_cut(part, axis, first, last, per) for first, last in spans]
            parts[suffix] = cut[0] if len(cut) == 1 or axis is None else _joined(cut, axis)
        return PackedWeight(self, (sum(last - first for first, last in spans), weight.shape[1]), parts)

    def take_columns(self, weight: PackedWeight, first: int, last: int) -> PackedWeight:
        """Return columns ``first`` to ``last`` - 1. Bounds are multiples of :attr:`column_unit`, or the number of
        columns."""
        axes = self.axes()
        parts = {
            suffix: _cut(part, axes[suffix].columns, first, last, axes[suffix].per_column)
            for suffix, part in weight.parts.items()
        }
        return PackedWeight(self, (weight.shape[0], last - first), parts)


def _elements(part: HostTensor) -> NDArray[np.uint8]:
    item = part.data.size // max(math.prod(part.shape), 1)
    return part.data.reshape(*part.shape, item)


def _cut(part: HostTensor, axis: int | None, first: int, last: int, per: Fraction) -> HostTensor:
    if axis is None or len(part.shape) <= axis:
        return part
    cut = _elements(part)[(slice(None),) * axis + (slice(first // per, -(-last // per)),)]
    return HostTensor(part.dtype, cut.shape[:-1], np.ascontiguousarray(cut).reshape(-1))


def _joined(cut: Sequence[HostTensor], axis: int) -> HostTensor:
    if len(cut[0].shape) <= axis:
        return cut[0]
    joined = np.concatenate([_elements(part) for part in cut], axis=axis)
    return HostTensor(cut[0].dtype, joined.shape[:-1], joined.reshape(-1))


def check_shape(shape: Shape, what: str, rows: int = 1, columns: int = 1) -> None:
    """Raise ModelError unless the numbers of rows and columns of a weight are multiples of ``rows`` and ``columns``."""
    if shape[0] % rows or shape[1] % columns:
        raise ModelError(
            f"a weight {list(shape)} in {what}: accepted: multiples of {rows} rows and {columns} columns"
        )
