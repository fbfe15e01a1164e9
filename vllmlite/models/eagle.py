"""EAGLE and EAGLE-3 (Li et al. 2024, 2025): a decoder layer that drafts from a target model's hidden states.

At position p the head reads the embedding of token p + 1 and the target model's hidden state of position p, and
predicts token p + 2. For further drafts it reads its own hidden state in place of the target model's. EAGLE reads the
final hidden state, and its output goes through the target model's output layer. EAGLE-3 reads the hidden states of
several layers, projected to one, and has an output layer of its own, often over a part of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend, KVCache, LinearWeight, Rope
from vllmlite.backends.batch import ForwardBatch, Tensor
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.errors import ModelError
from vllmlite.models.config_table import check_remaining, with_defaults
from vllmlite.models.decoder import FINAL, Decoder
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.llama import spec as llama_spec
from vllmlite.models.rope import cos_sin
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.checkpoint import listed, read_tensors
from vllmlite.weights.host import FLOAT_DTYPES, HostTensor
from vllmlite.weights.parts import Source

_RENAMED = (
    (r"^model\.", ""),
    (r"^(midlayer|transformer)\.", "layers.0."),
    (r"^fusion_fc\.", "fc."),
)
"""Regular expressions of stored names, with their replacements."""
_UNREAD = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^t2d$|^embed_tokens\.weight$|^lm_head\.weight$")
"""Tensors that may be stored but are not needed: ``t2d`` follows from ``d2t``, and EAGLE has the target's tables."""
_INTEGERS = {"int64": "<i8", "int32": "<i4"}


@dataclass(frozen=True, slots=True)
class EagleSpec:
    """The sizes and options of an EAGLE head."""

    path: Path
    layer: DecoderSpec
    """Sizes, rotary embedding and activation of the one layer."""
    target_size: int
    """Size of the target model's hidden states."""
    states: tuple[int, ...]
    """Indices of the layers of the target model whose inputs the head reads, or :data:`FINAL` for the final hidden
    states."""
    third: bool
    """Whether it is an EAGLE-3 head."""
    draft_vocab_size: int
    norm_before_residual: bool
    """Whether the layer's residual is the normed hidden state (EAGLE-3)."""


def read_eagle(path: Path, method: str, target: DecoderSpec) -> EagleSpec:
    """Read the configuration of the head in directory ``path`` for ``target``; ``method`` is ``eagle`` or ``eagle3``.

    Takes the published form, a Llama configuration with further keys, and that of the library speculators. Raises
    ModelError."""
    config = HfConfig.read(path)
    third = method == "eagle3"
    if config.get("speculators_model_type") is not None:
        config.choice("speculators_model_type", {method: method})
        inner = config.section("transformer_layer_config")
        if inner is None:
            raise config.error("transformer_layer_config", "an object")
    else:
        inner = config
    for key in ("layernorms", "norm_before_fc"):
        config.require(key, False, "norms around the projection are not supported")
    inner.require("num_hidden_layers", 1, "heads of several layers are not supported")
    inner.require("model_type", "llama")
    config.without_effect("draft_vocab_size", "norm_before_residual", "target_hidden_size")
    layer = llama_spec(with_defaults(inner, "llama"), "LlamaForCausalLM")
    check_remaining(inner, "llama")
    size = config.integer("target_hidden_size", target.hidden_size)
    if size != target.hidden_size or (not third and layer.hidden_size != size):
        raise ModelError(
            f"{config.where}: made for hidden states of {size if third else layer.hidden_size}; "
            f"the model's have {target.hidden_size}"
        )
    return EagleSpec(
        path,
        layer,
        size,
        _states(config, target.num_layers) if third else (FINAL,),
        third,
        config.integer("draft_vocab_size", layer.vocab_size) if third else target.vocab_size,
        config.boolean("norm_before_residual", False),
    )


