"""Typed access to a Hugging Face ``config.json``, and the fields that all families have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from vllmlite.errors import ModelError
from vllmlite.models.gguf import gguf_config
from vllmlite.models.rope import KINDS
from vllmlite.models.spec import DecoderSpec, LayerSpec, NormSpec, RopeSpec
from vllmlite.weights.host import FLOAT_DTYPES
from vllmlite.weights.json_object import read_object

GATED_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATIONS = GATED_ACTIVATIONS | {"relu": "relu"}
MAXIMA = {"num_hidden_layers": 4096, "num_attention_heads": 1 << 16}
"""Upper bounds of some keys, so that a damaged file cannot exhaust memory before its tensors are checked."""
MAX_EXPERTS = 1 << 16
"""Upper bound of the number of experts in all layers together."""
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
        """Keys whose values do not come from the file, so that reading them does not count."""

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
        """Return what ``accepted`` maps the string to."""
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


def expert_count(config: HfConfig, key: str, default: int, minimum: int = 1) -> int:
    """Return the number of experts per layer, limited to ``MAX_EXPERTS`` in all layers together."""
    most = max(1, MAX_EXPERTS // config.integer("num_hidden_layers"))
    return config.integer(key, default, minimum, most)


def checkpoint_dtype(config: HfConfig) -> str:
    """Return the checkpoint's dtype; float32, the format's default, if none is given."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    return config.choice(key, {name: name for name in FLOAT_DTYPES}, "float32")


