"""GGUF files as checkpoints: converts their metadata to a Hugging Face configuration, and their tensors' names to its
names.

llama.cpp's converter changes some tensors, which is undone here: for some families it reorders the rows of q and k,
because llama.cpp rotates neighbouring elements; and it adds one to norm weights that are stored minus one.
:mod:`vllmlite.models.gguf_families` has the names per family.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.models.gguf_families import FAMILIES, KEYS, NEUTRAL, WITHOUT_EFFECT, GgufFamily
from vllmlite.models.keys import Keys
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources, stored_shapes
from vllmlite.weights.checkpoint import Weights, listed
from vllmlite.weights.gguf import Gguf, read_gguf
from vllmlite.weights.gguf_tokens import end_ids
from vllmlite.weights.host import HostTensor, HostWeight, PackedWeight, float_values
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import ModelWeights
from vllmlite.weights.schemes.gguf_blocks import BlockScheme, block_data, type_name

logger = logging.getLogger(__name__)

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with divisors of the rotary frequencies: Llama 3's scaling."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors with the divisors of the frequencies for longrope."""
UNUSED = re.compile(r"^rope_(freqs|factors_(long|short))\.weight$|\.attn_rot_embd\.weight$")
"""Regular expression of tensors that are read with the metadata, or are not needed."""
SECOND_NORM = "attn_norm_2"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

LARGEST_GEMMA_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Layer counts of the models that scale scores by hidden_size / num_heads instead of head_dim."""


def gguf_config(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` that is equivalent to the metadata of the GGUF file at ``path``. Raises ModelError for
    models that cannot be described so."""
    gguf = read_gguf(path)
    kind = gguf.get("general.type", str, "model")
    if kind != "model":
        raise ModelError(
            f"{path}: is not a language model: metadata general.type={kind!r}; accepted: 'model'"
        )
    name, family = _family(gguf)
    fields = _Fields(gguf, gguf.metadata["general.architecture"])
    embedding = gguf.tensors.get(f"{KEYS.embedding}.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{path}: has no table {KEYS.embedding}.weight")
    for key, neutral in NEUTRAL.items():
        if key not in family.values.values() and fields.get(key, neutral[0]) not in neutral:
            raise fields.error(key, " or ".join(map(repr, neutral)))
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer(
        "attention.key_length", hidden // heads if heads and not hidden % heads else None
    )
    rotated = fields.integer("rope.dimension_count", head_dim)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.error("attention.value_length", str(head_dim))
    if not 0 < rotated <= head_dim or (rotated < head_dim and not family.rotates_part):
        raise fields.error("rope.dimension_count", str(head_dim))
    if name == "stablelm" and f"{KEYS.layer}0.{KEYS.q_norm}.weight" in gguf.tensors:
        raise ModelError(
            f"{path}: per-head norms (StableLM 12B) are supported in checkpoint directories only"
        )
    for key, same in (
        ("attention.key_length_swa", head_dim),
        ("attention.value_length_swa", head_dim),
        ("rope.dimension_count_swa", rotated),
    ):
        if fields.integer(key, same) != same:
            raise fields.error(key, str(same))
    layers, inner = fields.integer("block_count"), fields.integer("feed_forward_length", 4 * hidden)
    if layers > len(gguf.tensors):
        raise fields.error("block_count", f"at most the {len(gguf.tensors)} tensors of the file")
    _check_experts(fields)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(fields, rotated),
        "tie_word_embeddings": f"{KEYS.head}.weight" not in gguf.tensors,
        "torch_dtype": _dtype(gguf),
        "eos_token_id": end_ids(gguf),
        **{key: fields.plain(metadata) for key, metadata in family.values.items() if fields.says(metadata)},
        **{key: stored in gguf.tensors for key, stored in family.biases.items()},
        **family.fixed,
    }
    _check_windows(fields, family, config)
    if family.rotates_part:
        config["partial_rotary_factor"] = rotated / head_dim
    if name in LARGEST_GEMMA_LAYERS:
        largest = layers == LARGEST_GEMMA_LAYERS[name]
        config["query_pre_attn_scalar"] = hidden / heads if largest else head_dim
    if name == "gpt-oss" and config["rope_scaling"] is not None:
        config["rope_scaling"]["truncate"] = False
    if name == "gpt2":
        config["n_inner"] = inner
    if name == "falcon":
        norms = 2 if _has_second_norm(gguf) else 1
        newer = norms == 2 or config["num_key_value_heads"] > 1
        config |= {
            "ffn_hidden_size": inner,
            "new_decoder_architecture": newer,
            "num_ln_in_parallel_attn": norms,
        }
    unknown = fields.unread() - WITHOUT_EFFECT
    if unknown:
        logger.warning("%s: unknown metadata without effect: %s", path, listed(sorted(unknown)))
    return config


