"""Random EAGLE heads in their published forms, and what they draft: computed without a cache, in float32 of numpy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import HostTensor, float_tensor
from vllmlite.weights.safetensors import write_safetensors

Floats = NDArray[np.float32]
EPS = 1e-5
THETA = 10000.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a target model, and of the head for it."""

    vocab: int
    hidden: int
    num_layers: int
    inner: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    draft_vocab: int = 90
    own_hidden: int | None = None
    """Size of the head's hidden states and of its own embeddings; None: the target model's are used."""


@dataclass
class Head:
    """A head that was written to a directory."""

    shape: Shape
    third: bool
    norm_before_residual: bool
    states: tuple[int, ...]
    tensors: dict[str, Floats]
    target_ids: NDArray[np.int64]

    def drafts(
        self,
        token_ids: Sequence[int],
        states: Sequence[Floats],
        table: Floats,
        count: int,
        output: Callable[[Floats], Floats],
    ) -> list[int]:
        """Return the ``count`` drafts after ``token_ids``. ``states`` are those of all but the last token, ``table``
        the target model's embeddings, and ``output`` its output layer, which EAGLE uses."""  # fmt: skip
        t = self.tensors
        table = t.get("embed_tokens.weight", table)
        joined = np.concatenate(states, axis=1)
        hidden = joined @ t["fc.weight"].T + t.get("fc.bias", np.float32(0)) if self.third else joined
        ids, found = list(token_ids[1:]), []
        for _ in range(count):
            result, own = self._layer(table[ids], hidden)
            logits = result[-1] @ t["lm_head.weight"].T if self.third else output(result[-1])
            found.append(int(self.target_ids[logits.argmax()]) if self.third else int(logits.argmax()))
            ids.append(found[-1])
            hidden = np.concatenate([hidden, own[-1:]])
        return found

    def _layer(self, embedded: Floats, hidden: Floats) -> tuple[Floats, Floats]:
        t, name, shape = self.tensors, "layers.0.", self.shape
        if self.third:
            normed = _norm(hidden, t[f"{name}hidden_norm.weight"])
            residual = normed if self.norm_before_residual else hidden
            x = np.concatenate([_norm(embedded, t[f"{name}input_layernorm.weight"]), normed], axis=1)
        else:
            x = np.concatenate([embedded, hidden], axis=1) @ t["fc.weight"].T + t.get(
                "fc.bias", np.float32(0)
            )
            residual = x
        size = shape.head_dim
        q, k, v = (
            (x @ t[f"{name}self_attn.{part}_proj.weight"].T).reshape(len(x), -1, size) for part in "qkv"
        )
        q, k = _rotated(q), _rotated(k)
        group = shape.heads // shape.kv_heads
        k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * size**-0.5
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
        residual = residual + attended @ t[f"{name}self_attn.o_proj.weight"].T
        x = _norm(residual, t[f"{name}post_attention_layernorm.weight"])
        gate, up = (x @ t[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        total = residual + (gate / (1 + np.exp(-gate)) * up) @ t[f"{name}mlp.down_proj.weight"].T
        return (_norm(total, t["norm.weight"]) if self.third else total), total


def _norm(x: Floats, weight: Floats) -> Floats:
    normed: Floats = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(EPS)) * weight
    return normed


def _rotated(x: Floats) -> Floats:
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * THETA ** -(np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32)[:, None], np.sin(angles).astype(np.float32)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def write_head(
    path: Path, method: str, shape: Shape, *, form: str = "published", bias: bool = False,
    norm_before_residual: bool = False, layers: list[int] | None = None, seed: int = 0, **config: Any,
) -> Head:  # fmt: skip
    """Write a random head to ``path``: in the published form or in that of ``speculators``."""
    third, rng = method == "eagle3", np.random.default_rng(seed)
    hidden = shape.own_hidden or shape.hidden
    states = tuple(layers or [2, shape.num_layers // 2, shape.num_layers - 3]) if third else (-1,)
    heads, name = shape.heads * shape.head_dim, "layers.0."
    kv, wide = shape.kv_heads * shape.head_dim, 2 * hidden if third else hidden
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(states) * shape.hidden if third else 2 * hidden),
        f"{name}self_attn.q_proj.weight": (heads, wide),
        f"{name}self_attn.k_proj.weight": (kv, wide),
        f"{name}self_attn.v_proj.weight": (kv, wide),
        f"{name}self_attn.o_proj.weight": (hidden, heads),
        f"{name}post_attention_layernorm.weight": (hidden,),
        f"{name}mlp.gate_proj.weight": (shape.inner, hidden),
        f"{name}mlp.up_proj.weight": (shape.inner, hidden),
        f"{name}mlp.down_proj.weight": (hidden, shape.inner),
    }
    if bias:
        shapes["fc.bias"] = (hidden,)
    if third:
        shapes |= {
            f"{name}input_layernorm.weight": (hidden,), f"{name}hidden_norm.weight": (hidden,),
            "norm.weight": (hidden,), "lm_head.weight": (shape.draft_vocab, hidden),
        }  # fmt: skip
        if shape.own_hidden:
            shapes["embed_tokens.weight"] = (shape.vocab, hidden)
    tensors = {
        key: (rng.normal(1.0 if "norm" in key else 0.0, 0.2, size)).astype(np.float32)
        for key, size in shapes.items()
    }
    target_ids = np.sort(rng.permutation(shape.vocab)[: shape.draft_vocab]).astype(np.int64)
    stored: dict[str, HostTensor] = {}
    for key, values in tensors.items():
        if form == "published" and third:
            key = key.replace("layers.0.", "midlayer.")
        if form == "speculators" and not third:
            key = key.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc.")
        stored[key] = float_tensor(values, "float32")
    if third:
        offsets = target_ids - np.arange(shape.draft_vocab)
        there = np.isin(np.arange(shape.vocab), target_ids)
        stored["d2t"] = HostTensor("int64", offsets.shape, offsets.view(np.uint8))
        stored["t2d"] = HostTensor("bool", there.shape, there.view(np.uint8))
    layout = {key: (tensor.dtype, tensor.shape) for key, tensor in stored.items()}
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / "model.safetensors", stored.values(), layout)
    layer = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": shape.inner, "num_attention_heads": shape.heads, "head_dim": shape.head_dim,
        "num_key_value_heads": shape.kv_heads, "num_hidden_layers": 1, "rms_norm_eps": EPS, "rope_theta": THETA,
        "vocab_size": shape.vocab, "max_position_embeddings": 64, "hidden_act": "silu", "torch_dtype": "float32",
    }  # fmt: skip
    own: dict[str, Any] = dict(config)
    if third:
        own |= {"draft_vocab_size": shape.draft_vocab, "norm_before_residual": norm_before_residual}
        own |= {"target_hidden_size": shape.hidden} if shape.own_hidden else {}
        own |= {"eagle_aux_hidden_state_layer_ids": layers} if layers else {}
    if form == "speculators":
        own |= {
            "speculators_model_type": method, "architectures": ["EagleSpeculator"], "transformer_layer_config": layer,
            "speculators_config": {"algorithm": method, "verifier": {"architectures": ["LlamaForCausalLM"]}},
        }  # fmt: skip
        layer = {}
    (path / "config.json").write_text(json.dumps(layer | own))
    return Head(shape, third, norm_before_residual, states, tensors, target_ids)
