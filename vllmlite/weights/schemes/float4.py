"""Weights as 4-bit floats in small blocks: MXFP4 (OCP Microscaling 2023) and NVFP4 (NVIDIA).

Codes are e2m1, two per byte, the first in the low nibble: uint8 ``[N, K / 2]``. MXFP4 has an e8m0 scale per 32 elements
of a row. NVFP4 has an e4m3 scale per 16 elements, and a float32 scale of the tensor that multiplies them in ModelOpt's
files (``weight_scale_2``) and divides them in compressed-tensors' (``weight_global_scale``).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vllmlite.weights.host import Floats, HostTensor, PackedWeight, Part, Shape, float_values
from vllmlite.weights.schemes.bits import table_values
from vllmlite.weights.schemes.groups import Axes, SlicedScheme, check_scales, check_shape

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the 16 codes of e2m1."""


@dataclass(frozen=True, slots=True)
class Float4Scheme(SlicedScheme):
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
        check_shape(shape, self.name, columns=self.block)
        rows, columns = shape
        scale_dtypes = ("float8_e8m0", ("uint8",)) if self.name == "mxfp4" else ("float8_e4m3", ())
        parts = {
            self.codes: Part((rows, columns // 2), "uint8"),
            self.scale: Part((rows, columns // self.block), *scale_dtypes),
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

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        stored = weight.parts[self.scale]
        if stored.dtype == "uint8":
            stored = HostTensor("float8_e8m0", stored.shape, stored.data)
        scales = float_values(stored)
        if self.total:
            total = float_values(weight.parts[self.total]).reshape(())
            scales = scales / total if self.divides else scales * total
        check_scales(scales)
        values = table_values(weight.parts[self.codes].data, VALUES, high_first=False)
        scaled = values.reshape(*scales.shape, self.block) * scales[..., None]
        return scaled.reshape(weight.shape)


MXFP4 = Float4Scheme(32, "weight_packed", "weight_scale", "", False, "mxfp4")
NVFP4_COMPRESSED = Float4Scheme(16, "weight_packed", "weight_scale", "weight_global_scale", True, "nvfp4")
NVFP4_MODELOPT = Float4Scheme(16, "weight", "weight_scale", "weight_scale_2", False, "nvfp4")
