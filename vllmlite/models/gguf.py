"""GGUF files as checkpoints: their metadata as a Hugging Face configuration, their tensors under its names.

What llama.cpp's converter did to a checkpoint is undone: it renames tensors, and reorders the rows of q and k of the
``llama`` architecture, whose rotary embedding it computes on neighbouring elements.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import HostTensor, QuantizedTensor
from vllmlite.errors import ModelError
from vllmlite.weights.checkpoint import Weights, listed
from vllmlite.weights.gguf import Gguf, read_gguf
from vllmlite.weights.gguf_blocks import FLOATS, KINDS, to_codes, to_floats

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
"""What ``general.architecture`` may name: Hugging Face's architecture and ``model_type``."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

REORDERED = ("llama",)
"""Architectures whose q and k have their rows reordered."""

NAMES = {
    EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""GGUF's names of a layer's tensors, by Hugging Face's."""
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which is how Llama 3's scaling is stored."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

CONTROL = 3
"""Type of the tokens that are not text."""
ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "</s>",
)
"""Control tokens that end a text or a turn in every model that has them."""

NEUTRAL = {
    "attention.scale": 0.0, "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "expert_count": 0,
    "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0, "attention.max_alibi_bias": 0.0,
    "attention.causal": True, "use_parallel_residual": False, "rope.scaling.finetuned": None,
}  # fmt: skip
"""Metadata that change what is computed, and their values that do not."""


def gguf_config(path: Path) -> dict[str, Any]:
    """What a ``config.json`` of the model in the file at ``path`` would say. ModelError where it cannot be said."""
    gguf = read_gguf(path)
    if gguf.get("split.count", int, 1) > 1:
        raise ModelError(
            f"{path}: is one of {gguf.metadata['split.count']} parts: join them with llama-gguf-split --merge"
        )
    name = gguf.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise ModelError(f"{path}: general.architecture={name!r}; accepted: {', '.join(ARCHITECTURES)}")
    fields = _Fields(gguf, name)
    embedding = gguf.tensors.get(NAMES[EMBEDDING])
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{path}: has no table {NAMES[EMBEDDING]}")
    for key, neutral in NEUTRAL.items():
        value = fields.get(key, neutral)
        if value != neutral and neutral is not None:
            raise ModelError(f"{path}: metadata {name}.{key}={value}; accepted: {neutral}")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer(
        "attention.key_length", hidden // heads if heads and not hidden % heads else None
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise ModelError(f"{path}: metadata {name}.{key}={fields.integer(key)}; accepted: {head_dim}")
    architecture, model_type = ARCHITECTURES[name]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, head_dim),
        "tie_word_embeddings": NAMES[HEAD] not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
        "torch_dtype": _dtype(gguf),
        "eos_token_id": _ends(gguf),
    }
    window = fields.integer("attention.sliding_window", 0)
    if window and name == "llama":
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    elif window:
        raise ModelError(f"{path}: metadata {name}.attention.sliding_window={window}; accepted: 0")
    return config


