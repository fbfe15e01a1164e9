"""Models without a family here: transformers' own modelling code on the torch backend, over our paged cache.

Their attention layers are given :func:`_attend` by name (``AttentionInterface``), and the step with the call, so that
nothing is ambient. A trial run of two tokens tells what the layers cache, and refuses models whose layers do not all
attend that way, or ask attention for what it does not do here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllmlite.backends.base import Backend, ForwardBatch, KVCache, KVSpec
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import BackendError, ModelError

ATTENTION = "vllmlite"
STEP = "vllmlite_step"
"""Keyword under which a step travels to the attention layers."""
_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}
    | {"output_hidden_states", "output_router_logits", "return_dict", "past_key_values", "logits_to_keep"}
)
"""Keywords of attention that change no number here: positions are the batch's, and all rows are causal."""


@dataclass(slots=True)
class _Step:
    """What attention needs of a step."""

    backend: TorchBackend
    batch: ForwardBatch
    kv: KVCache


@dataclass(slots=True)
class _Trial:
    """What attention was asked for, by layer: heads and size of its keys, its window."""

    layers: dict[int, tuple[int, int, int | None]] = field(default_factory=dict)
    refused: str = ""


class HfModel:
    """A causal language model of transformers as the runner's ``Model``; ``path`` holds its configuration and
    weights. ModelError if it is not one that can run this way."""

    def __init__(self, backend: TorchBackend, path: Path, *, block_size: int, kv_dtype: str) -> None:
        model = _load(path, getattr(torch, backend.dtype))
        self.backend = backend
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self._base = getattr(model, model.base_model_prefix).to(backend.device)
        # The model without its body gives logits of whatever stands in for that body's result.
        self._result = _Given()
        setattr(model, model.base_model_prefix, self._result)
        self._head = model.to(backend.device)
        heads, size = self._try(path, model.config.get_text_config())
        layers = model.config.get_text_config().num_hidden_layers
        self.kv_spec = KVSpec(layers, heads, size, block_size, kv_dtype)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Hidden states ``[T, hidden]`` of the uploaded ``batch``, after the last norm; writes its keys and values."""
        return self._run(batch.token_ids, batch.positions, _Step(self.backend, batch, kv))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits ``[N, V]`` of hidden states ``[N, hidden]``."""
        self._result.hidden = hidden[None]
        logits: torch.Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0].float()

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, step: _Step | _Trial) -> torch.Tensor:
        found: torch.Tensor = self._base(
            input_ids=ids[None].long(), position_ids=positions[None].long(), use_cache=False, **{STEP: step}
        )[0]
        return found[0]

    @torch.inference_mode()
    def _try(self, path: Path, config: Any) -> tuple[int, int]:
        """Key/value heads and their size."""
        trial = _Trial()
        two = torch.arange(2, device=self.backend.device)
        name = type(self._head).__name__
        try:
            self._run(two, two, trial)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{path}: {name} cannot run over a paged cache: {error}") from error
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        shapes = {(heads, size) for heads, size, _ in trial.layers.values()}
        sliding = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
        reason = trial.refused
        if sorted(trial.layers) != list(range(config.num_hidden_layers)):
            reason = "its layers do not all attend through transformers' AttentionInterface"
        elif not reason and set(kinds) - {"full_attention", "sliding_attention"}:
            reason = f"its layers are of kinds {', '.join(sorted(set(kinds)))}"
        elif not reason and len(shapes) != 1:
            reason = f"its layers cache different shapes: {sorted(shapes)}"
        elif not reason and any(trial.layers[layer][2] is None for layer in sliding):
            reason = "its sliding windows are not told to attention"
        if reason:
            raise ModelError(f"{path}: {name} cannot run over a paged cache: {reason}")
        return shapes.pop()


def load_hf_model(
    backend: Backend, path: Path, *, block_size: int, kv_cache_dtype: str = "auto", load_format: str = "auto"
) -> HfModel:
    """The model of directory ``path`` through transformers, on the torch backend. ModelError or BackendError say what
    is wrong."""
    if not isinstance(backend, TorchBackend) or backend.quantization is not None:
        raise BackendError("transformers' models run on the torch backend alone, with float weights")
    if load_format not in ("auto", "safetensors"):
        raise BackendError(f"load_format {load_format}: transformers' models are read from safetensors")
    dtype = backend.dtype if kv_cache_dtype == "auto" else kv_cache_dtype
    return HfModel(backend, path, block_size=block_size, kv_dtype=dtype)


class _Given(nn.Module):
    """Stands in for a model's body: returns what it was given."""

    hidden: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def _load(path: Path, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ModelError(f"{path}: transformers cannot be imported: {error}") from error
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config()
        kinds = {str(part.get("rope_type")) for part in _parts(getattr(text, "rope_parameters", None))}
        if kinds & {"dynamic", "longrope"}:
            raise ModelError(
                f"{path}: rope_type={', '.join(sorted(kinds))}: numbers would depend on the batch"
            )
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{path}: transformers cannot load it: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            listed = ", ".join(str(key) for key in sorted(found[what])[:5])
            raise ModelError(f"{path}: {what.replace('_', ' ')} in the checkpoint: {listed}")
    return model.eval()


def _parts(parameters: Any) -> list[dict[str, Any]]:
    if not isinstance(parameters, dict):
        return []
    nested = [part for part in parameters.values() if isinstance(part, dict)]
    return nested or [parameters]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: ``query [1, H, T, D]``, ``key`` and ``value [1, K, T, D]``, rotated."""
    step = others.pop(STEP, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(step, _Trial):
        unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
        if attention_mask is not None:
            step.refused = "it makes an attention mask of its own"
        elif unknown:
            step.refused = f"it asks attention for {', '.join(unknown)}"
        elif key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            step.refused = "its queries, keys and values differ in size"
        step.layers[module.layer_idx] = key.shape[1], key.shape[-1], sliding_window
        return torch.zeros_like(query).transpose(1, 2), None
    if not isinstance(step, _Step):
        raise ValueError("the step does not reach its attention layers")
    qkv = torch.cat((query[0], key[0], value[0])).transpose(0, 1).flatten(1)
    backend, layer = step.backend, module.layer_idx
    q = backend.attn_prep(qkv, query.shape[1], None, step.kv, layer, step.batch)
    out = backend.paged_attention(q, step.kv, layer, step.batch, scale, sliding_window, softcap)
    return out.view(1, -1, query.shape[1], query.shape[3]), None
