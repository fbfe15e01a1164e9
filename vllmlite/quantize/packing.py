"""Pack weights that another framework has rounded into the tensors of a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError, ParameterError
from vllmlite.weights.host import Floats, HostTensor, Scheme
from vllmlite.weights.packers import Rounded, packed, packed_float8
from vllmlite.weights.schemes.awq import AwqScheme
from vllmlite.weights.schemes.compressed import PackedIntScheme
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.schemes.gguf_blocks import BLOCK_SCHEMES
from vllmlite.weights.schemes.gptq import GptqScheme
from vllmlite.weights.schemes.tiles import GROUP, TILES

_GGUF = {"gguf-q8_0": "Q8_0", "gguf-q4_0": "Q4_0"}
_BITS = {
    "int8": (8,), "int4": (4,), "gptq": (4, 2, 3, 8), "gptq_v2": (4, 2, 3, 8), "awq": (4,),
    "compressed-tensors": (4, 8), "fp8": (8,), "gguf-q8_0": (8,), "gguf-q4_0": (4,),
}  # fmt: skip
PACK_FORMATS = tuple(_BITS)
"""Formats of :func:`pack`."""
_ZEROS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
_NUMPY = {
    "int32": "<i4", "int64": "<i8", "float16": "<f2", "float32": "<f4", "uint8": "u1", "bfloat16": "<u2",
    "float8_e4m3": "u1",
}  # fmt: skip
TOLERANCE = 0.25
"""Maximum difference of a float from the value of its code, relative to the scale; bfloat16 cannot represent 8-bit
codes exactly."""


def pack(
    weight: Any,
    scales: Any,
    zeros: Any = None,
    *,
    format: str,
    bits: int | None = None,
    group_of: Any = None,
) -> dict[str, NDArray[Any]]:
    """Return the tensors that a checkpoint in ``format`` stores for a weight that is already rounded, by the suffix
    that replaces ``weight`` in the weight's name.

    ``weight`` ``[out, in]`` holds integer codes, or floats that are (code - zero) * scale already. ``scales`` are
    ``[out, groups]``, or ``[out]`` for one scale in a row, of groups of adjacent columns, unless ``group_of`` ``[in]``
    gives the group of each column (GPTQ's ``g_idx``). With ``zeros``, of the shape of ``scales``, codes are 0 to
    2 ** bits - 1; without, they are -2 ** (bits - 1) to 2 ** (bits - 1) - 1. For ``fp8``, ``weight`` is floats, and
    ``scales`` are one for each row. All arguments may be NumPy arrays, or tensors of torch in host memory.

    Scales are rounded to the dtype in which the format stores them. bfloat16 is returned as uint16 and e4m3 as uint8,
    bit by bit, since NumPy has neither. ParameterError says which argument is out of range, and what is accepted."""
    if format not in _BITS:
        raise ParameterError("format", format, f"accepted: {', '.join(PACK_FORMATS)}")
    bits = _BITS[format][0] if bits is None else bits
    if bits not in _BITS[format]:
        raise ParameterError(
            "bits", bits, f"accepted with {format}: {', '.join(map(str, sorted(_BITS[format])))}"
        )
    values, scale = _array("weight", weight), _floats("scales", scales)
    if values.ndim != 2 or not values.size:
        raise ParameterError("weight", list(values.shape), "accepted: two dimensions, [out, in]")
    rows, columns = values.shape
    scale = scale.reshape(rows, -1) if scale.shape in ((rows,), (rows, 1)) else scale
    if scale.ndim != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise ParameterError(
            "scales", list(scale.shape), f"accepted: [{rows}, groups], groups a divisor of {columns}"
        )
    if format == "fp8":
        return _pack_float8(values, scale, zeros, group_of)
    groups, middle = scale.shape[1], 1 << (bits - 1)
    if zeros is None:
        zero = np.full(scale.shape, middle, np.int64)
    else:
        zero = _whole("zeros", _array("zeros", zeros).reshape(rows, -1), 0, 2 * middle - 1)
        if zero.shape != scale.shape:
            raise ParameterError(
                "zeros", list(zero.shape), f"accepted: the shape of scales, {list(scale.shape)}"
            )
        if format not in _ZEROS and (zero != middle).any():
            raise ParameterError(
                "zeros", int(zero[zero != middle][0]), f"accepted with {format}: {middle} alone"
            )
    index = np.arange(columns) // (columns // groups)
    if group_of is not None:
        if format not in ("gptq", "gptq_v2", "compressed-tensors"):
            raise ParameterError("group_of", "an array", "accepted with gptq, gptq_v2 and compressed-tensors")
        index = _whole("group_of", _array("group_of", group_of).reshape(-1), 0, groups - 1)
        if len(index) != columns:
            raise ParameterError("group_of", list(index.shape), f"accepted: [{columns}]")
    codes = _codes(values, scale[:, index], zero[:, index], 2 * middle - 1, signed=zeros is None)
    scheme = _scheme(format, bits, groups, columns, symmetric=zeros is None, ordered=group_of is None)
    rounded = Rounded(codes, scale, zero.astype(np.uint8), None if group_of is None else index)
    try:
        scheme.parts((rows, columns))
        made = packed(rounded, scheme)
    except ModelError as error:
        raise ParameterError("weight", list(values.shape), str(error)) from error
    return {suffix: _as_numpy(part) for suffix, part in made.parts.items()}


def _scheme(format: str, bits: int, groups: int, columns: int, *, symmetric: bool, ordered: bool) -> Scheme:
    size = columns // groups
    if format in TILES or format in _GGUF:
        if size != GROUP:
            raise ParameterError("scales", f"groups of {size}", f"accepted with {format}: groups of {GROUP}")
        return TILES[format] if format in TILES else BLOCK_SCHEMES[_GGUF[format]]
    group_size = None if groups == 1 else size
    if format == "awq":
        return AwqScheme(group_size)
    if format == "compressed-tensors":
        return PackedIntScheme(bits, group_size, symmetric, ordered)
    return GptqScheme(bits, group_size, symmetric, 2 if format == "gptq_v2" else 1, ordered)


def _pack_float8(values: NDArray[Any], scales: Floats, zeros: Any, group_of: Any) -> dict[str, NDArray[Any]]:
    for field, given in (("zeros", zeros), ("group_of", group_of)):
        if given is not None:
            raise ParameterError(field, "an array", "accepted with fp8: None")
    if scales.shape[1] != 1 or not (scales > 0).all():
        raise ParameterError("scales", list(scales.shape), "accepted with fp8: one above 0 for each row")
    made = packed_float8(_floats("weight", values), scales, Float8Scheme("channel"))
    return {suffix: _as_numpy(part) for suffix, part in made.parts.items()}


def _codes(
    values: NDArray[Any], scales: Floats, zeros: NDArray[np.int64], largest: int, *, signed: bool
) -> NDArray[np.uint8]:
    """Return the unsigned codes of ``values``, which are codes or rounded floats."""
    if np.issubdtype(values.dtype, np.integer):
        shift = zeros if signed else 0
        low = -(largest + 1) // 2 if signed else 0
        return np.asarray(_whole("weight", values, low, low + largest) + shift, np.uint8)
    floats = _floats("weight", values)
    ratio = np.divide(floats, scales, out=np.zeros_like(floats), where=scales != 0) + zeros
    codes = np.clip(np.rint(ratio), 0, largest)
    wrong = np.abs((codes - zeros) * scales - floats) > TOLERANCE * np.abs(scales)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise ParameterError(
            "weight",
            float(floats[row, column]),
            f"element [{row}, {column}] is not (code - zero) * scale with a scale of {scales[row, column]:.6g}: round "
            "the weight first",
        )
    return codes.astype(np.uint8)


def _array(field: str, given: Any) -> NDArray[Any]:
    if hasattr(given, "detach"):  # torch's, which NumPy reads unless it is bfloat16
        given = given.detach()
        given = given.float() if given.is_floating_point() else given
    try:
        found = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(
            field, type(given).__name__, f"accepted: an array of numbers ({error})"
        ) from error
    if not np.issubdtype(found.dtype, np.number):
        raise ParameterError(field, str(found.dtype), "accepted: an array of numbers")
    return found


def _floats(field: str, given: Any) -> Floats:
    found = np.ascontiguousarray(_array(field, given), np.float32)
    if not np.isfinite(found).all():
        raise ParameterError(field, float(found[~np.isfinite(found)][0]), "accepted: finite numbers")
    return found


def _whole(field: str, values: NDArray[Any], least: int, most: int) -> NDArray[np.int64]:
    found = values.astype(np.int64)
    wrong = (found != values) | (found < least) | (found > most)
    if wrong.any():
        raise ParameterError(
            field, values[wrong][0].item(), f"accepted: whole numbers from {least} to {most}"
        )
    return found


def _as_numpy(tensor: HostTensor) -> NDArray[Any]:
    return tensor.data.view(_NUMPY[tensor.dtype]).reshape(tensor.shape)
