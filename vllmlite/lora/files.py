"""Read the files of an adapter: each file is copied to memory, never mapped, and the copy is hashed and parsed.

If a file is replaced, truncated or written to while it is read, reading fails; later changes have no effect. With a
root directory, no file outside it is opened, even through links.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError, ParameterError

CHUNK = 1 << 19
"""Bytes that are read and hashed at a time."""
MAX_CONFIG = 1 << 20
"""Maximum bytes of ``adapter_config.json``."""

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of the weights' file, the preferred one first."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """Copies of the files of an adapter."""

    path: Path
    """Path of the file with the weights, for messages."""
    config: bytes | None
    """Contents of ``adapter_config.json``; None for a GGUF file, which has metadata of its own."""
    weights: NDArray[np.uint8]
    digest: bytes
    """SHA-256 over the contents of all files."""


def read_files(path: Path, max_bytes: int, root: Path | None, pace: Callable[[], None]) -> AdapterFiles:
    """Return copies of the files of the adapter at ``path``: a directory in PEFT's format, or a GGUF file.

    ``max_bytes`` limits the size of the weights; ``pace`` is called between pieces of work. Raises ParameterError if a
    file is outside ``root``, ModelError if a file is missing, too large, or changes while it is read."""
    with _reported(path):
        if not path.is_dir():
            weights = _copy(path, max_bytes, root, pace)
            return AdapterFiles(path, None, weights, _digest([weights], pace))
        config = _copy(path / CONFIG, MAX_CONFIG, root, pace)
    found = next((path / name for name in WEIGHTS if (path / name).exists()), None)
    if found is None:
        raise ModelError(f"{path}: has none of {', '.join(WEIGHTS)}")
    with _reported(found):
        weights = _copy(found, max_bytes, root, pace)
    return AdapterFiles(found, config.tobytes(), weights, _digest([config, weights], pace))


class _reported:
    """Context manager that turns an OSError into a ModelError about ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise the ModelError."""
        if isinstance(error, OSError):
            name = self.path if error.filename is None else error.filename
            raise ModelError(f"{name}: cannot be read: {error.strerror or error}") from error


def _digest(contents: Sequence[NDArray[np.uint8]], pace: Callable[[], None]) -> bytes:
    """Return a digest of ``contents`` that also depends on where each of them ends."""
    digest = sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        for at in range(0, len(content), CHUNK):
            digest.update(content[at : at + CHUNK].data)
            pace()
    return digest.digest()


def _copy(path: Path, max_bytes: int, root: Path | None, pace: Callable[[], None]) -> NDArray[np.uint8]:
    """Return the contents of a file. Raises OSError, ModelError, or ParameterError."""
    descriptor = _open(path, root)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ModelError(f"{path}: is not a regular file")
        if before.st_size > max_bytes:
            raise ModelError(f"{path}: {before.st_size} bytes; accepted: at most {max_bytes}")
        content = np.empty(before.st_size, np.uint8)
        at = 0
        while at < len(content):
            count = os.readv(descriptor, [content[at : at + CHUNK].data])
            if not count:
                raise ModelError(f"{path}: was truncated to {at} bytes while it was read")
            at += count
            pace()
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ModelError(f"{path}: was changed while it was read: try again")
    return content


def _open(path: Path, root: Path | None) -> int:
    """Open a file for reading, without waiting for the other end of a pipe."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if root is None:
        return os.open(path, flags)
    inside = within(path, root)
    descriptor = os.open(root.resolve(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in inside.parts[:-1]:
            above, descriptor = (
                descriptor,
                os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor),
            )
            os.close(above)
        return os.open(inside.name, flags | os.O_NOFOLLOW, dir_fd=descriptor)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link has taken the place of what was checked
            raise ModelError(f"{path}: was changed while it was opened: try again") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            os.close(descriptor)


def within(path: Path, root: Path) -> Path:
    """Return ``path`` relative to ``root``, with all links resolved. Raises ParameterError if it is outside."""
    try:
        real, real_root = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, before Python 3.13
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if real == real_root or not real.is_relative_to(real_root):
        raise ParameterError("lora_path", str(path), "must be inside the directory of --lora-root")
    if real.is_symlink():  # one of a loop, which later versions leave as it is
        raise ModelError(f"{path}: cannot be read: its links make a loop")
    return real.relative_to(real_root)