def _states(config: HfConfig, num_layers: int) -> tuple[int, ...]:
    """Return the layers whose inputs an EAGLE-3 head reads."""
    key = "eagle_aux_hidden_state_layer_ids"
    nested = config.section("eagle_config")
    if nested is not None:
        nested.require("use_aux_hidden_state", True)
        if nested.get(key) is not None:
            config = nested
    found = config.get(key)
    if found is None:
        found = [2, num_layers // 2, num_layers - 3]
    if not (isinstance(found, list) and found and all(type(i) is int and 0 <= i < num_layers for i in found)):
        raise config.error(key, f"a list of layers of the model, from 0 to {num_layers - 1}")
    return tuple(found)


class EagleHead:
    """An EAGLE draft head, with its weights on the backend of its target model."""

    def __init__(self, spec: EagleSpec, target: Decoder, *, num_positions: int, block_size: int) -> None:
        """Load the head. Raises ModelError unless the checkpoint holds exactly the tensors that it needs."""
        self.spec = spec
        self.backend = backend = target.backend
        layer = spec.layer
        self.kv_spec = KVSpec(1, layer.num_kv_heads, layer.head_dim, block_size, backend.dtype)
        self.states, self.state_size = spec.states, spec.target_size
        self.draft_vocab_size = spec.draft_vocab_size
        self._target = target
        rope = layer.layers[0].rope
        assert rope is not None
        self._rope = Rope(backend.tensor(cos_sin(rope, num_positions, num_positions)), rope.rotary_dim)
        stored = _Stored(spec.path, backend)
        hidden, heads, kv_heads, dim = (
            layer.hidden_size, layer.num_heads, layer.num_kv_heads, layer.head_dim
        )  # fmt: skip
        name, inner = "layers.0.", layer.intermediate_size
        if spec.third:
            self._fuse = stored.columns(["fc.weight"], [hidden], len(spec.states), spec.target_size)
            self._input_norm: Tensor | None = stored.norm(f"{name}input_layernorm.weight", hidden)
            self._hidden_norm: Tensor | None = stored.norm(f"{name}hidden_norm.weight", hidden)
            self._norm: Tensor | None = stored.norm("norm.weight", hidden)
        else:
            self._fuse = stored.columns(["fc.weight"], [hidden], 2, hidden)
            self._input_norm = self._hidden_norm = self._norm = None
        qkv = [f"{name}self_attn.{part}_proj.weight" for part in "qkv"]
        rows = [heads * dim, kv_heads * dim, kv_heads * dim]
        self._qkv = stored.columns(qkv, rows, 2 if spec.third else 1, hidden)
        self._o = stored.linear([f"{name}self_attn.o_proj.weight"], [hidden], heads * dim)
        self._mlp_norm = stored.norm(f"{name}post_attention_layernorm.weight", hidden)
        self._up = stored.linear(
            [f"{name}mlp.{part}_proj.weight" for part in ("gate", "up")], [inner] * 2, hidden
        )
        self._down = stored.linear([f"{name}mlp.down_proj.weight"], [hidden], inner)
        own = spec.third and "embed_tokens.weight" in stored.tensors
        if spec.third and not own and hidden != spec.target_size:
            raise ModelError(f"{spec.path}: tensor 'embed_tokens.weight' is missing from the checkpoint")
        self._table = (
            backend.tensor(stored.take("embed_tokens.weight", (layer.vocab_size, hidden)), backend.dtype)
            if own
            else target.embedding_table
        )
        self.vocab_size = layer.vocab_size if own else target.vocab_size
        """Number of ids that have an embedding."""
        self._head: LinearWeight = None
        ids = np.arange(spec.draft_vocab_size, dtype=np.int64)
        if spec.third:
            self._head = stored.linear(["lm_head.weight"], [spec.draft_vocab_size], hidden)
            ids = stored.target_ids(ids)
            if spec.draft_vocab_size and not 0 <= ids.min() <= ids.max() < target.vocab_size:
                raise ModelError(
                    f"{spec.path}: tensor 'd2t': leads beyond the model's {target.vocab_size} ids"
                )
        self.target_ids = ids.astype(np.int32)
        """For each id of the draft vocabulary, the id of the same token in the target model."""
        self._draft_table = self._table
        if not np.array_equal(ids, np.arange(len(ids))):
            self._draft_table = backend.rows(self._table, backend.tensor(self.target_ids))
        stored.check_rest()

    def fused(self, states: Sequence[Tensor]) -> Tensor:
        """Return the hidden state ``[T, hidden]`` that the head computes from the target model's ``states``."""
        return self._sum(states, self._fuse) if self.spec.third else states[0]

    def forward(
        self, token_ids: Tensor, hidden: Tensor, batch: ForwardBatch, kv: KVCache, *, drafted: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer for the positions of ``batch``: ``hidden [T, hidden]`` are their hidden states, and
        ``token_ids [T]`` the ids of the positions after them; ``drafted``: ids of the draft vocabulary. Writes keys
        and values to ``kv``.

        Returns the input of :meth:`logits`, and the hidden states for the next draft."""
        ops, layer, eps = self.backend, self.spec.layer, self.spec.layer.norm.eps
        embedded = ops.embedding(token_ids, self._draft_table if drafted else self._table)
        if self._input_norm is not None and self._hidden_norm is not None:
            normed, kept = ops.rms_norm(hidden, self._hidden_norm, eps)
            residual = normed if self.spec.norm_before_residual else kept
            inputs = [ops.rms_norm(embedded, self._input_norm, eps)[0], normed]
        else:
            residual = self._sum([embedded, hidden], self._fuse)
            inputs = [residual]
        q = ops.attn_prep(self._sum(inputs, self._qkv), layer.num_heads, self._rope, kv, 0, batch)
        x = ops.linear(ops.paged_attention(q, kv, 0, batch, layer.head_dim**-0.5), self._o)
        x, residual = ops.rms_norm(x, self._mlp_norm, eps, residual)
        x = ops.linear(ops.gated_linear(x, self._up, layer.activation), self._down)
        if self._norm is None:
            total = ops.add(x, residual)
            return total, total
        return ops.rms_norm(x, self._norm, eps, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits ``[N, draft_vocab_size]``."""
        return self._target.logits(hidden) if self._head is None else self.backend.logits(hidden, self._head)

    def _sum(self, parts: Sequence[Tensor], weights: Sequence[LinearWeight]) -> Tensor:
        """Multiply ``parts`` side by side with the weight whose columns are ``weights``."""
        products = [self.backend.linear(part, weight) for part, weight in zip(parts, weights, strict=True)]
        total = products[0]
        for product in products[1:]:
            total = self.backend.add(total, product)
        return total


class _Stored:
    """The tensors of a head's checkpoint; it records which have been used."""

    def __init__(self, path: Path, backend: Backend) -> None:
        self.path, self.backend = path, backend
        self.tensors: dict[str, HostTensor] = {}
        for name, tensor in read_tensors(path).items():
            for pattern, replacement in _RENAMED:
                name = re.sub(pattern, replacement, name)
            self.tensors[name] = tensor
        self._taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> HostTensor:
        """Return a float tensor of ``shape``."""
        if name not in self.tensors:
            raise ModelError(f"{self.path}: tensor {name!r} is missing from the checkpoint")
        self._taken.add(name)
        found = self.tensors[name]
        if found.shape != shape or found.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{self.path}: tensor {name!r}: expected {list(shape)} of {', '.join(FLOAT_DTYPES)}; "
                f"found {list(found.shape)} of {found.dtype}"
            )
        return found

    def norm(self, name: str, size: int) -> Tensor:
        return self.backend.tensor(self.take(name, (size,)), self.backend.dtype)

    def linear(self, names: Sequence[str], rows: Sequence[int], columns: int) -> LinearWeight:
        (weight,) = self.columns(names, rows, 1, columns)
        return weight

    def columns(
        self, names: Sequence[str], rows: Sequence[int], count: int, columns: int
    ) -> list[LinearWeight]:
        """Return the weights ``names`` as one, cut into ``count`` weights of ``columns`` columns. The first has the
        bias, where one is stored."""
        shapes = {name: (own, count * columns) for name, own in zip(names, rows, strict=True)}
        biases = [
            self.take(bias, (own,))
            for name, own in zip(names, rows, strict=True)
            if (bias := name.removesuffix("weight") + "bias") in self.tensors
        ]
        if biases and len(biases) != len(names):
            raise ModelError(f"{self.path}: biases of {', '.join(names)}: expected all of them or none")
        cut = []
        for index in range(count):
            span = (index * columns, (index + 1) * columns)
            parts = [
                Source(name, shape, (shape[0], columns), columns=None if count == 1 else span).take(
                    self.take(name, shape)
                )
                for name, shape in shapes.items()
            ]
            cut.append(self.backend.linear_weight(parts, biases if index == 0 else ()))
        return cut

    def target_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return, for each id of the draft vocabulary, the target model's id; ``d2t`` stores the differences."""
        found = self.tensors.get("d2t")
        if found is None:
            return ids
        self._taken.add("d2t")
        if found.shape != ids.shape or found.dtype not in _INTEGERS:
            raise ModelError(
                f"{self.path}: tensor 'd2t': expected {list(ids.shape)} of {', '.join(_INTEGERS)}; "
                f"found {list(found.shape)} of {found.dtype}"
            )
        differences: NDArray[np.int64] = found.data.view(_INTEGERS[found.dtype]).astype(np.int64)
        return ids + differences

    def check_rest(self) -> None:
        """Raise ModelError if there are unused tensors that would change the results."""
        rest = [name for name in self.tensors if name not in self._taken and not _UNREAD.search(name)]
        if rest:
            raise ModelError(f"{self.path}: unexpected tensors: {listed(rest)}")