def open_gguf(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    quantization: str | None,
    keeps_blocks: bool,
) -> Weights:
    """The weights named in ``shapes``, after checking that the file at ``path`` holds exactly these.

    For a backend with weights in ``dtype`` and ``quantization``. Blocks whose codes are of that kind stay codes, with
    ``keeps_blocks`` those of any kind of ours; the others are decoded."""
    gguf = read_gguf(path)
    names = {name: _gguf_name(name) for name in shapes}
    missing = [stored for stored in names.values() if stored not in gguf.tensors]
    if missing:
        raise ModelError(f"{path}: tensors missing from the file: {listed(missing)}")
    unused = [stored for stored in gguf.tensors if stored not in {*names.values(), ROPE_FACTORS}]
    if unused:
        raise ModelError(f"{path}: tensors that the model has no use for: {listed(unused)}")
    for name, stored in names.items():
        if gguf.tensors[stored].shape != shapes[name]:
            raise ModelError(
                f"{path}: tensor {stored!r}: expected {list(shapes[name])}; found {list(gguf.tensors[stored].shape)}"
            )
    reordered = gguf.metadata["general.architecture"] in REORDERED
    fields = _Fields(gguf, gguf.metadata["general.architecture"])

    def rows(name: str) -> NDArray[np.uint8]:
        tensor = gguf.tensors[names[name]]
        if not (reordered and re.search(r"\.self_attn\.[qk]_proj\.", name)):
            return tensor.data
        key = "attention.head_count" if ".q_proj." in name else "attention.head_count_kv"
        heads = fields.integer(key, fields.integer("attention.head_count"))
        halves = tensor.data.reshape(heads, -1, 2, tensor.data.size // tensor.shape[0])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)

    def floats(name: str) -> HostTensor:
        tensor = gguf.tensors[names[name]]
        return to_floats(tensor.type, tensor.shape, rows(name), "float32" if quantization else dtype)

    def codes(name: str) -> QuantizedTensor:
        tensor = gguf.tensors[names[name]]
        return to_codes(tensor.type, (tensor.shape[0], tensor.shape[1]), rows(name))

    kept = _kept(quantization, keeps_blocks)
    types = {name: gguf.tensors[stored].type for name, stored in names.items() if len(shapes[name]) == 2}
    kinds = {name: KINDS[kind] for name, kind in types.items() if KINDS.get(kind) in kept}
    return Weights(floats, shapes, kinds, codes)


def has_blocks(path: Path) -> bool:
    """Whether the file at ``path`` has blocks whose codes a backend can keep."""
    return any(tensor.type in KINDS for tensor in read_gguf(path).tensors.values())


def treatment(path: Path, dtype: str, quantization: str | None, keeps_blocks: bool) -> str:
    """What :func:`open_gguf` makes of the file's matrices, in words."""
    counts = Counter(tensor.type for tensor in read_gguf(path).tensors.values() if len(tensor.shape) > 1)
    kept = _kept(quantization, keeps_blocks)
    parts = []
    for kind, count in sorted(counts.items()):
        done = f"in {dtype}" if kind in FLOATS else f"decoded to {dtype}"
        if KINDS.get(kind) in kept:
            done = f"kept as {KINDS[kind]} with scales rounded to bfloat16"
        elif quantization is not None:
            done = f"quantised to {quantization}"
        parts.append(f"{count} {kind} {done}")
    return "GGUF matrices: " + ", ".join(parts)


def _kept(quantization: str | None, keeps_blocks: bool) -> list[str]:
    """The kinds of codes that are kept."""
    return list(KINDS.values()) if keeps_blocks else [kind for kind in KINDS.values() if kind == quantization]


class _Fields:
    """The metadata of a file's architecture, each either a value or the same value for every layer."""

    def __init__(self, gguf: Gguf, architecture: str) -> None:
        self.gguf, self.architecture = gguf, architecture

    def get(self, key: str, default: Any = None) -> Any:
        value = self.gguf.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            if not value.size or (value != value[0]).any():
                raise self.error(key, "the same value for every layer")
            return value[0].item()
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self.error(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float):
            raise self.error(key, "a number")
        short = np.float32(value)  # 1e-5 is stored as the float32 next to it, and means 1e-5
        return float(str(short)) if short == value else float(value)

    def error(self, key: str, accepted: str) -> ModelError:
        shown = repr(self.gguf.metadata.get(f"{self.architecture}.{key}", "absent"))
        return ModelError(
            f"{self.gguf.path}: metadata {self.architecture}.{key}={shown[:80]}; accepted: {accepted}"
        )


def _rope_scaling(fields: _Fields, head_dim: int) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type", "none")
    factors = fields.gguf.tensors.get(ROPE_FACTORS)
    if factors is not None:
        return _llama3(fields, factors.type, factors.data, head_dim)
    if kind in ("none", "linear") and fields.get("rope.scaling.factor", 1.0) in (0.0, 1.0):
        return None
    if kind not in ("linear", "yarn"):
        raise fields.error("rope.scaling.type", "none, linear or yarn")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": fields.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = fields.integer("rope.scaling.original_context_length")
        if fields.get("rope.scaling.attn_factor", 1.0) != 1.0:
            raise fields.error("rope.scaling.attn_factor", "1")
    return scaling


def _llama3(fields: _Fields, kind: str, data: NDArray[np.uint8], head_dim: int) -> dict[str, Any]:
    """The scaling whose divisors are in the file, if it is that of the models that have it."""
    values = data.view("<f4") if kind == "F32" else np.zeros(0, np.float32)
    factor = float(values.max(initial=0))
    theta = fields.number("rope.freq_base", 10000.0)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    if values.size == head_dim // 2 and np.isfinite(values).all() and factor >= 1 and theta > 1:
        turns = LLAMA3["original_max_position_embeddings"] / (
            2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        )
        share = np.clip((turns - low) / (high - low), 0, 1)  # of the frequency that is left as it is
        if np.allclose(values, 1 / (share + (1 - share) / factor), rtol=1e-3):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    raise ModelError(f"{fields.gguf.path}: tensor {ROPE_FACTORS}: rotary divisors that are not Llama 3's")


def _dtype(gguf: Gguf) -> str:
    """What the weights of products are mostly in: a float's own dtype, or bfloat16 for blocks."""
    sizes: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        if len(tensor.shape) > 1:
            sizes[FLOATS.get(tensor.type, "bfloat16")] += tensor.data.size
    return sizes.most_common(1)[0][0]


def _ends(gguf: Gguf) -> list[int]:
    """Tokens that end a text: those that the file says, and control tokens that are known to by their names."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    said = {gguf.get(key, int) for key in keys if key in gguf.metadata}
    types = gguf.get("tokenizer.ggml.token_type", np.ndarray, np.zeros(0, np.int32))
    tokens = gguf.get("tokenizer.ggml.tokens", list, [])
    return sorted(
        said | {i for i in np.flatnonzero(types[: len(tokens)] == CONTROL).tolist() if tokens[i] in ENDS}
    )


def _gguf_name(name: str) -> str:
    """GGUF's name of a tensor, or the name itself where GGUF has none."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return NAMES.get(name, name)
    layer, module, part = match.groups()
    return f"blk.{layer}.{LAYER_NAMES[module]}.{part}" if module in LAYER_NAMES else name
