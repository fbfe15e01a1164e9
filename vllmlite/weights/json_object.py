"""Read the JSON files of a checkpoint, each of which holds one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllmlite.errors import ModelError
from vllmlite.weights.not_checkpoints import refuse_foreign_file


def read_object(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the object in ``file``, or {} if the file is absent and ``optional``. Raises ModelError."""
    if optional and not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        refuse_foreign_file(file)
        raise ModelError(f"{file}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds {type(content).__name__}; accepted: a JSON object")
    return content
