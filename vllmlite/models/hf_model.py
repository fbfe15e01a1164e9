"""Models without a family in vllmlite: transformers' modelling code on the torch backend, over the paged cache.

When a model is loaded, a trial compares its logits over the paged cache with those of transformers' own attention. A
model that differs, or that cannot run this way, is refused with the reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllmlite.backends.base import Backend, KVCache
from vllmlite.backends.batch import ForwardBatch
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import BackendError, ModelError, VllmliteError, not_installed
from vllmlite.models import hf_trial
from vllmlite.models.families import architecture
from vllmlite.models.hf_attention import ATTENTION, PROBE, STEP, Layer, Probe, Refusal, Step, register
from vllmlite.models.hf_config import HfConfig

logger = logging.getLogger(__name__)


class HfModel:
    """A causal language model of transformers that implements the runner's ``Model``.

    ``path`` has its configuration and weights. Raises ModelError if the model fails its trial over the paged cache."""

    def __init__(
        self, backend: TorchBackend, path: Path, *, max_positions: int, block_size: int, kv_dtype: str
    ) -> None:
        with _refusing(path, "transformers cannot load it"):
            model = _load(path, getattr(torch, backend.dtype)).to(backend.device)
        self.backend = backend
        self.vocab_size: int = model.config.get_text_config().vocab_size
        begin = time.perf_counter()
        with _refusing(path, f"{type(model).__name__} cannot run over a paged cache"), torch.inference_mode():
            ids = hf_trial.token_ids(self.vocab_size).to(backend.device)
            expected = model(input_ids=ids[None], use_cache=False).logits[0].float()
            name, self._body = _body(model)
            model.set_attn_implementation(PROBE)
            layers = self._probe(ids[:2], max_positions, model.config.get_text_config())
            self._windows = tuple(layer.window for layer in layers)
            heads, size = layers[0].num_kv_heads, layers[0].head_dim
            self.kv_spec = KVSpec(len(layers), heads, size, block_size, kv_dtype)
            model.set_attn_implementation(ATTENTION)
            # With its body replaced, the model computes the logits of given hidden states.
            self._injected = _HiddenStates()
            setattr(model, name, self._injected)
            self._head = model
            found = hf_trial.paged_logits(backend, self, ids)
            difference = hf_trial.compare(expected, found, backend.dtype)
        logger.info(
            "%s: trial took %.1f s: logits differ from transformers' own by at most %.1g of the largest",
            path,
            time.perf_counter() - begin,
            difference,
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """Compute the hidden states ``[T, hidden]`` of ``batch`` after the last norm; write its keys and values to
        ``kv``."""
        return self._run(batch.token_ids, batch.positions, Step(self.backend, batch, kv, self._windows))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits ``[N, V]`` of hidden states ``[N, hidden]``."""
        self._injected.hidden = hidden[None]
        logits: torch.Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0].float()

    def _run(self, ids: torch.Tensor, positions: torch.Tensor | None, step: Step | Probe) -> torch.Tensor:
        places = {} if positions is None else {"position_ids": positions[None].long()}
        found: torch.Tensor = self._body(
            input_ids=ids[None].long(), use_cache=False, **places, **{STEP: step}
        )[0]
        return found[0]

    def _probe(self, ids: torch.Tensor, max_positions: int, config: Any) -> list[Layer]:
        """Return the attention layers' shapes and windows.

        Raises Refusal unless all have the same shape, count positions from 0, and see what transformers' own cache
        keeps."""
        from transformers.cache_utils import DynamicCache

        first, second = Probe(max_positions), Probe(max_positions)
        self._run(ids, None, first)
        self._run(ids, torch.arange(len(ids), device=ids.device), second)
        count = config.num_hidden_layers
        if sorted(first.layers) != list(range(count)):
            raise Refusal(
                f"{len(first.layers)} of its {count} layers attend through transformers' AttentionInterface"
            )
        if any(not torch.equal(key, other) for key, other in zip(first.keys, second.keys, strict=True)):
            raise Refusal("its positions do not start at 0")
        layers = [first.layers[layer] for layer in range(count)]
        shapes = sorted({(layer.num_kv_heads, layer.head_dim) for layer in layers})
        if len(shapes) > 1:
            raise Refusal(f"its layers cache different shapes: {', '.join(map(str, shapes))}")
        for layer, own in zip(layers, DynamicCache(config=config).layers, strict=False):
            kept = getattr(own, "sliding_window", None) or max_positions
            if kept < max_positions and kept != layer.window:
                raise Refusal(
                    f"transformers caches {kept} tokens where its mask shows {layer.window or max_positions}"
                )
        return layers


