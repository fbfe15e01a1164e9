"""Typed access to a Hugging Face ``config.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from vllmlite.errors import ModelError
from vllmlite.models.gguf import gguf_config
from vllmlite.weights.json_object import read_object

MAXIMA = {"num_hidden_layers": 4096, "num_attention_heads": 1 << 16}
"""Upper bounds of some keys, so that a damaged file cannot exhaust memory before its tensors are checked."""
_REQUIRED: Any = object()


class HfConfig:
    """The values of a JSON object; a key whose value is null counts as absent.

    Every error is a ModelError that names the file, the key, the value found and the accepted values."""

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        spelled: Mapping[str, str] | None = None,
        read: set[str] | None = None,
        unread: frozenset[str] = frozenset(),
    ) -> None:
        self._values = values
        self.where = where
        self._spelled = spelled or {}
        self._read = set() if read is None else read
        """Keys read so far; shared by all configurations derived from the same object."""
        self._unread = unread
        """Keys whose values do not come from the file; reading them is not recorded."""

    @classmethod
    def read(cls, path: Path) -> HfConfig:
        """Read ``config.json`` of the model directory ``path``, or its equivalent of the GGUF file ``path``."""
        if path.is_file():
            return cls(gguf_config(path), str(path))
        return cls.of_file(path / "config.json")

    @classmethod
    def of_file(cls, file: Path) -> HfConfig:
        """Read the JSON object in ``file``."""
        return cls(read_object(file), str(file))

    def spelling(self, **keys: str) -> HfConfig:
        """Return the configuration with family-specific names of common keys, such as ``hidden_size="n_embd"``.

        The common name is used if the specific one is absent."""
        return HfConfig(self._values, self.where, {**self._spelled, **keys}, self._read, self._unread)

    def default(self, **values: Any) -> HfConfig:
        """Return the configuration with ``values`` for keys that are absent."""
        absent = {key: value for key, value in values.items() if self.get(key) is None}
        return HfConfig({**self._values, **absent}, self.where, self._spelled, self._read, self._unread)

    def fixed(self, **values: Any) -> HfConfig:
        """Return the configuration with ``values`` that replace those of the file."""
        spelled = {key: own for key, own in self._spelled.items() if key not in values}
        unread = self._unread | values.keys()
        return HfConfig({**self._values, **values}, self.where, spelled, self._read, unread)

    def without_effect(self, *keys: str) -> None:
        """Mark ``keys`` as read: their values do not change the results of this model."""
        self._read.update(map(self._key, keys))

    def keys(self) -> Set[str]:
        """Return the keys of the object, including those with null."""
        return self._values.keys()

    def remaining(self) -> dict[str, Any]:
        """Return the values that have not been read."""
        return {key: value for key, value in self._values.items() if key not in self._read}

    def _key(self, key: str) -> str:
        own = self._spelled.get(key, key)
        return own if self._values.get(own) is not None or key not in self._values else key

    def error(self, key: str, accepted: str) -> ModelError:
        """Return the error for ``key``; the caller raises it."""
        key = self._key(key)
        if key not in self._values:
            return ModelError(f"{self.where}: {key} is absent; accepted: {accepted}")
        shown = repr(self._values[key])
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ModelError(f"{self.where}: {key}={shown}; accepted: {accepted}")

    def get(self, key: str) -> Any:
        """Return the raw value, or None if it is absent."""
        key = self._key(key)
        if key not in self._unread:
            self._read.add(key)
        return self._values.get(key)

    def text_value(self, key: str) -> Any:
        """Return the raw value, or the one in ``text_config`` if it is absent; None if both are."""
        section = self.section("text_config")
        return section.get(key) if self.get(key) is None and section is not None else self.get(key)

    def require(self, key: str, expected: Any, why: str = "") -> None:
        """Raise ModelError unless the value is ``expected`` or absent: another value would change the results."""
        value = self.get(key)
        if value is not None and value != expected:
            raise self.error(key, f"{json.dumps(expected)}{why and '; '}{why}")

    def section(self, key: str) -> HfConfig | None:
        """Return a nested object, or None if it is absent or empty."""
        value = self.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return HfConfig(value, f"{self.where}: {key}")

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """Return an integer from ``minimum`` to ``maximum``."""
        value, maximum = self._value(key, default), min(maximum, MAXIMA.get(key, maximum))
        if type(value) is not int or not minimum <= value <= maximum:
            most = "2**31 - 1" if maximum == 2**31 - 1 else maximum
            raise self.error(key, f"an integer from {minimum} to {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, above: float = 0.0) -> float:
        """Return a finite number greater than ``above``."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise self.error(key, f"a finite number above {above:g}")
        return float(value)

    def optional(self, key: str, default: float | None = None) -> float | None:
        """Return a finite number above 0, None if the value is null, or ``default`` if the key is absent."""
        if self._key(key) in self._values and self.get(key) is None:
            return None
        return default if self.get(key) is None else self.number(key)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """Return a boolean."""
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, accepted: Mapping[str, str], default: Any = _REQUIRED) -> str:
        """Return the value to which ``accepted`` maps the string."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in accepted:
            raise self.error(key, ", ".join(accepted))
        return accepted[value]

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(key, "a value")
        return default
