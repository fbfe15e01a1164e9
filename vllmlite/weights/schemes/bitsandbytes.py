"""bitsandbytes: 4 bits by lookup table in blocks (QLoRA; Dettmers et al. 2023), and 8 bits with a scale per row.

4 bits: ``weight`` uint8 ``[N * K / 2, 1]``, two codes per byte, the first in the high nibble, over the flattened
weight; ``weight.absmax``, one scale per block; ``weight.quant_map`` float32 ``[16]``, the values of the codes; and
``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), JSON as bytes. With double quantisation, absmax are uint8 indices
into ``weight.nested_quant_map`` float32 ``[256]``, multiplied by ``weight.nested_absmax`` (one per nested block), plus
the JSON's ``nested_offset``. 8 bits: ``weight`` int8 ``[N, K]`` and ``SCB`` float32 ``[N]``; an element is code * SCB /
127.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.weights.host import Floats, HostTensor, PackedWeight, Part, Scheme, Shape, float_values
from vllmlite.weights.schemes.bits import table_values
from vllmlite.weights.schemes.groups import Axes, SlicedScheme, check_scales, check_shape

STATE = "weight.quant_state.bitsandbytes__"
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Elements per scale: 64 unless the checkpoint was made on an AMD GPU, whose default is 128, or by hand."""
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


@dataclass(frozen=True, slots=True)
class Bnb4Scheme(Scheme):
    """4-bit weights. ``kind``: ``nf4`` or ``fp4``; ``nested``: scales per nested block, None if the scales are not
    quantised. Blocks may span the end of a row. Only the JSON says how large they are, one of ``BLOCKS``."""

    kind: str
    nested: int | None = None
    name: str = "bitsandbytes"

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        size = math.prod(shape)
        blocks, *fewer = (-(-size // block) for block in BLOCKS)
        parts = {
            "weight": Part((-(-size // 2), 1), "uint8"),
            "weight.absmax": Part(
                (blocks,),
                "float32" if self.nested is None else "uint8",
                other_shapes=tuple((count,) for count in fewer),
            ),
            "weight.quant_map": Part((16,), "float32"),
            STATE + self.kind: Part((), "uint8", any_shape=True),
        }
        if self.nested is not None:
            outer, *fewer = (-(-count // self.nested) for count in (blocks, *fewer))
            parts[NESTED[0]] = Part((outer,), "float32", other_shapes=tuple((count,) for count in fewer))
            parts[NESTED[1]] = Part((256,), "float32")
        return parts

    @property
    def column_unit(self) -> int:
        """Smallest size of a block; blocks of the stored weight are divided into such."""
        return BLOCKS[0]

    def in_rows(self, weight: PackedWeight) -> PackedWeight:
        """Return the same values in a form whose rows can be sliced repeatedly at low cost."""
        parts, (rows, columns) = weight.parts, weight.shape
        state = _state(parts[STATE + self.kind])
        absmax, block = parts["weight.absmax"], state.get("blocksize")
        if (
            type(block) is not int
            or block not in BLOCKS
            or absmax.shape != (-(-rows * columns // block),)
            or state.get("shape") != [rows, columns]
        ):
            raise ModelError(
                f"{STATE}{self.kind}: blocksize={block!r}, shape={state.get('shape')!r} with {absmax.shape[0]} "
                f"scales; accepted: blocks of {', '.join(map(str, BLOCKS))}, with a scale each, of a weight "
                f"{[rows, columns]}"
            )
        scales = float_values(absmax) if self.nested is None else self._nested(weight, state)
        scheme = _TableScheme(math.gcd(BLOCKS[0], columns))
        check_shape(weight.shape, "bitsandbytes' 4 bits", columns=2)
        repeated = np.repeat(scales, block // scheme.block)[: rows * columns // scheme.block]
        arrays = parts["weight"].data, repeated.view(np.uint8), parts["weight.quant_map"].data
        stored = {
            suffix: HostTensor(part.dtype, part.shape, array)
            for (suffix, part), array in zip(scheme.parts(weight.shape).items(), arrays, strict=True)
        }
        return PackedWeight(scheme, weight.shape, stored)

    def take_rows(self, weight: PackedWeight, spans: Sequence[tuple[int, int]]) -> PackedWeight:
        """Return the rows of the spans ``(first, last)``, ``last`` excluded, one span after another. Bounds are
        multiples of :attr:`row_unit`, or the number of rows."""
        weight = self.in_rows(weight)
        return weight.scheme.take_rows(weight, spans)

    def take_columns(self, weight: PackedWeight, first: int, last: int) -> PackedWeight:
        """Return columns ``first`` to ``last`` - 1. Bounds are multiples of :attr:`column_unit`, or the number of
        columns."""
        weight = self.in_rows(weight)
        return weight.scheme.take_columns(weight, first, last)

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        weight = self.in_rows(weight)
        return weight.scheme.dequantize(weight)

    def _nested(self, weight: PackedWeight, state: dict[str, Any]) -> Floats:
        codes = weight.parts["weight.absmax"].data
        absmax, table = (float_values(weight.parts[suffix]) for suffix in NESTED)
        assert self.nested is not None
        offset = state.get("nested_offset", 0)
        fits = absmax.size == -(-codes.size // self.nested)
        if not fits or type(offset) not in (int, float) or state.get("nested_blocksize") != self.nested:
            raise ModelError(
                f"{STATE}{self.kind}: expected a nested_offset, and nested blocks of {self.nested}"
            )
        return table[codes] * np.repeat(absmax, self.nested)[: codes.size] + np.float32(offset)


@dataclass(frozen=True, slots=True)
class _TableScheme(SlicedScheme):
    """The sliceable form of a 4-bit weight: rows of codes, and rows of plain scales for ``block`` elements each.

    No checkpoint stores this form."""

    block: int
    name: str = "bitsandbytes"

    @property
    def column_unit(self) -> int:
        """The size of a block."""
        return self.block

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        rows, columns = shape
        return {
            "codes": Part((rows, columns // 2), "uint8"),
            "scales": Part((rows, columns // self.block), "float32"),
            "table": Part((16,), "float32"),
        }

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        return {
            "codes": Axes(0, 1, per_column=Fraction(2)),
            "scales": Axes(0, 1, per_column=Fraction(self.block)),
            "table": Axes(),
        }

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        scales, table = (float_values(weight.parts[suffix]) for suffix in ("scales", "table"))
        check_scales(scales)
        check_scales(table)
        values = table_values(weight.parts["codes"].data, table, high_first=True)
        scaled = values.reshape(*scales.shape, self.block) * scales[..., None]
        return scaled.reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class Bnb8Scheme(SlicedScheme):
    """8-bit weights of ``LLM.int8()`` (Dettmers et al. 2022); with float activations, outliers need no treatment."""

    name: str = "bitsandbytes"

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        return {
            "weight": Part(shape, "int8"),
            "SCB": Part((shape[0],), "float32"),
            "weight_format": Part((), "uint8", optional=True),
        }

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        return {"weight": Axes(0, 1), "SCB": Axes(0), "weight_format": Axes()}

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        layout = weight.parts.get("weight_format")
        if layout is not None and layout.data.any():
            raise ModelError("weight_format must be 0 (plain rows)")
        scales = float_values(weight.parts["SCB"]) / np.float32(127)
        check_scales(scales)
        codes = weight.parts["weight"].data.view(np.int8).reshape(weight.shape)
        return codes.astype(np.float32) * scales[:, None]


def _state(part: HostTensor) -> dict[str, Any]:
    try:
        state = json.loads(part.data.tobytes().decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ModelError("quant_state is not a JSON object")
    return state
