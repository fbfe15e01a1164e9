"""Names of the files of a split GGUF model, as llama-gguf-split gives them."""

from __future__ import annotations

import re
from pathlib import Path

from vllmlite.errors import ModelError

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
"""Name with the file's number, from one, and the number of files."""


def is_later_part(name: str) -> bool:
    """Return whether ``name`` is a file of a split model, but not its first."""
    match = _NAME.fullmatch(name)
    return match is not None and int(match[2]) > 1


def named_parts(path: Path) -> list[Path]:
    """Return the paths of all files of the split model to which ``path`` belongs by its name, in order; only ``path``
    if it is not named like a split file."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    return [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def part_paths(path: Path, count: int) -> list[Path]:
    """Return the paths of all files of the split model to which ``path`` belongs, in order.

    Raises ModelError if ``path`` is not named like a split file, or a file is missing."""
    paths = named_parts(path)
    if len(paths) != count:
        raise ModelError(f"{path}: is one of {count} files; expected a name like X-00001-of-{count:05}.gguf")
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ModelError(f"{path}: is one of {count} files, of which {len(missing)} are missing: {shown}")
    return paths