def load_hf_model(
    backend: Backend,
    path: Path,
    *,
    max_positions: int,
    block_size: int,
    kv_cache_dtype: str = "auto",
    load_format: str = "auto",
) -> HfModel:
    """Load the model of directory ``path`` through transformers, on the torch backend.

    ``max_positions`` is the configuration's context length. Raises ModelError or BackendError."""
    if not isinstance(backend, TorchBackend):
        raise BackendError("transformers' models run on the torch backend only")
    if load_format not in ("auto", "safetensors"):
        raise BackendError(
            f"load_format {load_format}: transformers' models are loaded from safetensors only"
        )
    dtype = backend.dtype if kv_cache_dtype == "auto" else kv_cache_dtype
    return HfModel(backend, path, max_positions=max_positions, block_size=block_size, kv_dtype=dtype)


def _body(model: Any) -> tuple[str, Any]:
    """Return the model without its output layer, preceded by the name of the attribute that holds it."""
    from transformers import PreTrainedModel

    bodies = [(name, child) for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(bodies) != 1:
        raise Refusal(f"it consists of {len(bodies)} models beside its output layer, not 1")
    return bodies[0]


class _Output:
    """The return value of a model's body with hidden states only; any other field is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _HiddenStates(nn.Module):
    """Replaces a model's body: returns the hidden states set in ``hidden``."""

    hidden: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(self.hidden)

    def __getattr__(self, name: str) -> Any:
        raise Refusal(f"its output layer uses {name} of the model below it")


@contextmanager
def _refusing(path: Path, what: str) -> Iterator[None]:
    """Turn any exception of transformers or of a model's code into a ModelError."""
    try:
        yield
    except VllmliteError:
        raise
    except Refusal as error:
        raise ModelError(f"{path}: {what}: {error}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{path}: {what}: {reason[:500]}") from error


def _load(path: Path, dtype: torch.dtype) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise ModelError(f"{path}: {not_installed(str(error.name))}") from None
    except ImportError as error:
        raise ModelError(f"{path}: transformers cannot be imported: {error}") from error
    register()
    _need_known_code(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    text = config.get_text_config()
    kinds = {str(part.get("rope_type")) for part in _parts(getattr(text, "rope_parameters", None))}
    if kinds & {"dynamic", "longrope"}:
        raise ModelError(f"{path}: rope_type={', '.join(sorted(kinds))}: results would depend on the batch")
    if getattr(text, "attn_temperature_tuning", None):
        # Llama 4 derives positions from a token's index in the step, which a short trial does not detect.
        raise ModelError(f"{path}: attn_temperature_tuning: results would depend on the batch")
    model, found = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            listed = ", ".join(str(key) for key in sorted(found[what])[:5])
            raise ModelError(f"{path}: {what.replace('_', ' ')} in the checkpoint: {listed}")
    return model.eval()


def _need_known_code(path: Path) -> None:
    """Raise ModelError if the checkpoint brings its own code and transformers does not have the architecture itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = HfConfig.read(path)
    name, model_type = architecture(config), config.get("model_type")
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if model_type in CONFIG_MAPPING_NAMES else None
    if config.get("auto_map") is not None and own != name:
        raise ModelError(
            f"{path}: {name} needs code of its own (auto_map), which is never run; transformers' own "
            f"{f'{model_type} is {own}' if own else f'models do not include model_type={model_type}'}"
        )


def _parts(parameters: Any) -> list[dict[str, Any]]:
    if not isinstance(parameters, dict):
        return []
    nested = [part for part in parameters.values() if isinstance(part, dict)]
    return nested or [parameters]
