"""MTP layers (multi-token prediction): a decoder layer, stored with the model, that drafts from its hidden states.

At position p the layer reads the embedding of token p + 1 and the model's final hidden state of position p, each
normalised, and projected together to one hidden state. Its output is normalised, goes through the model's output layer
and predicts token p + 2 (DeepSeek-AI 2024). For further drafts it reads its own output in place of the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vllmlite.backends.base import KVCache
from vllmlite.backends.batch import ForwardBatch, Tensor
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.errors import ModelError
from vllmlite.models.decoder import FINAL, Decoder, norm_weight
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.keys import MTP_COUNTS
from vllmlite.models.spec import DecoderSpec, Stage
from vllmlite.models.tensors import sources, stored_schemes
from vllmlite.weights.checkpoint import open_weights, read_tensors
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import ModelWeights, Source

NORMS = ("embedding_norm", "hidden_norm", "final_norm")
PROJECTION = ("projection.embedding.weight", "projection.hidden.weight")


@dataclass(frozen=True, slots=True)
class Layout:
    """The names under which checkpoints store an MTP layer."""

    prefix: str
    layer: str
    """The decoder layer's modules are named ``prefix``, this, ``0.`` and the module."""
    embedding_norm: str
    hidden_norm: str
    projection: str
    final_norm: str
    hidden_first: bool
    """Whether the projection's first columns belong to the hidden state, not to the embedding."""


LAYOUTS = (
    Layout(
        "mtp.", "layers.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm", False
    ),
    Layout(
        "model.",
        "mtp_layers.",
        "model.mtp_layers.0.token_layernorm",
        "model.mtp_layers.0.hidden_layernorm",
        "model.mtp_layers.0.input_proj",
        "model.mtp_layers.0.final_layernorm",
        True,
    ),
)
"""The layouts of Qwen and of MiMo."""


class MtpHead:
    """The MTP layer of a checkpoint, on the backend of its model."""

    states: tuple[int, ...] = (FINAL,)

    def __init__(
        self,
        path: Path,
        target: Decoder,
        *,
        packing: Packing,
        num_positions: int,
        block_size: int,
        load_format: str,
        seed: int,
    ) -> None:
        """Load the MTP layer of the checkpoint directory ``path`` for ``target``. Raises ModelError if it has none that
        fits."""
        self.backend = backend = target.backend
        self._target = target
        layout = LAYOUTS[0] if load_format == "dummy" else _layout(path)
        spec = self._spec = _layer_spec(path, target.spec.whole or target.spec, layout)
        tensors = {**sources(spec), **_own_sources(spec, layout)}
        stored = open_weights(
            path,
            {source.key: source.stored for source in tensors.values()},
            load_format,
            seed,
            stored_schemes(spec, tensors),
            prefix=layout.prefix,
            unread=".",
            tied=("", ""),
        )
        weights = ModelWeights(tensors, stored, packing)
        self.kv_spec = KVSpec(1, spec.num_kv_heads, spec.head_dim, block_size, backend.dtype)
        self._layer = Decoder(
            spec,
            backend,
            weights,
            max_model_len=num_positions,
            num_positions=num_positions,
            kv_spec=self.kv_spec,
        )
        self._embedding_norm, self._hidden_norm, self._final_norm = (
            norm_weight(backend, weights, f"{name}.weight", spec.norm.unit_offset) for name in NORMS
        )
        self._projection = [backend.linear_weight(weights.products([name])) for name in PROJECTION]
        self.state_size = spec.hidden_size
        self.vocab_size = self.draft_vocab_size = spec.vocab_size
        self.target_ids = np.arange(spec.vocab_size, dtype=np.int32)

    def fused(self, states: Sequence[Tensor]) -> Tensor:
        """Return the model's final hidden state, the only one of ``states``."""
        return states[0]

    def forward(
        self, token_ids: Tensor, hidden: Tensor, batch: ForwardBatch, kv: KVCache, *, drafted: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer for the positions of ``batch``: ``hidden [T, hidden]`` are their hidden states, and
        ``token_ids [T]`` the ids of the positions after them. Writes keys and values to ``kv``. ``drafted`` changes
        nothing: the draft vocabulary is the target model's.

        Returns the input of :meth:`logits`, and the hidden states for the next draft: they are the same."""
        ops, eps = self.backend, self._spec.norm.eps
        embedded = ops.embedding(token_ids, self._target.embedding_table)
        parts = (
            ops.rms_norm(embedded, self._embedding_norm, eps)[0],
            ops.rms_norm(hidden, self._hidden_norm, eps)[0],
        )
        first, second = map(ops.linear, parts, self._projection)
        x, residual, _ = self._layer.through_layers(ops.add(first, second), batch, kv)
        normed, _ = ops.rms_norm(x, self._final_norm, eps, residual)
        return normed, normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits ``[N, vocab_size]``."""
        return self._target.logits(hidden)


def _layout(path: Path) -> Layout:
    """Return the layout of the MTP layer that the checkpoint directory ``path`` holds. Raises ModelError if there is
    none."""
    names = set() if path.is_file() else read_tensors(path).keys()
    for layout in LAYOUTS:
        if f"{layout.projection}.weight" in names:
            return layout
    known = " or ".join(f"{layout.projection}.weight" for layout in LAYOUTS)
    raise ModelError(f"{path}: holds no MTP layer, whose tensors include {known}: method mtp needs one")


def _layer_spec(path: Path, model: DecoderSpec, layout: Layout) -> DecoderSpec:
    """Return the MTP layer of ``model`` as a decoder of one layer, without embedding and output layer. Raises
    ModelError for models with which an MTP layer cannot be computed."""
    config = HfConfig.read(path)
    for key in MTP_COUNTS:
        config.require(key, 1, "drafts of several MTP layers are not supported")
    unlike = model.norm.kind != "rms" or model.post_norm or model.parallel or model.embedding_scale != 1
    if unlike or model.learned_positions or model.embedding_size is not None:
        raise ModelError(f"{path}: {model.architecture} is not supported with an MTP layer")
    layer = replace(model.layers[-1], window=None)
    keys = replace(model.keys, prefix=layout.prefix, layer=layout.layer)
    return replace(
        model,
        layers=(layer,),
        keys=keys,
        stage=Stage(is_first=False, has_table=False, is_last=False),
        shard=None,
        whole=None,
    )


def _own_sources(spec: DecoderSpec, layout: Layout) -> dict[str, Source]:
    """Return where the checkpoint stores the tensors before and after the layer. The projection is cut into the columns
    of the embedding and those of the hidden state."""
    size = spec.hidden_size
    found = {f"{name}.weight": Source(f"{getattr(layout, name)}.weight", (size,), (size,)) for name in NORMS}
    halves = ((0, size), (size, 2 * size))
    for name, columns in zip(PROJECTION, reversed(halves) if layout.hidden_first else halves, strict=True):
        key = f"{layout.projection}.weight"
        found[name] = Source(key, (size, 2 * size), (size, size), columns=columns, product=True)
    return found
