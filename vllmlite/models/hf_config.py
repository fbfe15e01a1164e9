"""Reading a Hugging Face ``config.json``: typed access, and the fields that all families spell alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllmlite.backends.base import FLOAT_DTYPES, QUANTIZATIONS
from vllmlite.errors import ModelError
from vllmlite.models.gguf import gguf_config
from vllmlite.models.rope import KINDS
from vllmlite.models.spec import DecoderSpec, RopeSpec
from vllmlite.weights.json_object import read_object
from vllmlite.weights.quantized import GROUP

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
MOST = {"num_hidden_layers": 4096}
"""What some keys are at most, lest a damaged file take all memory before anything else is looked at."""
_REQUIRED: Any = object()
QUANT_METHOD = "vllmlite"


class HfConfig:
    """The values of one JSON object. Every complaint is a ModelError that names the file, the key, the value found
    and what is accepted. A key whose value is null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    @classmethod
    def read(cls, path: Path) -> HfConfig:
        """``config.json`` of the model directory ``path``, or what the GGUF file ``path`` says in its place."""
        if path.is_file():
            return cls(gguf_config(path), str(path))
        file = path / "config.json"
        return cls(read_object(file), str(file))

    def error(self, key: str, accepted: str) -> ModelError:
        """The complaint about ``key``, to be raised."""
        if key not in self._values:
            return ModelError(f"{self._where}: {key} is absent; accepted: {accepted}")
        shown = repr(self._values[key])
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ModelError(f"{self._where}: {key}={shown}; accepted: {accepted}")

    def get(self, key: str) -> Any:
        """The value as it stands, None where absent."""
        return self._values.get(key)

    def section(self, key: str) -> HfConfig | None:
        """A nested object, None where absent or empty."""
        value = self.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return HfConfig(value, f"{self._where}: {key}")

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1) -> int:
        """An integer of at least ``minimum``."""
        value, most = self._value(key, default), MOST.get(key, 2**31 - 1)
        if type(value) is not int or not minimum <= value <= most:
            raise self.error(key, f"an integer from {minimum} to {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, above: float = 0.0) -> float:
        """A finite number greater than ``above``."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise self.error(key, f"a finite number above {above:g}")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, accepted: Mapping[str, str], default: Any = _REQUIRED) -> str:
        """What ``accepted`` maps the string to."""
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


def checkpoint_dtype(config: HfConfig) -> str:
    """The dtype that the checkpoint names; float32, as everywhere in this format, where it names none."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    return config.choice(key, {name: name for name in FLOAT_DTYPES}, "float32")


def quantization(config: HfConfig) -> str | None:
    """The kind in which ``quantization_config`` says that weights are, as :func:`quantization_config` writes it."""
    section = config.section("quantization_config")
    if section is None:
        return None
    section.choice("quant_method", {QUANT_METHOD: QUANT_METHOD})
    if section.integer("group_size") != GROUP:
        raise section.error("group_size", str(GROUP))
    return section.choice("format", {kind: kind for kind in QUANTIZATIONS})


def quantization_config(kind: str) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint whose weights are ``kind`` (:mod:`vllmlite.weights.quantized`)."""
    return {"quant_method": QUANT_METHOD, "format": kind, "group_size": GROUP}


def rope_spec(config: HfConfig, head_dim: int) -> RopeSpec:
    """The rotary embedding, from ``rope_parameters`` or from the older ``rope_scaling`` beside ``rope_theta``."""
    section = config.section("rope_parameters") or config.section("rope_scaling") or HfConfig({}, "")
    for source in (config, section):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.error("partial_rotary_factor", "1")
    if head_dim % 2:
        raise config.error("head_dim", f"an even size a head, not {head_dim}, for rotary embedding")
    for layer_type in ("full_attention", "sliding_attention"):
        if section.get(layer_type) is not None:
            raise section.error(layer_type, "one set of rotary parameters for all layers")
    theta = section.number("rope_theta", config.number("rope_theta", 10000.0))
    key = "rope_type" if section.get("rope_type") is not None else "type"
    kind = section.choice(key, {name: name for name in KINDS}, "default")
    if kind == "default":
        return RopeSpec(rotary_dim=head_dim, theta=theta)
    trained = config.integer("max_position_embeddings")
    if kind in ("yarn", "llama3"):
        trained = section.integer("original_max_position_embeddings", trained)
        trained = config.integer("original_max_position_embeddings", trained)
    if kind == "yarn":
        return _yarn_spec(config, section, head_dim, theta, trained)
    if kind == "dynamic" and head_dim == 2:
        raise config.error("head_dim", "at least 4 with dynamic rotary embedding")
    factor = section.number("factor")
    if kind != "llama3":
        return RopeSpec(head_dim, theta, kind, factor, trained)
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.error("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    return RopeSpec(head_dim, theta, kind, factor, trained, low_freq_factor=low, high_freq_factor=high)


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


def layer_windows(config: HfConfig) -> tuple[int | None, ...]:
    """Sliding windows as Qwen spells them: only with ``use_sliding_window``, on the layers that ``layer_types`` names
    or, without it, on those from ``max_window_layers`` up."""
    layers = config.integer("num_hidden_layers")
    window = None
    if config.boolean("use_sliding_window", False) and config.get("sliding_window") is not None:
        window = config.integer("sliding_window")
    types = config.get("layer_types")
    if types is None:
        first = config.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    accepted = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(name not in accepted for name in types):
        raise config.error("layer_types", f"a list of {layers} times {' or '.join(accepted)}")
    if window is None and "sliding_attention" in types:
        raise config.error("sliding_window", "a window with use_sliding_window, which layer_types asks for")
    return tuple(window if name == "sliding_attention" else None for name in types)


def decoder_spec(
    config: HfConfig,
    architecture: str,
    *,
    windows: tuple[int | None, ...],
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
) -> DecoderSpec:
    """The spec from the fields that all families share and the arguments in which they differ.

    ``head_dim`` is the family's default; without one it is ``hidden_size / num_attention_heads``."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if config.get("head_dim") is not None or head_dim is not None:
        head_dim = config.integer("head_dim", head_dim)
    elif hidden % heads:
        raise config.error(
            "num_attention_heads", f"a divisor of hidden_size, {hidden}, or an explicit head_dim"
        )
    else:
        head_dim = hidden // heads
    return DecoderSpec(
        architecture=architecture,
        dtype=checkpoint_dtype(config),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=len(windows),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.integer("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=config.choice("hidden_act", _ACTIVATIONS, "silu"),
        rope=rope_spec(config, head_dim),
        windows=windows,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        quantization=quantization(config),
    )
