"""Packers of quantised weights, written from the descriptions of the formats and independent of the readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, tuple[str, Array]]
"""Suffix → safetensors' dtype, and the elements (bits for dtypes that numpy lacks)."""


@dataclass(frozen=True)
class Packer:
    """``pack`` turns a float weight ``[N, K]`` into the tensors of a checkpoint and the values that they decode to."""

    config: dict[str, Any]
    pack: Callable[[Array], tuple[Tensors, Array]]
    head: bool = False
    """The output layer is quantised as well."""
    bias: bool = field(default=False)
    """A bias of zeros is stored for weights that have none."""


def grouped(weight: Array, bits: int, group: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Unsigned codes ``[N, K]`` and zeros ``[N, G]``, and float16 scales ``[N, G]``."""
    rows, columns = weight.shape
    parts = weight.reshape(rows, columns // group, group)
    most = 2**bits - 1
    if symmetric:
        scales = np.abs(parts).max(-1) / (2 ** (bits - 1) - 0.5)
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
        scales = (high - low) / most
        zeros = np.clip(np.rint(-low / scales), 0, most)
    scales = scales.astype(np.float16)
    codes = np.clip(np.rint(parts / scales[..., None].astype(np.float32)) + zeros[..., None], 0, most)
    return codes.reshape(rows, columns).astype(np.int64), zeros.astype(np.int64), scales


def meaning(codes: Array, zeros: Array, scales: Array, group_of: Array) -> Array:
    return (codes - zeros[:, group_of]).astype(np.float32) * scales.astype(np.float32)[:, group_of]


def in_words(values: Array, bits: int) -> Array:
    """Values ``[rows, n]`` as a stream of bits in 32-bit words, low bits first: int32 ``[rows, words]``."""
    rows = []
    for row in values.tolist():
        stream = 0
        for at, value in enumerate(row):
            stream |= value << (at * bits)
        count = -(-len(row) * bits // 32)
        rows.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return np.array(rows, np.uint32).view(np.int32)


def awq(group: int) -> Packer:
    def words(values: Array) -> Array:
        """Values ``[n, N]``: word w holds rows 8 w to 8 w + 7, with row order[i] in the i-th nibble."""
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        found = np.zeros((len(values), values.shape[1] // 8), np.int64)
        for nibble, row in enumerate(order):
            found |= values[:, row::8] << (4 * nibble)
        return found.astype(np.uint32).view(np.int32)

    def pack(weight: Array) -> tuple[Tensors, Array]:
        size = weight.shape[1] if group == -1 else group
        codes, zeros, scales = grouped(weight, 4, size, False)
        tensors: Tensors = {
            "qweight": ("I32", words(codes.T)), "qzeros": ("I32", words(zeros.T)), "scales": ("F16", scales.T)
        }  # fmt: skip
        return tensors, meaning(codes, zeros, scales, np.arange(weight.shape[1]) // size)

    return Packer(
        {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, pack
    )


def gptq(
    bits: int, group: int, *, symmetric: bool = True, version: int = 1, said: int = 0, order: bool = False,
    head: bool = False, bias: bool = False,
) -> Packer:  # fmt: skip
    """``said`` is the version that the configuration states, if it differs."""

    def pack(weight: Array) -> tuple[Tensors, Array]:
        columns = weight.shape[1]
        size = columns if group == -1 else group
        permuted = np.random.default_rng(columns).permutation(columns) if order else np.arange(columns)
        codes, zeros, scales = grouped(weight[:, permuted], bits, size, symmetric)
        group_of = np.empty(columns, np.int64)
        group_of[permuted] = np.arange(columns) // size
        codes = codes[:, np.argsort(permuted)]
        kept = zeros if version == 2 else (zeros - 1) % 2**bits
        tensors: Tensors = {
            "qweight": ("I32", in_words(codes, bits).T),
            "qzeros": ("I32", in_words(kept.T, bits)),
            "scales": ("F16", scales.T),
            "g_idx": ("I32", group_of.astype(np.int32)),
        }
        return tensors, meaning(codes, zeros, scales, group_of)

    config: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric}
    config |= {"desc_act": order, "checkpoint_format": "gptq_v2" if (said or version) == 2 else "gptq"}
    return Packer(config | ({"lm_head": True} if head else {}), pack, head, bias)


def packed_ints(bits: int, group: int | None, *, symmetric: bool = True, order: bool = False) -> Packer:
    def pack(weight: Array) -> tuple[Tensors, Array]:
        rows, columns = weight.shape
        size = group or columns
        permuted = np.random.default_rng(1).permutation(columns) if order else np.arange(columns)
        codes, zeros, scales = grouped(weight[:, permuted], bits, size, symmetric)
        group_of = np.empty(columns, np.int64)
        group_of[permuted] = np.arange(columns) // size
        codes = codes[:, np.argsort(permuted)]
        tensors: Tensors = {
            "weight_packed": ("I32", in_words(codes, bits)),
            "weight_scale": ("F16", scales),
            "weight_shape": ("I64", np.array([rows, columns])),
        }
        if not symmetric:
            tensors["weight_zero_point"] = ("I32", in_words(zeros.T, bits).T)
        if order:
            tensors["weight_g_idx"] = ("I32", group_of.astype(np.int32))
        return tensors, meaning(codes, zeros, scales, group_of)

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
    weights |= {"strategy": "group" if group else "channel", "actorder": "group" if order else None}
    return compressed("pack-quantized", weights, pack)


def compressed(
    form: str,
    weights: dict[str, Any],
    pack: Callable[[Array], tuple[Tensors, Array]],
    activations: dict[str, Any] | None = None,
) -> Packer:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*router.*"], "config_groups": {"group_0": group},
    }  # fmt: skip
    return Packer(config, pack)


def ints(
    strategy: str, *, static: bool = False, activations: dict[str, Any] | None = None, zero: int = 0
) -> Packer:
    """Packer of compressed-tensors' 8-bit integers. ``static``: constants for activations are stored; they and other
    ``activations`` have an effect if these are given."""

    def pack(weight: Array) -> tuple[Tensors, Array]:
        if strategy == "tensor":
            scales = np.full((1,), np.abs(weight).max() / 127, np.float32)
        else:
            scales = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
        codes = np.rint(weight / scales).astype(np.int8)
        tensors: Tensors = {"weight": ("I8", codes), "weight_scale": ("F32", scales)}
        if static:
            tensors["input_scale"] = ("F32", np.array([1 / 32], np.float32))
            tensors["input_zero_point"] = ("I8", np.array([zero], np.int8))
        return tensors, codes.astype(np.float32) * scales

    weights = {"num_bits": 8, "type": "int", "strategy": strategy}
    if activations is not None:
        activations = {"num_bits": 8, "type": "int", "dynamic": not static} | activations
    return compressed("int-quantized", weights, pack, activations)


def e4m3_values() -> Array:
    """The values of the e4m3 codes 0 to 126."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(values)


def to_e4m3(values: Array) -> tuple[Array, Array]:
    """The e4m3 codes, and the values that they decode to."""
    table = e4m3_values()
    codes = np.abs(np.abs(values)[..., None] - table).argmin(-1).astype(np.uint8)
    codes = np.where(values < 0, codes | 128, codes).astype(np.uint8)
    return codes, np.where(values < 0, -1, 1) * table[codes & 127]


def fp8(
    granularity: str,
    form: str = "fp8",
    scale: str = "weight_scale",
    scale_dtype: str = "F32",
    block: int = 32,
    activations: str | None = None,
) -> Packer:
    """Packer of 8-bit floats. ``activations``: ``dynamic``, or ``static`` for a constant that is stored."""

    def pack(weight: Array) -> tuple[Tensors, Array]:
        rows, columns = weight.shape
        if granularity == "block":
            padded = np.pad(weight, ((0, -rows % block), (0, -columns % block)))
            blocks = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block)
            scales = np.abs(blocks).max((1, 3)) / 448 + 1e-6
        elif granularity == "channel":
            scales = np.abs(weight).max(1, keepdims=True) / 448
        else:
            scales = np.abs(weight).max() / 448
        scales = np.asarray(scales, np.float32)
        bits: Array = scales
        if scale_dtype == "BF16":
            bits = (scales.view(np.uint32) >> 16).astype(np.uint16)
            scales = (bits.astype(np.uint32) << 16).view(np.float32)
        wide = scales
        if granularity == "block":
            wide = np.kron(scales, np.ones((block, block), np.float32))[:rows, :columns]
        codes, values = to_e4m3(weight / wide)
        tensors: Tensors = {"weight": ("F8_E4M3", codes), scale: (scale_dtype, bits)}
        if activations == "static":
            tensors["input_scale"] = ("F32", np.array([0.01], np.float32))
        return tensors, values.astype(np.float32) * wide

    if form == "fp8":
        config: dict[str, Any] = {
            "quant_method": "fp8",
            "activation_scheme": activations or "dynamic",
            "fmt": "e4m3",
        }
        if granularity == "block":
            config["weight_block_size"] = [block, block]
        return Packer(config, pack)
    if form == "modelopt":
        return Packer({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, pack)
    weights = {"num_bits": 8, "type": "float", "strategy": granularity, "block_structure": [block, block]}
    inputs = None
    if activations is not None:
        strategy = "group" if granularity == "block" else "token"
        inputs = {"num_bits": 8, "type": "float", "dynamic": activations == "dynamic", "strategy": strategy}
    return compressed("float-quantized", weights, pack, inputs)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp4(form: str) -> Packer:
    block = 32 if form == "mxfp4" else 16

    def pack(weight: Array) -> tuple[Tensors, Array]:
        rows, columns = weight.shape
        parts = weight.reshape(rows, -1, block)
        largest = np.abs(parts).max(-1) / 6
        tensors: Tensors = {}
        if form == "mxfp4":
            exponents = np.ceil(np.log2(largest))
            tensors["weight_scale"] = ("U8", (exponents + 127).astype(np.uint8))
            scales = 2.0**exponents
        else:
            total = np.float32(largest.max() / 448)
            codes, values = to_e4m3(largest / total)
            tensors["weight_scale"] = ("F8_E4M3", codes)
            divides = form == "compressed"
            name = "weight_global_scale" if divides else "weight_scale_2"
            stored = np.float32(1) / total if divides else total
            tensors[name] = ("F32", np.array([stored], np.float32))
            scales = values.astype(np.float32) / stored if divides else values.astype(np.float32) * stored
        ratio = parts / np.maximum(scales, 1e-30)[..., None]
        found = np.abs(np.abs(ratio)[..., None] - E2M1).argmin(-1)
        meant = np.where(ratio < 0, -1, 1) * E2M1[found] * scales[..., None].astype(np.float32)
        nibbles = np.where(ratio < 0, found | 8, found).reshape(rows, columns).astype(np.uint8)
        suffix = "weight" if form == "modelopt" else "weight_packed"
        tensors[suffix] = ("U8", nibbles[:, ::2] | nibbles[:, 1::2] << 4)
        return tensors, meant.reshape(rows, columns).astype(np.float32)

    if form == "modelopt":
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head*"]}
        return Packer(config, pack)
    weights = {"num_bits": 4, "type": "float", "strategy": "group" if form == "mxfp4" else "tensor_group"}
    weights["group_size"] = block
    return compressed("mxfp4-pack-quantized" if form == "mxfp4" else "nvfp4-pack-quantized", weights, pack)


def bnb4(kind: str, *, nested: bool, block: int = 64) -> Packer:
    table = np.sort(np.random.default_rng(5).uniform(-1, 1, 16)).astype(np.float32)

    def pack(weight: Array) -> tuple[Tensors, Array]:
        flat = weight.reshape(-1, block)
        absmax = np.abs(flat).max(1).astype(np.float32)
        state: dict[str, Any] = {
            "blocksize": block,
            "shape": list(weight.shape),
            "dtype": "float16",
            "quant_type": kind,
        }
        tensors: Tensors = {"weight.quant_map": ("F32", table)}
        if nested:
            second = np.linspace(-1, 1, 256).astype(np.float32)
            offset = np.float32(absmax.mean())
            parts = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
            outer = np.abs(parts).max(1).astype(np.float32) + np.float32(1e-6)
            codes = np.abs((parts / outer[:, None])[..., None] - second).argmin(-1).astype(np.uint8)
            state |= {"nested_blocksize": 256, "nested_offset": float(offset), "nested_dtype": "float32"}
            tensors["weight.absmax"] = ("U8", codes.reshape(-1)[: len(absmax)])
            tensors["weight.nested_absmax"] = ("F32", outer)
            tensors["weight.nested_quant_map"] = ("F32", second)
            absmax = (second[codes] * outer[:, None]).reshape(-1)[: len(absmax)] + offset
        else:
            tensors["weight.absmax"] = ("F32", absmax)
        found = np.abs((flat / absmax[:, None])[..., None] - table).argmin(-1).astype(np.uint8).reshape(-1)
        tensors["weight"] = ("U8", (found[::2] << 4 | found[1::2]).reshape(-1, 1))
        text = json.dumps(state).encode()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = ("U8", np.frombuffer(text, np.uint8))
        meant = table[found].reshape(-1, block) * absmax[:, None]
        return tensors, meant.reshape(weight.shape).astype(np.float32)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Packer(config | {"bnb_4bit_use_double_quant": nested, "_load_in_4bit": True}, pack)


def bnb8() -> Packer:
    def pack(weight: Array) -> tuple[Tensors, Array]:
        scales = np.abs(weight).max(1).astype(np.float32)
        codes = np.rint(weight * 127 / scales[:, None]).astype(np.int8)
        tensors: Tensors = {
            "weight": ("I8", codes), "SCB": ("F32", scales), "weight_format": ("U8", np.zeros((), np.uint8))
        }  # fmt: skip
        return tensors, codes.astype(np.float32) * (scales / np.float32(127))[:, None]

    return Packer({"quant_method": "bitsandbytes", "load_in_8bit": True}, pack)


PACKERS: dict[str, Packer] = {
    "awq g32": awq(32),
    "awq channel": awq(-1),
    "gptq 4 bits": gptq(4, 32),
    "gptq 4 bits, version 2": gptq(4, 32, version=2),
    "gptq version 2 that says 1": gptq(4, 32, version=2, said=1),
    "gptq asymmetric": gptq(4, 32, symmetric=False),
    "gptq asymmetric, version 2": gptq(4, 32, symmetric=False, version=2),
    "gptq desc_act": gptq(4, 32, order=True),
    "gptq 2 bits": gptq(2, 32, symmetric=False),
    "gptq 3 bits": gptq(3, 32, order=True),
    "gptq 8 bits by channel": gptq(8, -1),
    "gptq output layer, biases of zeros": gptq(4, 32, head=True, bias=True),
    "pack-quantized g32": packed_ints(4, 32),
    "pack-quantized by channel": packed_ints(8, None),
    "pack-quantized asymmetric": packed_ints(4, 32, symmetric=False),
    "pack-quantized actorder": packed_ints(4, 32, order=True),
    "int-quantized": ints("channel"),
    "int-quantized, static": ints("tensor", static=True),
    "fp8 blocks": fp8("block", scale="weight_scale_inv"),
    "fp8 blocks, scales in bfloat16": fp8("block", scale="weight_scale_inv", scale_dtype="BF16"),
    "float-quantized by channel": fp8("channel", "compressed"),
    "float-quantized by block": fp8("block", "compressed"),
    "modelopt nvfp4": fp4("modelopt"),
    "nvfp4-pack-quantized": fp4("compressed"),
    "mxfp4-pack-quantized": fp4("mxfp4"),
    "bitsandbytes nf4": bnb4("nf4", nested=False),
    "bitsandbytes fp4, double quantised": bnb4("fp4", nested=True),
    "bitsandbytes nf4 of an AMD GPU": bnb4("nf4", nested=False, block=128),
    "bitsandbytes fp4 of an AMD GPU": bnb4("fp4", nested=True, block=128),
    "bitsandbytes int8": bnb8(),
}

FP8 = {
    "blocks": fp8("block", scale="weight_scale_inv", block=128),
    "blocks, scales in bfloat16": fp8("block", scale="weight_scale_inv", scale_dtype="BF16", block=128),
    "tensor": fp8("tensor"),
    "tensor, static": fp8("tensor", activations="static"),
    "channel": fp8("channel", "compressed", activations="dynamic"),
    "compressed-tensors' blocks": fp8("block", "compressed", block=128, activations="dynamic"),
    "modelopt": fp8("tensor", "modelopt", activations="static"),
}
"""Packers of 8-bit floats whose products quantise activations."""

W8A8 = {
    "dynamic": ints("channel", activations={"strategy": "token"}),
    "dynamic asymmetric": ints("channel", activations={"strategy": "token", "symmetric": False}),
    "static": ints("tensor", static=True, activations={"strategy": "tensor"}),
    "static asymmetric": ints(
        "channel", static=True, activations={"strategy": "tensor", "symmetric": False}, zero=-17
    ),
}
"""Packers of integers whose products quantise activations, so that these do not equal those of the values."""
