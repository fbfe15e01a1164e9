"""The fields of a Hugging Face ``config.json`` that several families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vllmlite.models.hf_config import HfConfig
from vllmlite.models.hf_rope import rope_spec
from vllmlite.models.spec import DecoderSpec, LayerSpec, NormSpec, RopeSpec
from vllmlite.weights.host import FLOAT_DTYPES

GATED_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATIONS = GATED_ACTIVATIONS | {"relu": "relu"}
MAX_EXPERTS = 1 << 16
"""Upper bound of the number of experts in all layers together."""


def expert_count(config: HfConfig, key: str, default: int, minimum: int = 1) -> int:
    """Return the number of experts per layer, limited to ``MAX_EXPERTS`` in all layers together."""
    most = max(1, MAX_EXPERTS // config.integer("num_hidden_layers"))
    return config.integer(key, default, minimum, most)


def checkpoint_dtype(config: HfConfig) -> str:
    """Return the checkpoint's dtype; float32, the format's default, if none is given."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    return config.choice(key, {name: name for name in FLOAT_DTYPES}, "float32")


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
