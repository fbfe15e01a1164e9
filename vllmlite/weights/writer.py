"""Files of a checkpoint whose layout is known beforehand, so that tensors can be written in any order."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import HostTensor, num_bytes
from vllmlite.weights.safetensors import Layout, layout_header

SHARD_BYTES = 5 * 10**9
"""Maximum size of a safetensors file, as in transformers. A file may be larger only for a single larger tensor."""


class TensorFile:
    """A file with a header and tensors at fixed positions. Bytes that an earlier process wrote to it stay."""

    def __init__(self, path: Path, header: bytes, places: Mapping[str, tuple[int, int]]) -> None:
        """Open the file at ``path`` and write ``header``. ``places`` gives, for each tensor, the position of its first
        byte in the file and the number of its bytes."""
        self.path, self.places = path, places
        size = max([len(header), *(begin + count for begin, count in places.values())])
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                os.posix_fallocate(self._descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(self._descriptor, size)
            self._write(header, 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: HostTensor) -> None:
        """Write a tensor's bytes to its position."""
        count = self.places[name][1]
        if tensor.data.nbytes != count:
            raise ValueError(f"{name}: {tensor.data.nbytes} bytes are not {count}")
        self.write_part(name, tensor.data, 0)

    def write_part(self, name: str, data: NDArray[np.uint8], offset: int) -> None:
        """Write some of a tensor's bytes, ``offset`` bytes after its beginning."""
        begin, count = self.places[name]
        if offset + data.nbytes > count:
            raise ValueError(f"{name}: {data.nbytes} bytes from {offset} on exceed {count}")
        self._write(data.data, begin + offset)

    def flush(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _write(self, data: bytes | memoryview, position: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._descriptor, left, position)
            left, position = left[written:], position + written


class Checkpoint:
    """Tensors of one checkpoint in files of a directory, to which they are written in any order."""

    def __init__(self, files: list[TensorFile]) -> None:
        self.files = files
        self._file_of = {name: file for file in files for name in file.places}

    def write(self, name: str, tensor: HostTensor) -> None:
        """Write a tensor."""
        self._file_of[name].write(name, tensor)

    def write_part(self, name: str, data: NDArray[np.uint8], offset: int) -> None:
        """Write some of a tensor's bytes, ``offset`` bytes after its beginning."""
        self._file_of[name].write_part(name, data, offset)

    def flush(self) -> None:
        """Wait until everything written is on the disk."""
        for file in self.files:
            file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


def safetensors_checkpoint(directory: Path, layout: Layout) -> Checkpoint:
    """Create one safetensors file of ``layout``, or shards and an index if it would exceed :data:`SHARD_BYTES`. Tensors
    of multiples of 64 bytes come first, so that all of these lie at such multiples."""
    ordered = dict(sorted(layout.items(), key=lambda entry: num_bytes(*entry[1]) % 64 != 0))
    shards = list(_shards(ordered))
    total = len(shards)
    names = (
        ["model.safetensors"]
        if total == 1
        else [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    )
    if total > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(num_bytes(*entry) for entry in layout.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    files: list[TensorFile] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            header = layout_header(shard)
            files.append(TensorFile(directory / name, header, _places(shard, len(header))))
    except BaseException:
        for file in files:
            file.close()
        raise
    return Checkpoint(files)


def _shards(layout: Layout) -> Iterator[dict[str, tuple[str, tuple[int, ...]]]]:
    shard: dict[str, tuple[str, tuple[int, ...]]] = {}
    size = 0
    for name, entry in layout.items():
        count = num_bytes(*entry)
        if shard and size + count > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = entry
        size += count
    yield shard


def _places(layout: Layout, begin: int) -> dict[str, tuple[int, int]]:
    places = {}
    for name, entry in layout.items():
        places[name] = begin, num_bytes(*entry)
        begin += places[name][1]
    return places
