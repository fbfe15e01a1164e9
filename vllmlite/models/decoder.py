"""The one decoder: any :class:`DecoderSpec`, on any backend, by ops alone."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.backends.base import (
    Backend,
    ForwardBatch,
    KVCache,
    KVSpec,
    LinearWeight,
    Rope,
    Tensor,
)
from vllmlite.models.rope import cos_sin
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.checkpoint import EMBEDDING, Weights


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: LinearWeight
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: LinearWeight
    post_norm: Tensor
    gate_up: LinearWeight
    down: LinearWeight
    window: int | None


class Decoder:
    """A model on a backend: the runner's ``Model``.

    ``weights`` holds what ``spec.weights()`` names; positions run up to ``max_model_len``."""

    def __init__(
        self,
        spec: DecoderSpec,
        backend: Backend,
        weights: Weights,
        *,
        max_model_len: int,
        block_size: int,
        kv_dtype: str,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.vocab_size = spec.vocab_size
        self.kv_spec = KVSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size, kv_dtype)
        self._scale = spec.head_dim**-0.5
        self._rope = Rope(backend.tensor(cos_sin(spec.rope, max_model_len)), spec.rope.rotary_dim)
        self._embed = backend.tensor(weights("model.embed_tokens.weight"), backend.dtype)
        self._layers = [self._load_layer(layer, weights) for layer in range(spec.num_layers)]
        self._norm = backend.tensor(weights("model.norm.weight"), backend.dtype)
        if spec.tied_head and EMBEDDING in weights.kinds:
            self._head = backend.linear_weight([weights.product(EMBEDDING)])
        elif spec.tied_head:
            self._head = backend.tied_weight(self._embed)
        else:
            self._head = backend.linear_weight([weights.product("lm_head.weight")])

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Hidden states ``[T, hidden]`` of the uploaded ``batch``, after the last norm; writes its keys and values."""
        ops, spec, eps = self.backend, self.spec, self.spec.norm_eps
        x = ops.embedding(batch.token_ids, self._embed)
        residual = None
        for index, layer in enumerate(self._layers):
            x, residual = ops.rms_norm(x, layer.input_norm, eps, residual)
            qkv = ops.linear(x, layer.qkv)
            q = ops.attn_prep(
                qkv, spec.num_heads, self._rope, kv, index, batch, layer.q_norm, layer.k_norm, eps
            )
            x = ops.paged_attention(q, kv, index, batch, self._scale, layer.window)
            x, residual = ops.rms_norm(ops.linear(x, layer.o), layer.post_norm, eps, residual)
            x = ops.gated_activation(ops.linear(x, layer.gate_up), spec.activation)
            x = ops.linear(x, layer.down)
        return ops.rms_norm(x, self._norm, eps, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits ``[N, V]`` of hidden states ``[N, hidden]``."""
        return self.backend.logits(hidden, self._head)

    def _load_layer(self, index: int, weights: Weights) -> _Layer:
        spec, backend = self.spec, self.backend
        prefix = f"model.layers.{index}."

        def linear(module: str, names: tuple[str, ...], bias: bool) -> LinearWeight:
            parts = [f"{prefix}{module}.{name}_proj" for name in names]
            return backend.linear_weight(
                [weights.product(f"{part}.weight") for part in parts],
                [weights(f"{part}.bias") for part in parts] if bias else (),
            )

        def norm(name: str) -> Tensor:
            return backend.tensor(weights(f"{prefix}{name}.weight"), backend.dtype)

        return _Layer(
            input_norm=norm("input_layernorm"),
            qkv=linear("self_attn", ("q", "k", "v"), spec.qkv_bias),
            q_norm=norm("self_attn.q_norm") if spec.qk_norm else None,
            k_norm=norm("self_attn.k_norm") if spec.qk_norm else None,
            o=linear("self_attn", ("o",), spec.o_bias),
            post_norm=norm("post_attention_layernorm"),
            gate_up=linear("mlp", ("gate", "up"), spec.mlp_bias),
            down=linear("mlp", ("down",), spec.mlp_bias),
            window=spec.windows[index],
        )
