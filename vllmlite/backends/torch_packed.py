"""Matrix products of the torch backend with quantised weights, whose schemes quantise activations to 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vllmlite.weights.host import PackedWeight, float_values
from vllmlite.weights.schemes import float8, tiles
from vllmlite.weights.schemes.bits import unpack_rows
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.schemes.grouped import ORDER, QWEIGHT, SCALES, ZEROS, GroupedScheme
from vllmlite.weights.schemes.tiles import TileScheme
from vllmlite.weights.schemes.w8a8 import InputScale, W8A8Scheme

ROWS = 4096
"""Rows of a weight that are converted to floats at a time."""
SCHEMES = frozenset(("int8", "int4", "w8a8", "fp8_w8a8", "w4a8_grouped", "w8a8_grouped"))

Put: TypeAlias = Callable[..., Sequence[torch.Tensor]]
"""Puts numpy arrays on the device."""


@dataclass(frozen=True, slots=True)
class TorchTiles:
    """Integer values ``[out, groups, GROUP]`` of a weight of ``size`` columns, and float32 scales ``[out, groups]``.
    ``order``: the column of x for each column of the weight."""

    size: int
    values: torch.Tensor
    scales: torch.Tensor
    order: torch.Tensor | None = None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply in float32, after rounding x to 8 bits per group."""
        x = x if self.order is None else x[:, self.order]
        groups = F.pad(x.float(), (0, -self.size % tiles.GROUP)).view(
            len(x), self.scales.shape[1], tiles.GROUP
        )
        high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
        extremes = torch.where(high > -low, high, low)
        inverse = torch.where(extremes == 0, 0, -128 / extremes)
        rounded = (groups * inverse).round().clamp(-128, 127) * (extremes * (-1 / 128))
        return _by_rows(
            rounded.flatten(1),
            len(self.values),
            lambda part: (self.values[part] * self.scales[part, :, None]).flatten(1),
        )


@dataclass(frozen=True, slots=True)
class TorchInt8:
    """int8 values ``[out, in]``, float32 scales ``[out]``, int8 zeros ``[out]`` or None, and how x is quantised."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    inputs: InputScale

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply as :mod:`vllmlite.weights.schemes.w8a8` defines it; sums of integers are exact in float64."""
        quantised, input_scales = quantized_rows(x.float(), self.inputs)

        def values(part: slice) -> torch.Tensor:
            floats = self.values[part].double()
            return floats if self.zeros is None else floats - self.zeros[part, None]

        sums = _by_rows(quantised.double(), len(self.values), values).float()
        return sums * (input_scales * self.scales)


def quantized_rows(x: torch.Tensor, inputs: InputScale) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of ``x`` quantised to int8, minus the zero point, as floats; and their scales ``[rows, 1]``."""
    if inputs.scale is not None:
        scale = torch.full((len(x), 1), inputs.scale, device=x.device)
        return (x * scale.reciprocal()).round().add_(inputs.zero).clamp_(-128, 127) - inputs.zero, scale
    if inputs.symmetric:
        most = x.abs().amax(-1, keepdim=True)
        return (x * _reciprocal(127, most)).round(), most / 127
    high, low = x.amax(-1, keepdim=True).clamp_(min=0), x.amin(-1, keepdim=True).clamp_(max=0)
    span = high - low
    inverse = _reciprocal(255, span)
    zero = (-128 - low * inverse).round()
    return ((x * inverse).round() + zero).clamp_(-128, 127) - zero, span / 255


@dataclass(frozen=True, slots=True)
class TorchFloat8:
    """e4m3 values ``[out, in]``, float32 scales ``[out]``, or of blocks, and the constant that quantises x, or None."""

    values: torch.Tensor
    scales: torch.Tensor
    blocks: bool
    input_scale: float | None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply in float32 as :mod:`vllmlite.weights.schemes.float8` defines it."""
        columns, size = x.shape[1], float8.BLOCK if self.blocks else x.shape[1]
        groups = F.pad(x.float(), (0, -columns % size)).view(len(x), -1, size)
        if self.input_scale is None:
            most = groups.abs().amax(-1, keepdim=True)
            scales = (most / float8.LARGEST).clamp_(min=float8.LEAST_SCALE)
        else:
            scales = torch.full((len(x), 1, 1), self.input_scale, device=x.device)
        rounded = (groups * (1 / scales)).clamp_(-float8.LARGEST, float8.LARGEST).to(torch.float8_e4m3fn)
        floats = (rounded.float() * scales).flatten(1)[:, :columns]

        def values(part: slice) -> torch.Tensor:
            made = self.values[part].float()
            if not self.blocks:
                return made * self.scales[part, None]
            rows = torch.arange(part.start, min(part.stop, len(self.values)), device=x.device) // size
            return made * self.scales[rows].repeat_interleave(size, 1)[:, :columns]

        return _by_rows(floats, len(self.values), values)


