"""GGUF files for tests: any content that the format can hold, and checkpoints as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import float_values
from vllmlite.weights.safetensors import read_safetensors
from vllmlite.weights.schemes.gguf_blocks import BLOCKS, NAMES

TYPES = {name: number for number, name in NAMES.items()}
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}

Stored = tuple[str, tuple[int, ...], bytes]
"""Type, shape (a row's length last) and bytes of a tensor."""


class Typed:
    """A metadata value with an explicit type number."""

    def __init__(self, kind: int, value: Any) -> None:
        self.kind, self.value = kind, value


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(given: Any) -> bytes:
    """Encode a metadata value with its type, which is guessed for plain Python values."""
    if isinstance(given, Typed):
        return struct.pack("<I", given.kind) + struct.pack(SCALARS[given.kind], given.value)
    if isinstance(given, str):
        return struct.pack("<I", 8) + text(given)
    if isinstance(given, list):
        kind = 8 if isinstance(given[0], str) else 6 if isinstance(given[0], float) else 5
        items = [text(item) if kind == 8 else struct.pack(SCALARS[kind], item) for item in given]
        return struct.pack("<IIQ", 9, kind, len(given)) + b"".join(items)
    return value(Typed(7 if isinstance(given, bool) else 6 if isinstance(given, float) else 4, given))


def encode(
    metadata: Mapping[str, Any], tensors: Mapping[str, Stored], version: int = 3, alignment: int = 32
) -> bytes:
    """Encode a whole GGUF file."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(given) for key, given in metadata.items())
    data = b""
    for name, (kind, shape, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", TYPES[kind], len(data))
        data += content
    return head + bytes(-len(head) % alignment) + data


def blocks(kind: str, values: NDArray[np.float32]) -> bytes:
    """``values`` as blocks of type ``kind``, rounded as simply as possible."""
    if kind in ("F32", "F16"):
        return values.astype("<f4" if kind == "F32" else "<f2").tobytes()
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    groups = values.reshape(-1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1, keepdims=True), 1)
    scales = (largest / (127 if kind == "Q8_0" else -8)).astype("<f2")
    codes = np.rint(groups / np.where(scales == 0, 1, scales).astype(np.float32))
    packed: NDArray[Any]
    if kind == "Q8_0":
        packed = np.clip(codes, -127, 127).astype(np.int8).view(np.uint8)
    else:
        assert kind == "Q4_0"
        nibbles = (np.clip(codes, -8, 7) + 8).astype(np.uint8)
        packed = nibbles[:, :16] | nibbles[:, 16:] << 4
    return np.concatenate((scales.view(np.uint8).reshape(-1, 2), packed), axis=1).tobytes()


def reordered(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of q or k as the converter writes them for the ``llama`` architecture: halves of each head interleaved."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


MODULES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def contents(
    source: Path, kind_of: Callable[[str], str] = lambda name: "F32"
) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata and tensors of the checkpoint in directory ``source``; ``kind_of`` gives the type of each matrix."""
    config = json.loads((source / "config.json").read_text())
    name, heads = config["model_type"], config["num_attention_heads"]
    kv_heads, head_dim = config["num_key_value_heads"], config.get("head_dim")
    rope = config.get("rope_parameters") or {}
    metadata: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": kv_heads,
        f"{name}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{name}.rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        **(
            {f"{name}.attention.key_length": head_dim, f"{name}.attention.value_length": head_dim}
            if head_dim
            else {}
        ),
    }
    tensors: dict[str, Stored] = {}
    for key, tensor in read_safetensors(source / "model.safetensors").items():
        values, (stem, part) = float_values(tensor), key.rsplit(".", 1)
        if stem in TOP:
            stored = f"{TOP[stem]}.{part}"
        else:
            _, _, layer, module = stem.split(".", 3)
            stored = f"blk.{layer}.{MODULES[module]}.{part}"
            if name == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                values = reordered(values, heads if "q_proj" in module else kv_heads)
        kind = kind_of(stored) if values.ndim == 2 else "F32"
        tensors[stored] = (kind, values.shape, blocks(kind, values))
    return metadata, tensors


def tokenizer_metadata(source: Path, pre: str) -> dict[str, Any]:
    """The metadata of the byte-level tokenizer in directory ``source``."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    config = json.loads((source / "tokenizer_config.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    added = {token["id"] for token in tokenizer["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.token_type": [3 if i in added else 1 for i in range(len(vocab))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab[config["bos_token"]],
        "tokenizer.ggml.eos_token_id": vocab[config["eos_token"]],
        "tokenizer.chat_template": config["chat_template"],
    }


SCALE_OFFSETS = {
    "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "IQ1_M": (),
}  # fmt: skip
"""Where the float16 numbers of blocks are, if there are others than one at byte 0."""


def random_blocks(kind: str, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of random codes with finite scales."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (count, BLOCKS[kind][1]), np.uint8)
    for at in SCALE_OFFSETS.get(kind, (0,)):
        data[:, at : at + 2] = rng.normal(0, 0.1, count).astype("<f2").view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        data[:, 0] = rng.integers(118, 124, count)
        data[:3, 0] = 0, 1, 2  # the least, which are no normal numbers
    if kind == "IQ1_M":  # its float16 is in the highest nibbles of four words
        data[:, 55] = data[:, 55] & 15 | rng.choice((32, 160), count).astype(np.uint8)
    return data
