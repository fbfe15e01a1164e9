"""Weights as 4-bit floats in small blocks: MXFP4 (OCP Microscaling 2023) and NVFP4 (NVIDIA).

Codes are e2m1, two per byte, the first in the low nibble: uint8 ``[N, K / 2]``. MXFP4 has an e8m0 scale per 32 elements
of a row. NVFP4 has an e4m3 scale per 16 elements, and a float32 scale of the tensor that multiplies them in ModelOpt's
files (``weight_scale_2``) and divides them in compressed-tensors' (``weight_global_scale``).

gpt-oss stores the MXFP4 weights of all experts of a layer as one tensor ``[experts, N, K / 32, 16]``, with scales
``[experts, N, K / 32]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vllmlite.weights.host import Floats, HostTensor, PackedWeight, Part, Shape, float_tensor, float_values
from vllmlite.weights.schemes.bits import E2M1, pack_rows, table_values
from vllmlite.weights.schemes.codes import StoredCodes
from vllmlite.weights.schemes.gguf_blocks import block_data
from vllmlite.weights.schemes.grouped import (
    GROUP_UNIT,
    QWEIGHT,
    SCALES,
    GroupableScheme,
    GroupedScheme,
    Repack,
)
from vllmlite.weights.schemes.groups import Axes, SlicedScheme, check_scales, check_shape


@dataclass(frozen=True, slots=True)
class Float4Scheme(GroupableScheme):
    """``codes``, ``scale`` and ``total`` are the suffixes of the codes, the block scales and the tensor's scale.

    An empty ``total`` means that there is no tensor scale; ``divides``: the tensor's scale divides."""

    block: int
    codes: str
    scale: str
    total: str
    divides: bool
    name: str

    @property
    def column_unit(self) -> int:
        """The size of a block."""
        return self.block

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        *rows, columns = shape
        check_shape((math.prod(rows), columns), self.name, columns=self.block)
        blocks = (*rows, columns // self.block)
        scale_dtypes = ("float8_e8m0", ("uint8",)) if self.name == "mxfp4" else ("float8_e4m3", ())
        parts = {
            self.codes: Part((*rows, columns // 2), "uint8", (), ((*blocks, self.block // 2),)),
            self.scale: Part(blocks, *scale_dtypes),
        }
        if self.total:
            parts[self.total] = Part((1,), "float32", (), ((),))
            for suffix in ("input_global_scale", "input_scale"):
                parts[suffix] = Part((1,), "float32", (), ((),), optional=True)
        return parts

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        return {
            self.codes: Axes(0, 1, per_column=Fraction(2)),
            self.scale: Axes(0, 1, per_column=Fraction(self.block)),
            **{suffix: Axes() for suffix in (self.total, "input_global_scale", "input_scale")},
        }

    def take_rows(self, weight: PackedWeight, spans: Sequence[tuple[int, int]]) -> PackedWeight:
        """Return the rows of the spans ``(first, last)``, ``last`` excluded, one span after another. A stack of
        weights has the rows of the first weight, then those of the second, and so on."""
        parts = dict(weight.parts)
        rows = math.prod(weight.shape[:-1])
        for suffix in (self.codes, self.scale):
            part = parts[suffix]
            parts[suffix] = HostTensor(part.dtype, (rows, part.data.size // rows), part.data)
        return SlicedScheme.take_rows(self, PackedWeight(self, (rows, weight.shape[-1]), parts), spans)

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        scales = self._scales(weight)
        values = table_values(weight.parts[self.codes].data, E2M1, high_first=False)
        scaled = values.reshape(*scales.shape, self.block) * scales[..., None]
        return scaled.reshape(weight.shape)

    def _scales(self, weight: PackedWeight) -> Floats:
        stored = weight.parts[self.scale]
        if stored.dtype == "uint8":
            stored = HostTensor("float8_e8m0", stored.shape, stored.data)
        scales = float_values(stored)
        if self.total:
            total = float_values(weight.parts[self.total]).reshape(())
            scales = scales / total if self.divides else scales * total
        check_scales(scales)
        return scales

    @property
    def grouped(self) -> GroupedScheme | None:
        """Return the scheme of :meth:`to_grouped`; None for blocks that are no multiple of :data:`GROUP_UNIT`."""
        return None if self.block % GROUP_UNIT else GroupedScheme(4, self.block, True, floats=True)

    def to_grouped(self, weight: PackedWeight, repack: Repack = StoredCodes.repacked) -> PackedWeight | None:
        """Convert ``weight`` to :attr:`grouped`, without rounding; None if there is no such scheme."""
        scheme, (rows, columns) = self.grouped, weight.shape
        if scheme is None:
            return None
        codes = weight.parts[self.codes].data
        parts = {
            QWEIGHT: HostTensor("uint8", (rows, columns // 2), codes),
            SCALES: float_tensor(self._scales(weight), "bfloat16"),
        }
        return PackedWeight(scheme, weight.shape, parts)

    def of_ggml(self, weight: PackedWeight) -> PackedWeight:
        """Return a weight of ggml's MXFP4 blocks in this scheme.

        A block is the scale, then 16 bytes, whose low nibbles are the first 16 elements and whose high ones are the
        others."""
        rows, columns = weight.shape
        blocks = block_data(weight).reshape(rows, columns // 32, 17)
        codes = np.concatenate((blocks[..., 1:] & np.uint8(15), blocks[..., 1:] >> np.uint8(4)), axis=-1)
        packed = pack_rows(codes.reshape(rows, columns), 4)
        scales = np.ascontiguousarray(blocks[..., 0])
        parts = {
            self.codes: HostTensor("uint8", packed.shape, packed.reshape(-1)),
            self.scale: HostTensor("uint8", scales.shape, scales.reshape(-1)),
        }
        return PackedWeight(self, weight.shape, parts)


MXFP4 = Float4Scheme(32, "weight_packed", "weight_scale", "", False, "mxfp4")
MXFP4_EXPERTS = Float4Scheme(32, "blocks", "scales", "", False, "mxfp4")
NVFP4_COMPRESSED = Float4Scheme(16, "weight_packed", "weight_scale", "weight_global_scale", True, "nvfp4")
NVFP4_MODELOPT = Float4Scheme(16, "weight", "weight_scale", "weight_scale_2", False, "nvfp4")