def rope_spec(
    config: HfConfig, head_dim: int, *, theta: float = 10000.0, partial: float | None = None, kind: str = ""
) -> RopeSpec:
    """Return the rotary embedding, from ``rope_parameters``, or from the older ``rope_scaling`` and ``rope_theta``.

    ``theta`` is the family's default. ``partial`` is the family's default of ``partial_rotary_factor``; None means that
    whole heads are rotated. ``kind`` selects a layer type if the parameters are given per layer type."""
    _check_one_rope(config)
    section = config.section("rope_parameters") or config.section("rope_scaling") or HfConfig({}, "")
    if kind:
        section = section.section(kind) or HfConfig({}, "")
    else:
        for layer_type in ("full_attention", "sliding_attention"):
            if section.get(layer_type) is not None:
                raise section.error(layer_type, "one set of rotary parameters for all layers")
    rotated = head_dim
    if partial is not None:
        source = config if section.get("partial_rotary_factor") is None else section
        part = source.number("partial_rotary_factor", partial)
        if part > 1:
            raise source.error("partial_rotary_factor", "a number up to 1")
        rotated = int(head_dim * part)
    else:
        for source in (config, section):
            if source.number("partial_rotary_factor", 1.0) != 1.0:
                raise source.error("partial_rotary_factor", "1")
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise config.error(
            "head_dim", f"a size of which an even number of elements is rotated, not {rotated}"
        )
    theta = section.number("rope_theta", theta if kind else config.number("rope_theta", theta))
    key = "rope_type" if section.get("rope_type") is not None else "type"
    kind = section.choice(key, {name: name for name in KINDS}, "default")
    if kind == "default":
        config.without_effect("original_max_position_embeddings")
        return RopeSpec(rotary_dim=rotated, theta=theta)
    trained = config.integer("max_position_embeddings")
    if kind in ("yarn", "llama3", "longrope"):
        trained = section.integer("original_max_position_embeddings", trained)
        trained = config.integer("original_max_position_embeddings", trained)
    if kind == "yarn":
        return _yarn_spec(config, section, rotated, theta, trained)
    if kind == "longrope":
        return _longrope_spec(config, section, rotated, theta, trained)
    if kind == "dynamic" and rotated == 2:
        raise config.error("head_dim", "at least 4 with dynamic rotary embedding")
    factor = section.number("factor")
    if kind != "llama3":
        return RopeSpec(rotated, theta, kind, factor, trained)
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.error("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    return RopeSpec(rotated, theta, kind, factor, trained, low_freq_factor=low, high_freq_factor=high)


def _check_one_rope(config: HfConfig) -> None:
    """Raise ModelError if ``rope_scaling`` contradicts ``rope_parameters``, for example because it was added by
    hand."""
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    if not newer or not older or not isinstance(newer, dict) or not isinstance(older, dict):
        return
    wanted = {"rope_type" if key == "type" else key: value for key, value in older.items()}
    by_kind = [part for part in newer.values() if isinstance(part, dict)]
    if not any(wanted.items() <= part.items() for part in by_kind or [newer]):
        raise config.error(
            "rope_scaling", "the same as rope_parameters; change that instead, or leave it out"
        )


def _longrope_spec(config: HfConfig, section: HfConfig, size: int, theta: float, trained: int) -> RopeSpec:
    stretch = config.integer("max_position_embeddings") / trained
    attention = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 and trained > 1 else 1.0

    def factors(key: str) -> tuple[float, ...]:
        values = section.get(key)
        if (
            not isinstance(values, list)
            or len(values) != size // 2
            or not all(type(value) in (int, float) and 0 < value < math.inf for value in values)
        ):
            raise section.error(key, f"a list of {size // 2} numbers above 0")
        return tuple(map(float, values))

    return RopeSpec(
        size,
        theta,
        "longrope",
        stretch,
        trained,
        attention_factor=section.number("attention_factor", attention),
        short_factors=factors("short_factor"),
        long_factors=factors("long_factor"),
    )


def _yarn_spec(config: HfConfig, section: HfConfig, head_dim: int, theta: float, trained: int) -> RopeSpec:
    factor = section.number("factor", config.integer("max_position_embeddings") / trained)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = magnitude(1.0)
    if section.get("mscale") and section.get("mscale_all_dim"):
        attention = magnitude(section.number("mscale")) / magnitude(section.number("mscale_all_dim"))
    if theta <= 1:
        raise section.error("rope_theta", "a number above 1 with yarn")
    return RopeSpec(
        head_dim,
        theta,
        "yarn",
        factor,
        trained,
        attention_factor=section.number("attention_factor", attention),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.boolean("truncate", True),
    )


def used_window(config: HfConfig) -> int | None:
    """Return Qwen's sliding window, which applies only with ``use_sliding_window``; None without."""
    if config.boolean("use_sliding_window", False) and config.get("sliding_window") is not None:
        return config.integer("sliding_window")
    config.without_effect("sliding_window")
    return None


def layer_windows(
    config: HfConfig, slides: Callable[[int, int], bool] = lambda layer, first: layer >= first
) -> tuple[int | None, ...]:
    """Return the sliding window of each of Qwen's layers.

    ``layer_types`` names the layers with a window; without it, ``slides(layer, max_window_layers)`` decides."""
    window, first = used_window(config), config.integer("max_window_layers", 28, minimum=0)
    default = [
        "sliding_attention" if window is not None and slides(layer, first) else "full_attention"
        for layer in range(config.integer("num_hidden_layers"))
    ]
    types = layer_types(config, default)
    if window is None and "sliding_attention" in types:
        raise config.error(
            "sliding_window", "a window, with use_sliding_window, as layer_types has sliding_attention"
        )
    return tuple(window if name == "sliding_attention" else None for name in types)


def layer_types(config: HfConfig, default: Sequence[str]) -> Sequence[str]:
    """Return ``full_attention`` or ``sliding_attention`` for each layer."""
    types = config.get("layer_types")
    if types is None:
        return default
    accepted = ("full_attention", "sliding_attention")
    if (
        not isinstance(types, list)
        or len(types) != len(default)
        or any(name not in accepted for name in types)
    ):
        raise config.error("layer_types", f"a list of {len(default)} entries {' or '.join(accepted)}")
    return types


def head_size(config: HfConfig, default: int | None = None) -> int:
    """Return ``head_dim``; if absent ``default``, or without a default ``hidden_size / num_attention_heads``."""
    if config.get("head_dim") is not None or default is not None:
        return config.integer("head_dim", default)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % heads:
        raise config.error(
            "num_attention_heads", f"a divisor of hidden_size, {hidden}, or an explicit head_dim"
        )
    return hidden // heads


def layer_norm(config: HfConfig, key: str = "layer_norm_epsilon") -> NormSpec:
    """Return the spec of a layer norm with a bias."""
    return NormSpec(config.number(key, 1e-5), "layer", bias=True)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Return ALiBi's slopes (Press et al. 2021), also for numbers of heads that are not powers of two."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return tuple(slopes + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)])


def decoder_spec(
    config: HfConfig,
    architecture: str,
    *,
    head_dim: int | None = None,
    norm: NormSpec | None = None,
    activations: Mapping[str, str] = GATED_ACTIVATIONS,
    activation: str = "silu",
    windows: Sequence[int | None] | None = None,
    rope: RopeSpec | None = None,
    rotated: bool = True,
    tied: bool = False,
) -> DecoderSpec:
    """Return a spec like Llama's, from the fields that all families have.

    The arguments are the family's defaults and what all its layers have in common; families replace what else differs.
    ``activation`` has the name used in configurations."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    size = head_size(config, head_dim)
    if windows is None:
        windows = (None,) * config.integer("num_hidden_layers")
    if rotated and rope is None:
        rope = rope_spec(config, size)
    return DecoderSpec(
        architecture=architecture,
        dtype=checkpoint_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        max_position_embeddings=config.integer("max_position_embeddings"),
        norm=norm or NormSpec(config.number("rms_norm_eps", 1e-6)),
        activation=config.choice("hidden_act", activations, activation),
        layers=tuple(LayerSpec(window, rope) for window in windows),
        tie_word_embeddings=config.boolean("tie_word_embeddings", tied),
    )
