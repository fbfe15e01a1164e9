"""GGUF files, versions 2 and 3: memory-mapped, with every number checked before use.

A file consists of a header (magic, version, counts), metadata (keys with typed values), a table of tensors (name,
sizes, type, offset) and, from a multiple of ``general.alignment`` on, their data; all little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A tensor's sizes begin with the row length.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.gguf_parts import part_paths
from vllmlite.weights.host import HostTensor, HostWeight
from vllmlite.weights.not_checkpoints import refuse_foreign_file
from vllmlite.weights.schemes.gguf_blocks import BLOCK_SCHEMES, BLOCKS, FLOATS, NAMES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_KEY = 65535
MAX_ALIGNMENT = 1 << 20

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY, _BOOL = 8, 9, 7


@dataclass(frozen=True, slots=True)
class Gguf:
    """A model's metadata (numbers, booleans, text, and arrays as numpy arrays or lists of text) and tensors."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, HostWeight]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return the value of ``key``, or ``default``. Raises ModelError if the value is not of ``kind``."""
        value = self.metadata.get(key, default)
        if value is not default and (not isinstance(value, kind) or (kind is int and type(value) is bool)):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ModelError(f"{self.path}: metadata {key}: expected {names}; found {_shown(value)}")
        return value


def read_gguf(path: Path) -> Gguf:
    """Read the GGUF file at ``path``, and the other files of the model if it is split.

    Raises ModelError if a header, metadata or tensor table is invalid, or a file is missing."""
    try:
        about = os.stat(path)
        return _read(path, about.st_size, about.st_mtime_ns, about.st_ino)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=1)  # spec, tokenizer and weights each read it
def _read(path: Path, *_: int) -> Gguf:
    first = _read_part(path)
    count = first.get("split.count", int, 1)
    if count <= 1:
        return first
    return _joined([first if part == path else _read_part(part) for part in part_paths(path, count)])


def _read_part(path: Path) -> Gguf:
    refuse_foreign_file(path, ("gguf",))
    with path.open("rb") as file:
        size = file.seek(0, 2)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    return parse_gguf(path, np.frombuffer(mapped, np.uint8))


def parse_gguf(path: Path, data: NDArray[np.uint8]) -> Gguf:
    """Return the metadata and tensors of one file with the contents ``data``; the tensors are views of ``data``. Raises
    ModelError for invalid contents; ``path`` is for its message."""
    return _Reader(path, data).read()


def _joined(parts: list[Gguf]) -> Gguf:
    """Merge the files of a split model: the first one's metadata, and the tensors of all."""
    tensors: dict[str, HostWeight] = {}
    for number, part in enumerate(parts):
        found = part.get("split.no", int), part.get("split.count", int)
        if found != (number, len(parts)):
            raise ModelError(
                f"{part.path}: metadata split.no, split.count={found}; expected {(number, len(parts))}"
            )
        twice = [name for name in part.tensors if name in tensors]
        if twice:
            raise ModelError(f"{part.path}: tensor {_shown(twice[0])} is in another file, too")
        tensors |= part.tensors
    expected = parts[0].get("split.tensors.count", int, len(tensors))
    if len(tensors) != expected:
        raise ModelError(f"{parts[0].path}: {len(tensors)} tensors in all files; expected {expected}")
    return Gguf(parts[0].path, parts[0].metadata, tensors)