def _check_windows(fields: _Fields, family: GgufFamily, config: dict[str, Any]) -> None:
    """Add the layers with a window to ``config``, if the file states them. Raises ModelError if unsupported."""
    theta = fields.number("rope.freq_base_swa", config["rope_theta"])
    if "rope_local_base_freq" not in config and theta != config["rope_theta"]:
        raise fields.error("rope.freq_base_swa", str(config["rope_theta"]))
    key, layers = "attention.sliding_window_pattern", config["num_hidden_layers"]
    pattern = fields.layers(key)
    if pattern is None:
        return
    if len(pattern) == 1:  # the period: the last layer of each has no window
        every = pattern[0]
        pattern = [every == 0 or layer % every < every - 1 or every == 1 for layer in range(layers)]
    if len(pattern) != layers:
        raise fields.error(key, f"a number, or one for each of {layers} layers")
    if family.alternates:
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif not all(pattern) and config.get("sliding_window"):
        raise fields.error(key, "a window in every layer")


def _check_experts(fields: _Fields) -> None:
    """Raise ModelError if the expert count differs from the tensors', which would make loops over it unbounded."""
    count, name = fields.integer("expert_count", 0), f"{KEYS.layer}0.ffn_gate_exps.weight"
    if count and (name not in fields.gguf.tensors or fields.gguf.tensors[name].shape[0] != count):
        raise fields.error("expert_count", f"the number of experts in {name}")


def gguf_keys(path: Path) -> Keys:
    """Return the names of the tensors in the GGUF file at ``path``."""
    gguf = read_gguf(path)
    keys = _family(gguf)[1].keys
    if _has_second_norm(gguf):
        return replace(keys, attn_norm=SECOND_NORM, mlp_norm=KEYS.attn_norm)
    return keys


def _family(gguf: Gguf) -> tuple[str, GgufFamily]:
    """Return the file's family and its name in ``FAMILIES``."""
    name = gguf.get("general.architecture", str)
    if name not in FAMILIES:
        raise ModelError(f"{gguf.path}: general.architecture={name!r}; accepted: {', '.join(FAMILIES)}")
    if name == "llama":
        fields = _Fields(gguf, name)
        if fields.integer("expert_count", 0):
            name = "mixtral"
        elif fields.integer("attention.sliding_window", 0):
            name = "mistral"
    return name, FAMILIES[name]


def _has_second_norm(gguf: Gguf) -> bool:
    """Return whether attention has a norm of its own, the usual one being the MLP's (Falcon 40B)."""
    return f"{KEYS.layer}0.{SECOND_NORM}.weight" in gguf.tensors


