"""Writes GGUF files whose tensors are known beforehand, so that their data can be written in any order."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from vllmlite.weights.gguf import MAGIC
from vllmlite.weights.schemes.gguf_blocks import BLOCKS, NAMES
from vllmlite.weights.writer import Checkpoint, TensorFile

VERSION, ALIGNMENT = 3, 32
_TYPES = {name: number for number, name in NAMES.items()}
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_FORMATS = {_U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?"}


@dataclass(frozen=True, slots=True)
class Entry:
    """Type and shape of a tensor in a file's table."""

    kind: str
    """The type's name."""
    shape: tuple[int, ...]
    """The row length comes last."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        elements, block_bytes = BLOCKS[self.kind]
        return self.shape[-1] // elements * block_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * self.row_bytes


Table: TypeAlias = Mapping[str, Entry]
"""A file's tensors by name, in order."""


def gguf_checkpoint(path: Path, metadata: Mapping[str, Any], table: Table) -> Checkpoint:
    """Write the header of the file at ``path``, and return the file, to which the tensors of ``table`` can be written.

    Metadata are text, booleans, integers (stored as uint32), floats (float32), or lists of one of these; integers in
    lists are stored as int32. An empty list is one of text."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(table), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offsets, end = {}, 0
    for name, entry in table.items():
        offsets[name] = end
        sizes = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        parts += [_text(name), sizes, struct.pack("<IQ", _TYPES[entry.kind], end)]
        end += entry.num_bytes + -entry.num_bytes % ALIGNMENT
    header = b"".join(parts)
    header += bytes(-len(header) % ALIGNMENT)
    places = {name: (len(header) + offsets[name], entry.num_bytes) for name, entry in table.items()}
    return Checkpoint([TensorFile(path, header, places)])


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        own = _kind(value[0]) if value else _STRING
        kind = _I32 if own == _U32 else own
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_item(kind, one) for one in value)
    kind = _kind(value)
    return struct.pack("<I", kind) + _item(kind, value)


def _kind(value: Any) -> int:
    return {str: _STRING, bool: _BOOL, int: _U32, float: _F32}[type(value)]


def _item(kind: int, value: Any) -> bytes:
    return _text(value) if kind == _STRING else struct.pack(_FORMATS[kind], value)
