"""Checkpoints of random weights whose shapes use the native kernels differently than Llama's, and the same as GGUF
files, written by the gguf package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.models.families import read_spec
from vllmlite.models.tensors import stored_shapes

SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 1024,
        "intermediate_size": 3584, "num_hidden_layers": 7, "num_attention_heads": 16, "num_key_value_heads": 4,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 8192, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_embd": 1280,
        "n_layer": 36, "n_head": 20, "n_positions": 1024, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "gemma": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144,
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 18, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "sliding_window": 512,
        "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""0.70 billion weights with two of eight experts per token; GPT-2 large (0.77); Gemma 3 1B with 18 layers (0.78)."""
FORMATS = {"bf16": "BF16", "q8": "Q8_0"}


class Shape:
    """A shape in ``SHAPES``. Its checkpoint and GGUF files are created in ``directory`` and kept there."""

    def __init__(self, name: str, directory: Path) -> None:
        self._config = SHAPES[name]
        self.path = directory / f"shape-{name}"

    def gguf_path(self, kind: str) -> Path:
        """Return the path of the file that :meth:`gguf` creates."""
        return self.path.with_name(f"{self.path.name}-{kind}.gguf")

    def checkpoint(self) -> None:
        """Create a Hugging Face checkpoint directory with bfloat16 weights."""
        file = self.path / "model.safetensors"
        if file.exists():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(self._config))
        header, end = {}, 0
        for key, shape in self._shapes():
            size = 2 * int(np.prod(shape))
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        partial = file.with_suffix(".partial")
        rng = np.random.default_rng(0)
        with partial.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for key, shape in self._shapes():
                opened.write(_bf16(_random(rng, key, shape)).tobytes())
        partial.rename(file)

    def gguf(self, kind: str) -> None:
        """Create a GGUF file of the same weights, with weight matrices in ``kind``, one of ``FORMATS``.

        It is for timing only: heads of q and k are not in llama.cpp's order, and there is no tokenizer."""
        import gguf

        path = self.gguf_path(kind)
        if path.exists():
            return
        self.checkpoint()
        partial = path.with_suffix(".partial")
        writer = gguf.GGUFWriter(partial, _ARCHITECTURES[self._config["model_type"]])
        self._add_metadata(writer)
        stored = gguf.GGMLQuantizationType[FORMATS[kind]]
        for name, values in self._gguf_tensors():
            if values.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(path)

    def _shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return list(stored_shapes(read_spec(self.path)).items())

    def _add_metadata(self, writer: Any) -> None:
        spec = read_spec(self.path)
        writer.add_context_length(spec.max_position_embeddings)
        writer.add_embedding_length(spec.hidden_size)
        writer.add_block_count(spec.num_layers)
        writer.add_feed_forward_length(spec.intermediate_size)
        writer.add_head_count(spec.num_heads)
        writer.add_head_count_kv(spec.num_kv_heads)
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)
        (writer.add_layer_norm_eps if spec.norm.kind == "layer" else writer.add_layer_norm_rms_eps)(
            spec.norm.eps
        )
        layer = spec.layers[-1]
        if layer.rope is not None:
            writer.add_rope_dimension_count(layer.rope.rotary_dim)
            writer.add_rope_freq_base(layer.rope.theta)
        window = spec.layers[0].window
        if window is not None:
            writer.add_sliding_window(window)
        if layer.moe is not None:
            writer.add_expert_count(layer.moe.num_experts)
            writer.add_expert_used_count(layer.moe.top_k)
        writer.add_vocab_size(spec.vocab_size)
        writer.add_tokenizer_model("none")

    def _gguf_tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield names and values as in llama.cpp: experts stacked, weight matrices as ``[out, in]``."""
        import gguf

        spec = read_spec(self.path)
        architecture = _ARCHITECTURES[self._config["model_type"]]
        known = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(known, spec.num_layers)
        file = np.memmap(self.path / "model.safetensors", np.uint8, "r")
        at = 8 + int.from_bytes(file[:8].tobytes(), "little")
        experts: dict[str, list[NDArray[np.float32]]] = {}
        for key, shape in self._shapes():
            size = 2 * int(np.prod(shape))
            values = _floats(file[at : at + size].view("<u2")).reshape(shape)
            at += size
            module, kind = key.rsplit(".", 1)
            if spec.keys.transposed and module.rsplit(".", 1)[-1].startswith("c_"):
                values = values.T
            if spec.norm.unit_offset and values.ndim == 1:
                values = values + np.float32(1)
            if spec.keys.expert in module:
                before, after = module.split(spec.keys.expert)
                module = f"{before}{spec.keys.expert}{after.split('.', 1)[1]}"
                together = experts.setdefault(module, [])
                together.append(values)
                if len(together) < self._config["num_local_experts"]:
                    continue
                values = np.stack(experts.pop(module))
            yield f"{names.get_name(module)}.{kind}", np.ascontiguousarray(values)


_ARCHITECTURES = {"mixtral": "llama", "gpt2": "gpt2", "gemma3_text": "gemma3"}


def _random(rng: np.random.Generator, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    return values + np.float32(1) if len(shape) == 1 and key.endswith("weight") else values


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (values.view("<u4") >> 16).astype("<u2")


def _floats(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (values.astype(np.uint32) << 16).view(np.float32)