def open_gguf(path: Path, spec: DecoderSpec) -> Weights:
    """Open the weights of ``spec`` in the file at ``path``, after checking that exactly these tensors are stored."""
    gguf, shapes = read_gguf(path), stored_shapes(spec)
    missing = [name for name in shapes if name not in gguf.tensors]
    if missing:
        raise ModelError(f"{path}: tensors missing from the file: {listed(missing)}")
    unused = [name for name in gguf.tensors if name not in shapes and not UNUSED.search(name)]
    if unused:
        raise ModelError(f"{path}: unexpected tensors: {listed(unused)}")
    for name, shape in shapes.items():
        if _matrix(gguf.tensors[name].shape) != _matrix(shape):
            raise ModelError(
                f"{path}: tensor {name!r}: expected {list(shape)}; found {list(gguf.tensors[name].shape)}"
            )
    reordered, whole = _family(gguf)[1].reordered, spec.whole or spec

    def tensor(name: str) -> HostWeight:
        stored = replace(gguf.tensors[name], shape=shapes[name])
        if reordered and (match := re.search(r"\.attn_([qk])\.", name)):
            return in_halves(stored, whole.num_heads if match[1] == "q" else whole.num_kv_heads)
        if spec.norm.unit_offset and name.endswith("norm.weight"):
            values = _float32(gguf, name) - np.float32(1)
            return HostTensor("float32", stored.shape, values.view(np.uint8))
        return stored

    schemes = {
        name: stored.scheme
        for name, shape in shapes.items()
        if len(shape) == 2 and isinstance(stored := gguf.tensors[name], PackedWeight)
    }
    return Weights(tensor, shapes, schemes)


def in_halves(weight: HostWeight, heads: int) -> HostWeight:
    """Return ``weight`` with each head's rows in Hugging Face's order: even rows first, then odd rows."""
    return _transposed(weight, (heads, -1, 2))


def in_pairs(weight: HostWeight, heads: int) -> HostWeight:
    """Return ``weight`` with each head's rows in the order of GGUF: the inverse of :func:`in_halves`."""
    return _transposed(weight, (heads, 2, -1))


def _transposed(weight: HostWeight, rows: tuple[int, int, int]) -> HostWeight:
    """Return ``weight`` with the last two dimensions of its ``rows`` exchanged."""
    data = block_data(weight) if isinstance(weight, PackedWeight) else weight.data
    split = data.reshape(*rows, data.size // weight.shape[0])
    ordered = np.ascontiguousarray(split.swapaxes(1, 2)).reshape(-1)
    if isinstance(weight, PackedWeight):
        assert isinstance(weight.scheme, BlockScheme)
        return weight.scheme.pack(weight.shape, ordered)
    return replace(weight, data=ordered)


def _float32(gguf: Gguf, name: str) -> NDArray[np.float32]:
    """Return the elements of a tensor, which must be stored as F32."""
    stored = gguf.tensors[name]
    if type_name(stored) != "F32":
        raise ModelError(f"{gguf.path}: tensor {name!r}: is in {type_name(stored)}; accepted: F32")
    return float_values(cast(HostTensor, stored)).reshape(-1)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape as (rows, row length): leading dimensions are merged; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]


def has_blocks(path: Path) -> bool:
    """Return whether the file at ``path`` has quantised tensors."""
    return any(isinstance(tensor, PackedWeight) for tensor in read_gguf(path).tensors.values())


def treatment(path: Path, spec: DecoderSpec, packing: Packing) -> str:
    """Return a text for the start line: how the backend stores the matrices of the file at ``path``."""
    weights = ModelWeights(sources(spec), open_gguf(path, spec), packing)
    packed = weights.packed_keys()
    counts: Counter[tuple[str, str]] = Counter()
    for key, tensor in read_gguf(path).tensors.items():
        if len(tensor.shape) > 1 and key in weights.stored.shapes:
            form = packing.treatment(weights.stored.schemes.get(key), key in packed)
            counts[type_name(tensor), form] += 1
    return "GGUF matrices: " + ", ".join(
        f"{count} {name} {form}" for (name, form), count in sorted(counts.items())
    )


