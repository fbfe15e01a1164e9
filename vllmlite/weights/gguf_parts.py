"""Names of the files of a GGUF model in several parts, as llama-gguf-split gives them."""

from __future__ import annotations

import re
from pathlib import Path

from vllmlite.errors import ModelError

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
"""Parts are numbered from one; behind it is how many they are."""


def is_later_part(name: str) -> bool:
    """Whether a file of that name is a part of a model, and not its first."""
    match = _NAME.fullmatch(name)
    return match is not None and int(match[2]) > 1


def part_paths(path: Path, count: int) -> list[Path]:
    """All parts of a model in their order, beside the one at ``path``. ModelError if it has no part's name, or one is
    missing."""
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ModelError(f"{path}: is one of {count} parts; expected a name like X-00001-of-{count:05}.gguf")
    paths = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ModelError(f"{path}: is one of {count} parts, of which {len(missing)} are missing: {shown}")
    return paths
