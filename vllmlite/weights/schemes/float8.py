"""Weights as 8-bit floats (Micikevicius et al. 2022), with a scale per tensor, per row, or per block.

``weight`` is e4m3 (or e5m2) ``[N, K]``. Its scales multiply it: ``weight_scale`` is a number, ``[N]``, ``[N, 1]`` or
``[ceil(N / R), ceil(K / C)]`` for blocks of R rows and C columns. DeepSeek's and Qwen's files call block scales
``weight_scale_inv``, though they multiply as well.

Products of the scheme ``fp8`` leave activations in the backend's dtype. Those of ``fp8_w8a8`` quantise them to e4m3
with a scale s, in float32 arithmetic: an element x becomes ``x * (1 / s)``, rounded to nearest (halves to even), at
most 448 in magnitude. s is

- static: ``input_scale``, which the checkpoint stores;
- dynamic: ``max(largest |x| / 448, 2 ** -100)`` over a row of activations, or over each 128 columns of it where the
  weight has blocks, which are 128 x 128.

An element of the product is the sum over the blocks of columns of s times the weight's scale times the sum of products
of e4m3 elements, in float32. Where a backend has no such products, and no products of :mod:`.grouped` e4m3, which leave
activations alone, the weight is dequantised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.host import Floats, HostTensor, PackedWeight, Part, Shape, float_tensor, float_values
from vllmlite.weights.schemes.codes import StoredCodes
from vllmlite.weights.schemes.compressed import ACTIVATIONS, SCALE_DTYPES, scale_part
from vllmlite.weights.schemes.grouped import (
    GROUP_UNIT,
    QWEIGHT,
    SCALES,
    GroupableScheme,
    GroupedScheme,
    Repack,
)
from vllmlite.weights.schemes.groups import Axes, check_scales

GRANULARITIES = ("tensor", "channel", "block")
MAX_GROUPED_SCALE = 128
"""Kernels multiply scales of grouped e4m3 by 2 ** 120, which must not overflow."""
BLOCK = 128
"""Rows and columns of a block whose products quantise activations."""
LARGEST = 448.0
"""The largest e4m3 value."""
LEAST_SCALE = 2.0**-100
"""Smallest scale of activations; its reciprocal is finite."""


@dataclass(frozen=True, slots=True)
class Float8Operand:
    """A weight ``[N, K]`` in the form of products that quantise activations: e4m3 codes ``[N, K]``, and float32 scales
    ``[N]``, or ``[ceil(N / 128), ceil(K / 128)]`` with blocks. ``input_scale`` is the scale of activations if it is
    static."""

    values: NDArray[np.uint8]
    scales: Floats
    blocks: bool
    input_scale: float | None


@dataclass(frozen=True, slots=True)
class Float8Scheme(GroupableScheme):
    """The scheme of 8-bit floats. ``granularity``: one of :data:`GRANULARITIES`; ``block``: rows and columns of a
    block; ``scale``: the scales' suffix; ``inputs``: ``dynamic`` or ``static`` if products quantise activations."""

    granularity: str
    block: tuple[int, int] = (1, 1)
    scale: str = "weight_scale"
    inputs: str | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """``fp8``, or ``fp8_w8a8`` if products quantise activations."""
        return "fp8" if self.inputs is None else "fp8_w8a8"

    @property
    def input_dtype(self) -> str | None:
        """The dtype to which products quantise activations; None: activations stay in the backend's dtype."""
        return None if self.inputs is None else "float8_e4m3"

    @property
    def row_unit(self) -> int:
        """Number of rows of a block."""
        return self.block[0]

    @property
    def column_unit(self) -> int:
        """Number of columns of a block."""
        return self.block[1]

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        if self.granularity == "block":
            blocks = -(-shape[0] // self.block[0]), -(-shape[1] // self.block[1])
            scales = Part(blocks, "float32", (*SCALE_DTYPES, "bfloat16", "float8_e8m0"))
        else:
            scales = scale_part(shape, None, self.granularity == "tensor")
        others = ("float8_e5m2",) if self.inputs is None else ()
        parts = {"weight": Part(shape, "float8_e4m3", others), self.scale: scales, **ACTIVATIONS}
        if self.inputs == "static":
            parts["input_scale"] = replace(parts["input_scale"], optional=False)
        return parts

    def axes(self) -> dict[str, Axes]:
        """Return how each part is sliced with its weight, by the part's suffix."""
        scales = {
            "tensor": Axes(),
            "channel": Axes(0),
            "block": Axes(0, 1, Fraction(self.block[0]), Fraction(self.block[1])),
        }[self.granularity]
        return {"weight": Axes(0, 1), self.scale: scales, **{suffix: Axes() for suffix in ACTIVATIONS}}

    def dequantize(self, weight: PackedWeight) -> Floats:
        """Return the values of ``weight`` as float32. Raises ModelError for scales that are not finite."""
        rows, columns = weight.shape
        scales = self._scales(weight)
        values = float_values(weight.parts["weight"])
        if self.granularity == "block":
            wide = np.repeat(scales, self.block[1], axis=1)[:, :columns]
            return np.asarray(values * np.repeat(wide, self.block[0], axis=0)[:rows])
        return np.asarray(values * (scales.reshape(-1, 1) if scales.size > 1 else scales.reshape(())))

    def operand(self, weight: PackedWeight) -> Float8Operand:
        """Return ``weight`` in the form of products that quantise activations. Raises ModelError for scales that are
        not finite, and for an ``input_scale`` that is not positive."""
        rows = weight.shape[0]
        scales, blocks, constant = self._scales(weight), self.granularity == "block", None
        if not blocks:
            scales = np.broadcast_to(scales.reshape(-1), rows)
        if self.inputs == "static":
            constant = float(float_values(weight.parts["input_scale"]).reshape(-1)[0])
            if not (np.isfinite(constant) and constant >= LEAST_SCALE):
                raise ModelError(f"input_scale is {constant}; accepted: finite numbers above 0")
        return Float8Operand(
            weight.parts["weight"].data.reshape(rows, -1),
            np.ascontiguousarray(scales, np.float32),
            blocks,
            constant,
        )

    def _scales(self, weight: PackedWeight) -> Floats:
        scales = float_values(weight.parts[self.scale])
        check_scales(scales)
        return scales

    @property
    def grouped(self) -> GroupedScheme | None:
        """The scheme of :meth:`to_grouped`; None if the size of groups is no multiple of :data:`GROUP_UNIT`."""
        if self.granularity == "block" and self.block[1] % GROUP_UNIT:
            return None
        return GroupedScheme(8, self.block[1] if self.granularity == "block" else None, True, floats=True)

    def to_grouped(self, weight: PackedWeight, repack: Repack = StoredCodes.repacked) -> PackedWeight | None:
        """Convert ``weight`` to the scheme :attr:`grouped`, without rounding. ModelError for scales that are not
        finite. None for e5m2, and for scales that are too large for its kernels."""
        scheme, stored, rows = self.grouped, weight.parts["weight"], weight.shape[0]
        scales = self._scales(weight)
        if (
            scheme is None
            or stored.dtype != "float8_e4m3"
            or np.abs(scales).max(initial=0) >= MAX_GROUPED_SCALE
        ):
            return None
        if self.granularity == "block":
            scales = np.repeat(scales, self.block[0], axis=0)[:rows]
        else:
            scales = np.broadcast_to(scales.reshape(-1, 1), (rows, 1))
        return PackedWeight(
            scheme,
            weight.shape,
            {
                QWEIGHT: replace(stored, dtype="uint8"),
                SCALES: float_tensor(np.ascontiguousarray(scales), "float32"),
            },
        )


def float8(values: Floats) -> NDArray[np.uint8]:
    """Return the nearest e4m3 of each value, ties to even; magnitudes above 448 become 448."""
    magnitudes = np.minimum(np.abs(values), LARGEST)
    bits = magnitudes.view(np.uint32)
    normal = ((bits + np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1))) >> np.uint32(20)) - 960
    subnormal = np.rint(magnitudes * np.float32(512)).astype(np.uint32)
    codes = np.where(magnitudes < 2.0**-6, subnormal, normal).astype(np.uint8)
    return codes | np.signbit(values).astype(np.uint8) << np.uint8(7)


def quantize(values: Floats) -> PackedWeight:
    """Quantise a weight ``[N, K]`` by rows, in the scheme whose products quantise activations by rows as well."""
    most = np.abs(values).max(axis=1, keepdims=True, initial=0)
    scales = np.maximum(most / np.float32(LARGEST), np.float32(LEAST_SCALE))
    return of_rows(float8(values * (np.float32(1) / scales)), scales)


def of_rows(codes: NDArray[np.uint8], scales: Floats) -> PackedWeight:
    """Return a weight of e4m3 ``codes [N, K]`` with ``scales [N, 1]``, whose products quantise activations."""
    parts = {
        "weight": HostTensor("float8_e4m3", codes.shape, codes.reshape(-1)),
        "weight_scale": float_tensor(scales, "float32"),
    }
    return PackedWeight(Float8Scheme("channel", inputs="dynamic"), codes.shape, parts)