class _Fields:
    """The metadata ``ARCHITECTURE.KEY`` of a file; a per-layer array counts as one value if all are equal."""

    def __init__(self, gguf: Gguf, architecture: str) -> None:
        self.gguf, self.architecture = gguf, architecture
        self._read: set[str] = set()

    def unread(self) -> set[str]:
        """Return the architecture's keys that were not read."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix) for key in self.gguf.metadata if key.startswith(prefix)} - self._read

    def layers(self, key: str) -> list[Any] | None:
        """Return the list of values for each layer, or of one value for all; None if the key is absent."""
        self._read.add(key)
        value = self.gguf.metadata.get(f"{self.architecture}.{key}")
        if value is None:
            return None
        found: list[Any] = value.tolist() if isinstance(value, np.ndarray) else [value]
        if not found or any(type(item) not in (int, bool) or item < 0 for item in found):
            raise self.error(key, "integers or booleans")
        return found

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        value = self.gguf.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            if not value.size or (value != value[0]).any():
                raise self.error(key, "the same value for every layer")
            return value[0].item()
        return value

    def says(self, key: str) -> bool:
        """Return whether the key has a value; zero counts as absent, false as a value."""
        value = self.get(key)
        return value is False or bool(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self.error(key, "an integer")
        return value

    def plain(self, key: str) -> Any:
        """Return a value of any type; floats are rounded as :meth:`number` rounds them."""
        value = self.get(key)
        return self.number(key) if type(value) is float else value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float):
            raise self.error(key, "a number")
        short = np.float32(value)  # a stored float32 next to 1e-5 means 1e-5
        return float(str(short)) if short == value else float(value)

    def error(self, key: str, accepted: str) -> ModelError:
        shown = repr(self.gguf.metadata.get(f"{self.architecture}.{key}", "absent"))
        return ModelError(
            f"{self.gguf.path}: metadata {self.architecture}.{key}={shown[:80]}; accepted: {accepted}"
        )


def _rope_scaling(fields: _Fields, head_dim: int) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type", "linear")
    tensors = fields.gguf.tensors
    if LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
        factors = {"short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
        longrope: dict[str, Any] = {key: _factors(fields.gguf, name) for key, name in factors.items()}
        attention = fields.get("rope.scaling.attn_factor")
        return {"rope_type": "longrope", **longrope} | (
            {} if attention is None else {"attention_factor": attention}
        )
    if fields.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise fields.error("rope.scaling.attn_factor", "1")
    if kind not in ("none", "linear", "yarn"):
        raise fields.error("rope.scaling.type", "none, linear or yarn")
    extrapolated = fields.get("rope.scaling.yarn_ext_factor", -1.0)
    if extrapolated not in (-1.0, float(kind == "yarn")):
        raise fields.error("rope.scaling.yarn_ext_factor", str(float(kind == "yarn")))
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))
    scaled = kind == "yarn" or (kind == "linear" and factor not in (0.0, 1.0))
    divisors = tensors.get(ROPE_FACTORS)
    if divisors is not None and scaled:
        raise fields.error("rope.scaling.type", f"none with a tensor {ROPE_FACTORS}")
    if divisors is not None:
        return _llama3(fields, _float32(fields.gguf, ROPE_FACTORS), head_dim)
    if not scaled:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = fields.integer("rope.scaling.original_context_length")
        scaling["beta_fast"] = fields.number("rope.scaling.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = fields.number("rope.scaling.yarn_beta_slow", 1.0)
    return scaling


def _factors(gguf: Gguf, name: str) -> list[float]:
    return [float(str(value)) for value in _float32(gguf, name)]


def _llama3(fields: _Fields, values: NDArray[np.float32], head_dim: int) -> dict[str, Any]:
    """Return Llama 3's scaling parameters if they produce exactly these divisors. Raises ModelError if not."""
    factor = float(values.max(initial=0))
    theta = fields.number("rope.freq_base", 10000.0)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    if values.size == head_dim // 2 and np.isfinite(values).all() and factor >= 1 and theta > 1:
        turns = LLAMA3["original_max_position_embeddings"] / (
            2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        )
        share = np.clip((turns - low) / (high - low), 0, 1)  # share of the unscaled frequency
        if np.allclose(values, 1 / (share + (1 - share) / factor), rtol=1e-3):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    raise ModelError(f"{fields.gguf.path}: tensor {ROPE_FACTORS}: the rotary divisors are not Llama 3's")


def _dtype(gguf: Gguf) -> str:
    """Return the dtype of most matrix bytes; quantised blocks count as bfloat16."""
    sizes: Counter[str] = Counter()
    for tensor in gguf.tensors.values():
        if len(tensor.shape) > 1:
            if isinstance(tensor, PackedWeight):
                sizes["bfloat16"] += tensor.scheme.num_bytes(tensor.shape)
            else:
                sizes[tensor.dtype] += tensor.data.size
    return sizes.most_common(1)[0][0]
