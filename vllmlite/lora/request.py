"""LoRARequest, which names the adapter of a request, with vLLM's names and arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllmlite.errors import ParameterError

MAX_NAME = 256
"""Maximum characters of an adapter's name."""


@dataclass(frozen=True)
class LoRARequest:
    """An adapter: its name, its number, and the directory or GGUF file that stores it.

    Adapters with different numbers, names or paths are read separately, even if their files are equal."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = field(default=None, compare=False)
    """Name of the base model, for display."""
    tensorizer_config_dict: Mapping[str, Any] | None = field(default=None, compare=False)
    load_inplace: bool = field(default=False, compare=False)
    """Whether to read the files again, although the adapter has been read before."""
    lora_root: str | None = None
    """Directory outside which no file is read, whatever the links on the way; None: any file is."""
    is_3d_lora_weight: bool = field(default=False, compare=False)
    """Has no effect: the layout of the weights of experts is taken from the files."""

    def __post_init__(self) -> None:
        """Check the fields. Raises ParameterError."""
        check_name("lora_name", self.lora_name)
        if type(self.lora_int_id) is not int or self.lora_int_id < 1:
            raise ParameterError("lora_int_id", self.lora_int_id, "must be an integer from 1 up")
        object.__setattr__(self, "lora_path", _path(self.lora_path))
        if self.tensorizer_config_dict is not None:
            raise ParameterError(
                "tensorizer_config_dict", self.tensorizer_config_dict, "is not supported: must be None"
            )

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """The adapter's number."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """The adapter's path."""
        return self.lora_path


def _path(value: object) -> str:
    """Return ``value`` if it can be a path. Raises ParameterError."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    try:
        if isinstance(path, str) and path and b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise ParameterError("lora_path", value, "must be the path of an adapter's directory or GGUF file")


def check_name(name: str, value: object) -> str:
    """Return ``value`` if it can be the name of an adapter. Raises ParameterError that names the field ``name``."""
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= MAX_NAME
        or value != value.strip()
        or not value.isprintable()
    ):
        raise ParameterError(name, value, f"must be 1 to {MAX_NAME} printable characters")
    return value
