"""transformers' attention layers over the paged cache, and a probe that records what each layer needs.

transformers calls an attention function by the name in the model's configuration (``AttentionInterface``). The step is
passed to it as a keyword of the model's call, not through global state. With the name :data:`PROBE`, the model's masks
carry their mask function, from which :func:`sliding_window_of` derives what each layer may attend to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllmlite.backends.base import KVCache
from vllmlite.backends.batch import ForwardBatch
from vllmlite.backends.torch import TorchBackend

ATTENTION, PROBE = "vllmlite", "vllmlite_probe"
"""Names under which :func:`attend` and :func:`probe` are registered."""
STEP = "vllmlite_step"
"""Keyword that passes a :class:`Step` or a :class:`Probe` to the attention layers."""
_MASK_FUNCTION = "vllmlite_mask_function"
_NEUTRAL = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}
    | {"output_hidden_states", "output_router_logits", "return_dict", "past_key_values", "logits_to_keep"}
)
"""Keywords of attention functions that do not change the result, because the mask decides what is attended to."""


class Refusal(Exception):
    """The reason why a model cannot run over the paged cache."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The cache shape and the window of an attention layer."""

    num_kv_heads: int
    head_dim: int
    window: int | None


@dataclass(slots=True)
class Step:
    """The arguments of paged attention in one step."""

    backend: TorchBackend
    batch: ForwardBatch
    kv: KVCache
    windows: tuple[int | None, ...]
    """Sliding window of each layer in tokens, or None."""


@dataclass(slots=True)
class Probe:
    """Records the arguments of each attention layer's call; positions are below ``max_positions``."""

    max_positions: int
    layers: dict[int, Layer] = field(default_factory=dict)
    keys: list[torch.Tensor] = field(default_factory=list)
    """The keys of each call, used to compare two probes."""


def register() -> None:
    """Register both attention functions with transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
    ALL_ATTENTION_FUNCTIONS.register(PROBE, probe)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, probe_mask)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute paged attention as transformers' attention function, from rotated ``query [1, H, T, D]`` and
    ``key``/``value [1, K, T, D]``."""
    step, layer = others.get(STEP), module.layer_idx
    if not isinstance(step, Step):
        raise Refusal("its layers do not pass keyword arguments to attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    qkv = torch.cat((query[0], key[0], value[0])).transpose(0, 1).flatten(1)
    q = step.backend.attn_prep(qkv, query.shape[1], None, step.kv, layer, step.batch)
    out = step.backend.paged_attention(q, step.kv, layer, step.batch, scale, step.windows[layer], softcap)
    return out.view(1, -1, query.shape[1], query.shape[3]), None


def probe(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Record an attention call in the :class:`Probe`; return zeros. Raises Refusal if it is unsupported."""
    found = others.pop(STEP, None)
    if not isinstance(found, Probe):
        raise Refusal("its layers do not pass keyword arguments to attention")
    layer = getattr(module, "layer_idx", None)
    unknown = [name for name, given in others.items() if given is not None and name not in _NEUTRAL]
    mask_function = getattr(attention_mask, _MASK_FUNCTION, None)
    if type(layer) is not int:
        raise Refusal("its attention layers are not numbered")
    if layer in found.layers:
        raise Refusal(f"layer {layer} attends more than once in a forward pass")
    if unknown:
        raise Refusal(f"its attention needs {', '.join(unknown)}")
    if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        sizes = ", ".join(str(tensor.shape[-1]) for tensor in (query, key, value))
        raise Refusal(f"its queries, keys and values differ in size ({sizes})")
    if mask_function is None:
        raise Refusal(
            "it builds its own attention mask" if attention_mask is not None else "it has no attention mask"
        )
    window = sliding_window_of(mask_function, found.max_positions, query.device)
    found.layers[layer] = Layer(key.shape[1], key.shape[-1], window)
    found.keys.append(key)
    return torch.zeros_like(query).transpose(1, 2), None


def probe_mask(
    *, mask_function: Callable[..., torch.Tensor], q_length: int, kv_length: int, device: Any = None, **_: Any
) -> torch.Tensor:
    """transformers' mask function for :data:`PROBE`: return a tensor that carries ``mask_function``."""
    mask = torch.zeros(1, 1, q_length, kv_length, device=device)
    setattr(mask, _MASK_FUNCTION, mask_function)
    return mask


def sliding_window_of(
    mask_function: Callable[..., torch.Tensor], max_positions: int, device: torch.device
) -> int | None:
    """Return the sliding window of a causal mask, or None if it has none. Raises Refusal for other masks.

    ``mask_function(batch, head, query position, key position)`` returns whether a key is attended to."""
    last = max_positions - 1
    rows = sorted({max(0, position) for position in (0, 1, 2, last // 3, last // 2, last - 1, last)})
    queries = torch.tensor(rows, device=device)[:, None]
    keys = torch.arange(max_positions, device=device)[None]
    zero = torch.zeros((), dtype=torch.long, device=device)
    found = torch.as_tensor(mask_function(zero, zero, queries, keys), device=device)
    found = found.expand(len(rows), max_positions)
    window = int(found[-1].sum())
    if not torch.equal(found, (keys <= queries) & (keys > queries - window)):
        raise Refusal("its attention mask is not causal, or has gaps")
    return window if window < max_positions else None
