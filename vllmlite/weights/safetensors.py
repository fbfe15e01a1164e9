"""safetensors files: memory-mapped reading, with every number of the header checked before use; and writing.

A file is an 8-byte little-endian length n, n bytes of JSON header, then the tensors' bytes, which the header's
``data_offsets`` must cover exactly, without gaps or overlaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.host import ITEM_SIZE, HostTensor, num_bytes
from vllmlite.weights.not_checkpoints import refuse_foreign_file

MAX_HEADER = 100_000_000
"""Maximum header size of the format, in bytes."""

Layout: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of every tensor of a file, in file order."""

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, HostTensor]:
    """Return the tensors of ``path`` by name, as views of the mapped file. Raises ModelError for an invalid file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_safetensors(path, np.frombuffer(mapped, np.uint8))


def parse_safetensors(
    path: Path, data: NDArray[np.uint8], max_header: int = MAX_HEADER
) -> dict[str, HostTensor]:
    """Return the tensors of a file with the contents ``data`` by name, as views of ``data``. Raises ModelError for
    invalid contents, or a header of more than ``max_header`` bytes; ``path`` is for its message."""
    if data.size < 8:
        raise ModelError(f"{path}: {data.size} bytes; expected at least the 8 of the header's length")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(max_header, data.size - 8):
        refuse_foreign_file(path)
        raise ModelError(
            f"{path}: a header of {length} bytes; expected at most {max_header} in a file of {data.size} bytes"
        )
    header = _header(path, data[8 : 8 + length].tobytes())
    data = data[8 + length :]
    tensors = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry, data.size)
        tensors[name] = HostTensor(dtype, shape, _aligned(data[begin:end], ITEM_SIZE[dtype]))
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _error(path, name, f"data from byte {position}", f"from byte {begin}: a gap or an overlap")
        position = end
    if position != data.size:
        raise ModelError(
            f"{path}: {data.size} bytes of data; expected the {position} that the header describes"
        )
    return tensors


def layout_header(layout: Layout) -> bytes:
    """Return the beginning of a file with tensors of ``layout``, whose data follow in the same order. The data begin at
    a multiple of 64 bytes, so that a CPU can read them in place efficiently."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spelled = {name: code for code, name in _DTYPES.items()}
    position = 0
    for name, (dtype, shape) in layout.items():
        end = position + num_bytes(dtype, shape)
        header[name] = {"dtype": spelled[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, tensors: Iterable[HostTensor], layout: Layout) -> None:
    """Write a new file of ``tensors``, which come one at a time in the order of ``layout``."""
    with path.open("xb") as file:
        file.write(layout_header(layout))
        for tensor, (name, expected) in zip(tensors, layout.items(), strict=True):
            if (tensor.dtype, tensor.shape) != expected:
                raise ValueError(f"{name}: {tensor.dtype}{list(tensor.shape)} is not {expected}")
            tensor.data.tofile(file)


def _header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise ModelError(f"{path}: the header has {name[:80]!r} twice")
            values[name] = value
        return values

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        refuse_foreign_file(path)
        raise ModelError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is a JSON {type(header).__name__}; expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: __metadata__ in the header; expected an object of strings")
    return header


def _entry(path: Path, name: str, entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """Return dtype, shape, first and last + 1 byte of a header entry, checked against ``size`` bytes of data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _error(path, name, "an object of dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _error(path, name, f"dtype {', '.join(_DTYPES)}", dtype)
    if not _are_counts(shape):
        raise _error(path, name, "a shape of integers from 0 up", shape)
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise _error(path, name, f"data_offsets, ascending, within the {size} bytes of data", offsets)
    begin, end = offsets
    if end > size:
        raise _error(path, name, f"bytes {begin} to {end}", f"{size} bytes of data: the file is cut short")
    dtype = _DTYPES[dtype]
    bytes_needed = num_bytes(dtype, shape)
    if end - begin != bytes_needed:
        raise _error(path, name, f"{bytes_needed} bytes for {dtype} {shape}", f"{end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _aligned(data: NDArray[np.uint8], item_size: int) -> NDArray[np.uint8]:
    """Return ``data``, or a copy if it is not aligned to its element size, which some CPUs require."""
    return data if data.ctypes.data % item_size == 0 else data.copy()


def _error(path: Path, name: str, expected: str, found: object) -> ModelError:
    shown = str(found)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ModelError(f"{path}: tensor {name!r}: expected {expected}; found {shown}")