class _Reader:
    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path, self.data, self.bytes = path, data, data.data
        self.at = 0

    def read(self) -> Gguf:
        if self.take(4, "the magic").tobytes() != MAGIC:
            raise self.error(f"starts with {self.bytes[:4].tobytes()!r}; expected {MAGIC!r}")
        version = self.number("<u4", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            more = ", big-endian" if swapped in VERSIONS else ""
            raise self.error(f"version {version}{more}; accepted: 2 and 3, little-endian")
        # The sizes of the shortest tensor entry and the shortest metadata entry bound their counts.
        num_tensors = self.count("the number of tensors", 8 + 4 + 4 + 8)
        num_pairs = self.count("the number of metadata", 8 + 4 + 1)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.text("a key", MAX_KEY)
            if key in metadata:
                raise self.error(f"metadata {_shown(key)} occurs twice")
            metadata[key] = self.value(key)
        entries = [self.entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment % 8:
            raise self.error(f"general.alignment={_shown(alignment)}; accepted: multiples of 8")
        start = min(-(-self.at // alignment) * alignment, self.data.size)
        return Gguf(self.path, metadata, self.tensors(entries, self.data[start:], alignment))

    def tensors(
        self, entries: list[tuple[str, str, tuple[int, ...], int]], data: NDArray[np.uint8], alignment: int
    ) -> dict[str, HostWeight]:
        found: dict[str, HostWeight] = {}
        spans = []
        for name, kind, shape, offset in entries:
            if name in found:
                raise self.error(f"tensor {_shown(name)} occurs twice")
            elements, block_bytes = BLOCKS[kind]
            if shape[-1] % elements:
                raise self.error(
                    f"tensor {_shown(name)}: rows of {shape[-1]} are not whole blocks of {elements} in {kind}"
                )
            end = offset + math.prod(shape) // elements * block_bytes
            if offset % alignment or end > data.size:
                raise self.error(
                    f"tensor {_shown(name)}: bytes {offset} to {end}; expected a multiple of {alignment} and at most "
                    f"the {data.size} bytes of data" + (": the file is cut short" if end > data.size else "")
                )
            stored = data[offset:end]
            found[name] = (
                HostTensor(FLOATS[kind], shape, stored)
                if kind in FLOATS
                else BLOCK_SCHEMES[kind].pack(shape, stored)
            )
            spans.append((offset, end, name))
        spans.sort()
        for (_, end, _), (begin, _, name) in pairwise(spans):
            if begin < end:
                raise self.error(f"tensor {_shown(name)}: overlaps another one")
        return found

    def entry(self) -> tuple[str, str, tuple[int, ...], int]:
        """Read a tensor's name, type, shape and offset."""
        name = self.text("the name of a tensor", MAX_KEY)
        dims = self.number("<u4", f"tensor {_shown(name)}")
        if not 1 <= dims <= MAX_DIMS:
            raise self.error(f"tensor {_shown(name)}: {dims} dimensions; accepted: 1 to {MAX_DIMS}")
        shape = tuple(self.number("<u8", f"tensor {_shown(name)}") for _ in range(dims))[::-1]
        if min(shape) < 1 or math.prod(shape) >= 1 << 48:
            raise self.error(f"tensor {_shown(name)}: of shape {_shown(list(shape))}")
        number = self.number("<u4", f"tensor {_shown(name)}")
        kind = NAMES.get(number, str(number))
        if kind not in BLOCKS:
            raise self.error(
                f"tensor {_shown(name)}: is in {kind}; accepted: {', '.join(BLOCKS)}: quantise it to one of these"
            )
        return name, kind, shape, self.number("<u8", f"tensor {_shown(name)}")

    def value(self, key: str) -> Any:
        what = f"metadata {_shown(key)}"
        kind = self.number("<u4", what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            return self.scalar(kind, what)
        kind = self.number("<u4", what)
        if kind == _STRING:
            return self.texts(what, self.count(what, 8))
        dtype = np.dtype(self.dtype(kind, what))
        count = self.count(what, dtype.itemsize)
        return self.take(count * dtype.itemsize, what).view("<u1" if kind == _BOOL else dtype)

    def scalar(self, kind: int, what: str) -> Any:
        number = self.number("<u1" if kind == _BOOL else self.dtype(kind, what), what)
        return bool(number) if kind == _BOOL else number

    def dtype(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise self.error(f"{what}: a value of type {kind}; accepted: numbers, text, and arrays of these")
        return _SCALARS[kind]

    def count(self, what: str, least: int) -> int:
        """Read a count of items of at least ``least`` bytes each. Raises ModelError if they exceed the file."""
        found: int = self.number("<u8", what)
        if found > (self.data.size - self.at) // least:
            raise self.error(f"{what}: {found} in a file of {self.data.size} bytes")
        return found

    def number(self, dtype: str, what: str) -> Any:
        return self.take(np.dtype(dtype).itemsize, what).view(dtype)[0].item()

    def text(self, what: str, longest: int | None = None) -> str:
        length = self.count(what, 1)
        if longest is not None and length > longest:
            raise self.error(f"{what}: of {length} bytes; accepted: up to {longest}")
        return self.decoded(self.take(length, what).tobytes(), what)

    def texts(self, what: str, count: int) -> list[str]:
        """Read ``count`` strings. Inlined for speed: a vocabulary has a quarter of a million."""
        from_bytes: Callable[..., int] = int.from_bytes
        raw, at, size, found = self.bytes, self.at, self.data.size, []
        for _ in range(count):
            begin = at + 8
            at = begin + from_bytes(raw[at:begin], "little")
            if at > size or begin > size:
                raise self.error(f"{what}: ends in the middle of a string")
            found.append(raw[begin:at].tobytes())
        self.at = at
        return [self.decoded(text, what) for text in found]

    def decoded(self, text: bytes, what: str) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.error(f"{what}: {_shown(text)} is not UTF-8") from None

    def take(self, size: int, what: str) -> NDArray[np.uint8]:
        begin, self.at = self.at, self.at + size
        if self.at > self.data.size:
            raise self.error(f"{what}: {size} bytes from byte {begin} on, in a file of {self.data.size}")
        part = self.data[begin : self.at]
        # Some CPUs cannot read numbers at unaligned addresses.
        return part if begin % 8 == 0 else part.copy()

    def error(self, text: str) -> ModelError:
        return ModelError(f"{self.path}: {text}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