TorchPart: TypeAlias = TorchTiles | TorchInt8 | TorchFloat8


@dataclass(frozen=True, slots=True)
class TorchPacked:
    """The parts of one packed weight, and a bias ``[out]``."""

    parts: Sequence[TorchPart]
    bias: torch.Tensor | None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with ``x`` in float32."""
        out = torch.cat([part.product(x) for part in self.parts], dim=1)
        return out if self.bias is None else out.add_(self.bias)


def packed_part(weight: PackedWeight, put: Put) -> TorchPart:
    """Put a weight in one of :data:`SCHEMES` on the device."""
    if isinstance(weight.scheme, W8A8Scheme):
        operand = weight.scheme.operand(weight)
        arrays: list[NDArray[Any]] = [operand.values, operand.scales]
        values, scales, *zeros = put(*arrays, *([] if operand.zeros is None else [operand.zeros]))
        return TorchInt8(values, scales, zeros[0] if zeros else None, operand.inputs)
    if isinstance(weight.scheme, Float8Scheme):
        stored = weight.scheme.operand(weight)
        codes, scales = put(stored.values, stored.scales)
        return TorchFloat8(codes.view(torch.float8_e4m3fn), scales, stored.blocks, stored.input_scale)
    if isinstance(weight.scheme, GroupedScheme):
        return _grouped_part(weight.scheme, weight, put)
    assert isinstance(weight.scheme, TileScheme)
    unpacked, found, _ = tiles.unpack(weight)
    values, scales = put(unpacked, found)
    return TorchTiles(weight.shape[1], values, scales)


def _grouped_part(scheme: GroupedScheme, weight: PackedWeight, put: Put) -> TorchTiles:
    rows, columns = weight.shape
    codes = unpack_rows(weight.parts[QWEIGHT].data.reshape(rows, -1), scheme.bits, columns).astype(np.int16)
    scales, zeros = float_values(weight.parts[SCALES]), weight.parts.get(ZEROS)
    of_column = np.arange(columns) // (scheme.group_size or columns)
    codes -= 1 << (scheme.bits - 1) if zeros is None else zeros.data.reshape(zeros.shape)[:, of_column]
    padded = np.pad(codes, ((0, 0), (0, -columns % tiles.GROUP))).reshape(rows, -1, tiles.GROUP)
    order = weight.parts.get(ORDER)
    arrays: list[NDArray[Any]] = [padded, np.ascontiguousarray(scales[:, of_column[:: tiles.GROUP]])]
    values, found, *orders = put(*arrays, *([] if order is None else [order.data.view("<i4")]))
    return TorchTiles(columns, values, found, orders[0] if orders else None)


def _reciprocal(number: int, divisors: torch.Tensor) -> torch.Tensor:
    """Return ``number`` / ``divisors``, and 0 for a divisor of 0. A plain number would be multiplied by a rounded
    reciprocal."""
    return torch.where(divisors == 0, 0, torch.full_like(divisors, number) / divisors)


def _by_rows(x: torch.Tensor, rows: int, weight: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """Return the product of ``x`` with the transposed ``[rows, in]`` weight, of which ``weight`` returns slices."""
    out = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    for first in range(0, rows, ROWS):
        part = slice(first, first + ROWS)
        out[:, part] = x @ weight(part).T
    return out
