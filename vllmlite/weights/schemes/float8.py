"""Weights as 8-bit floats (Micikevicius et al. 2022), with a scale per tensor, per row, or per block.

``weight`` is e4m3 (or e5m2) ``[N, K]``. Its scales multiply it: ``weight_scale`` is a number, ``[N]``, ``[N, 1]`` or
``[ceil(N / R), ceil(K / C)]`` for blocks of R rows and C columns. DeepSeek's and Qwen's files call block scales
``weight_scale_inv``, though they multiply as well. Scales of activations are ignored: activations stay floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vllmlite.errors import ModelError
from vllmlite.weights.host import Floats, PackedWeight, Part, Shape, float_values
from vllmlite.weights.schemes.compressed import ACTIVATIONS, SCALE_DTYPES, scale_part
from vllmlite.weights.schemes.groups import Axes, SlicedScheme

GRANULARITIES = ("tensor", "channel", "block")


@dataclass(frozen=True, slots=True)
class Float8Scheme(SlicedScheme):
    """``granularity``: one of :data:`GRANULARITIES`; ``block``: rows and columns of a block; ``scale``: the scales'
    suffix."""

    granularity: str
    block: tuple[int, int] = (1, 1)
    scale: str = "weight_scale"
    name: str = "fp8"

    @property
    def row_unit(self) -> int:
        """Rows of a block."""
        return self.block[0]

    @property
    def column_unit(self) -> int:
        """Columns of a block."""
        return self.block[1]

    def parts(self, shape: Shape) -> dict[str, Part]:
        """See :class:`Scheme`."""
        if self.granularity == "block":
            blocks = -(-shape[0] // self.block[0]), -(-shape[1] // self.block[1])
            scales = Part(blocks, "float32", (*SCALE_DTYPES, "bfloat16", "float8_e8m0"))
        else:
            scales = scale_part(shape, None, self.granularity == "tensor")
        return {"weight": Part(shape, "float8_e4m3", ("float8_e5m2",)), self.scale: scales, **ACTIVATIONS}

    def axes(self) -> dict[str, Axes]:
        """See :class:`SlicedScheme`."""
        scales = {
            "tensor": Axes(),
            "channel": Axes(0),
            "block": Axes(0, 1, Fraction(self.block[0]), Fraction(self.block[1])),
        }[self.granularity]
        return {"weight": Axes(0, 1), self.scale: scales, **{suffix: Axes() for suffix in ACTIVATIONS}}

    def dequantize(self, weight: PackedWeight) -> Floats:
        """See :class:`Scheme`."""
        rows, columns = weight.shape
        scales = float_values(weight.parts[self.scale])
        if not np.isfinite(scales).all():
            raise ModelError("a scale is not finite")
        values = float_values(weight.parts["weight"])
        if self.granularity == "block":
            wide = np.repeat(scales, self.block[1], axis=1)[:, :columns]
            return np.asarray(values * np.repeat(wide, self.block[0], axis=0)[:rows])
        return np.asarray(values * (scales.reshape(-1, 1) if scales.size > 1 else scales.reshape(())))
