"""Fingerprint of everything, besides its hash, that the contents of a block depend on: the weights, and the arithmetic
that is applied to them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from vllmlite.weights.gguf_parts import named_parts

WHOLE_BYTES = 1 << 20
"""Maximum size of files that are read completely."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Number and size of the samples that are read of larger files, whose sizes and modification times also count."""


def fingerprint(weights: Path, *facts: object, times: bool = True) -> bytes:
    """Return a digest of the checkpoint at ``weights``, a directory, a file, or one file of a split model, and of
    ``facts``. Without ``times``, when files were changed does not count, so copies have the same digest."""
    total = sha256(repr(facts).encode())
    for path in sorted(_files(weights)) if weights.is_dir() else filter(Path.is_file, named_parts(weights)):
        found = path.stat()
        changed = (found.st_mtime_ns, found.st_ctime_ns) if times and found.st_size > WHOLE_BYTES else ()
        total.update(repr((path.name, found.st_size, changed)).encode())
        with path.open("rb") as file:
            if found.st_size <= WHOLE_BYTES:
                total.update(file.read())
                continue
            for sample in range(SAMPLES):
                file.seek((found.st_size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                total.update(file.read(SAMPLE_BYTES))
    return total.digest()


def module_digest(name: str) -> str:
    """Return the digest of an imported extension module's file, which identifies the version of its kernels."""
    path = getattr(sys.modules.get(name), "__file__", None)
    return "" if path is None else sha256(Path(path).read_bytes()).hexdigest()


def _files(directory: Path) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_file() and not entry.name.startswith("."):
                yield Path(entry.path)
