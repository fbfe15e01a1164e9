"""compressed-tensors' ``int-quantized`` with quantised activations (W8A8): products of int8 with int8.

The weight is stored as :class:`IntScheme` describes it, with a scale per row or per tensor. Products quantise a row x
of activations to ``q = clamp(round(x / s) + z, -128, 127)``, with float32 arithmetic, halves rounded to even, and
x / s computed as x times the reciprocal of s:

- static: s is ``input_scale`` and z is ``input_zero_point`` (0 if absent), which the checkpoint stores;
- dynamic and symmetric: s = max |x| / 127, with the reciprocal 127 / max |x|, and z = 0;
- dynamic and asymmetric: s = (high - low) / 255 for the largest and least of 0 and the elements of x, with the
  reciprocal 255 / (high - low), and z = round(-128 - low / s).

A row of zeros has the reciprocal 0. An element of the product is ``sum of (q - z) * (w - zero)``, an exact integer,
rounded to float32 and multiplied by s times the weight's scale; the bias is added last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.host import Floats, PackedWeight, Part, Shape, float_values
from vllmlite.weights.schemes.compressed import SCALE_DTYPES, IntScheme, scales_of
from vllmlite.weights.schemes.groups import check_scales


@dataclass(frozen=True, slots=True)
class InputScale:
    """How products quantise activations: by the constants ``scale`` and ``zero`` or, for each row, by its largest
    magnitude (``symmetric``) or its range."""

    symmetric: bool = True
    scale: float | None = None
    zero: int = 0


@dataclass(frozen=True, slots=True)
class Int8Operand:
    """A weight ``[N, K]`` in the form in which backends take it: int8 values ``[N, K]``, float32 scales ``[N]``, int8
    zeros ``[N]`` or None."""

    values: NDArray[np.int8]
    scales: Floats
    zeros: NDArray[np.int8] | None
    inputs: InputScale


@dataclass(frozen=True, slots=True)
class W8A8Scheme(IntScheme):
    """The scheme of int8 weights whose products quantise activations: ``static``: by stored constants;
    ``symmetric_input``: without a zero point."""

    static: bool = False
    symmetric_input: bool = True
    name: str = "w8a8"

    @property
    def input_dtype(self) -> str:
        """The dtype to which products quantise activations; None: activations stay in the backend's dtype."""
        return "int8"

    @property
    def max_columns(self) -> int:
        """Maximum number of columns for which the sum of a row's products fits into 32 bits."""
        return (1 << 31) >> (14 + (not self.symmetric) + (not self.symmetric_input))

    def parts(self, shape: Shape) -> dict[str, Part]:
        """Return the tensors stored for a weight of ``shape``, by the suffix that replaces ``weight`` in its name."""
        parts = IntScheme.parts(self, shape)
        parts["input_scale"] = Part((1,), "bfloat16", SCALE_DTYPES, ((), (1, 1)), optional=not self.static)
        parts["input_zero_point"] = Part((1,), "int8", ("int32", "int64"), ((), (1, 1)), optional=True)
        return parts

    def operand(self, weight: PackedWeight) -> Int8Operand:
        """Return ``weight`` in the form that backends take. Raises ModelError for scales that are not finite or not
        positive, and for zero points out of range."""
        shape = weight.shape[0], weight.shape[1]
        if shape[1] > self.max_columns:
            raise ModelError(f"a weight {list(shape)} in w8a8: accepted: up to {self.max_columns} columns")
        scales, zeros = float_values(scales_of(weight)).reshape(-1), self.zeros(weight)
        check_scales(scales)
        return Int8Operand(
            weight.parts["weight"].data.view(np.int8).reshape(shape),
            np.ascontiguousarray(scales),
            None if zeros is None else np.ascontiguousarray(zeros ^ np.uint8(128)).reshape(-1).view(np.int8),
            self._inputs(weight),
        )

    def _inputs(self, weight: PackedWeight) -> InputScale:
        if not self.static:
            return InputScale(self.symmetric_input)
        scale = float(float_values(weight.parts["input_scale"]).reshape(-1)[0])
        if not (np.isfinite(scale) and scale > 0):
            raise ModelError(f"input_scale is {scale}; accepted: finite numbers above 0")
        stored = weight.parts.get("input_zero_point")
        if stored is None:
            return InputScale(self.symmetric_input, scale)
        zero = int(stored.data.view({"int8": "i1", "int32": "<i4", "int64": "<i8"}[stored.dtype])[0])
        if not -128 <= zero <= 127 or (self.symmetric_input and zero):
            accepted = "0" if self.symmetric_input else "-128 to 127"
            raise ModelError(f"input_zero_point is {zero}; accepted: {accepted}")
        return InputScale(self.symmetric_input, scale, zero)
