"""Read ``quantization_config``: the scheme of each weight of a quantised checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllmlite.config.engine_config import METHOD_SYNONYMS, QUANTIZATIONS
from vllmlite.errors import ModelError
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.quantization import ALL, HEAD, Modules, Quantization, Rule
from vllmlite.weights.checkpoint import stored_names
from vllmlite.weights.host import Scheme
from vllmlite.weights.not_checkpoints import quantization_of
from vllmlite.weights.schemes.awq import AwqScheme
from vllmlite.weights.schemes.bitsandbytes import Bnb4Scheme, Bnb8Scheme
from vllmlite.weights.schemes.compressed import IntScheme, PackedIntScheme
from vllmlite.weights.schemes.float4 import MXFP4, MXFP4_EXPERTS, NVFP4_COMPRESSED, NVFP4_MODELOPT
from vllmlite.weights.schemes.float8 import BLOCK, Float8Scheme
from vllmlite.weights.schemes.gptq import GptqScheme
from vllmlite.weights.schemes.tiles import GROUP, TILES
from vllmlite.weights.schemes.w8a8 import W8A8Scheme

logger = logging.getLogger(__name__)

OWN = "vllmlite"
"""The ``quant_method`` of vllmlite's own format, which ``vllmlite quantize`` writes."""
FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq", "hf_quant_config.json": "modelopt"}
"""Files that hold the section in older checkpoints, which have none in config.json, with the method of each."""


def own_quantization(kind: str) -> Quantization:
    """Return the quantisation of vllmlite's own format with the weights of all products in scheme ``kind``."""
    return Quantization(kind, ((ALL, TILES[kind]),), own=True)


def own_config(kind: str) -> dict[str, Any]:
    """Return the ``quantization_config`` of vllmlite's own format."""
    return {"quant_method": OWN, "format": kind, "group_size": GROUP}


def read_quantization(config: HfConfig, path: Path) -> Quantization | None:
    """Return the quantisation of the checkpoint at ``path``, read from ``config`` or from an older file beside it. None
    if its weights are floats, even if these files say otherwise. Raises ModelError for formats that are not supported,
    and for values that a format does not have."""
    section = config.section("quantization_config") or config.section("compression_config")
    method = None
    if section is None:
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None or _are_floats(path, file.name):
            return None
        section, method = HfConfig.of_file(file), FILES[file.name]
        section = section.section("quantization") or section
    found = parse_quantization(section, method)
    return None if not found.own and _are_floats(path, "quantization_config") else found


def parse_quantization(section: HfConfig, method: str | None = None) -> Quantization:
    """Return the quantisation that a ``quantization_config`` describes. ``method`` is used if the section names none.
    Raises ModelError for formats that are not supported, and for values that a format does not have."""
    if section.get("quant_method") is not None:
        method = section.get("quant_method")
    elif section.get("load_in_4bit") is not None or section.get("load_in_8bit") is not None:
        method = "bitsandbytes"  # older configurations do not name this method
    name = str(method).lower()
    name = METHOD_SYNONYMS.get(name, name)
    if name not in _READERS:
        hint = _HINTS.get(name, "convert it to one of these, or to GGUF")
        raise section.error("quant_method", f"{', '.join(sorted(_READERS))}; {hint}")
    found = _READERS[name](section)
    unread = section.remaining().keys() - _WITHOUT_EFFECT
    if unread:
        logger.info(
            "%s: keys that are not known have no effect: %s", section.where, ", ".join(sorted(unread))
        )
    return found


def _are_floats(path: Path, source: str) -> bool:
    """Return whether no tensor of the checkpoint is quantised. If so, log that ``source``, which says otherwise, is
    ignored."""
    names = stored_names(path)
    if not names or quantization_of(names) is not None:
        return False
    logger.warning("%s: %s is ignored: all weights are stored as floats", path, source)
    return True


def _own(section: HfConfig) -> Quantization:
    section.choice("quant_method", {OWN: OWN})
    if section.integer("group_size") != GROUP:
        raise section.error("group_size", str(GROUP))
    return own_quantization(section.choice("format", {kind: kind for kind in QUANTIZATIONS}))


def _group_size(section: HfConfig, key: str = "group_size") -> int | None:
    """Return the number of columns of a group, or None for a whole row (-1 or null)."""
    value = section.get(key)
    return None if value in (None, -1) else section.integer(key)


def _awq(section: HfConfig) -> Quantization:
    section.require("bits" if section.get("bits") is not None else "w_bit", 4)
    section.require("zero_point", True)
    version = str(section.get("version") or "gemm").lower()
    if version != "gemm":
        raise section.error("version", '"gemm"; the others store the weights in the order of one kernel')
    key = "group_size" if section.get("group_size") is not None else "q_group_size"
    scheme = AwqScheme(_group_size(section, key))
    return Quantization("awq", (_floats(section, "modules_to_not_convert"), (HEAD, None), (ALL, scheme)))


def _gptq(section: HfConfig) -> Quantization:
    section.require("is_marlin_format", False, "Marlin stores the weights in the order of one kernel")
    form = section.choice("checkpoint_format", {"gptq": "gptq", "gptq_v2": "gptq_v2"}, "gptq")
    scheme = _gptq_scheme(section, {}, form)
    rules: list[Rule] = []
    dynamic = section.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(own or {}, dict) for own in dynamic.values()):
        raise section.error("dynamic", "an object of objects")
    for pattern, overrides in dynamic.items():
        left_out = pattern.startswith("-:")
        expression = pattern.removeprefix("+:").removeprefix("-:")
        modules = _matching(section, "dynamic", [expression])
        rules.append((modules, None if left_out else _gptq_scheme(section, overrides or {}, form)))
    if section.get("lm_head") is not True:
        rules.append((HEAD, None))
    return Quantization("gptq", (*rules, _floats(section, "modules_to_not_convert"), (ALL, scheme)))


def _gptq_scheme(section: HfConfig, overrides: dict[str, Any], form: str) -> Scheme:
    own = section.fixed(**overrides) if overrides else section
    bits = own.integer("bits")
    if bits not in (2, 3, 4, 8):
        raise own.error("bits", "2, 3, 4 or 8")
    ordered = not own.boolean("desc_act", False) or own.get("static_groups") is True
    symmetric = own.boolean("sym", True)
    if not symmetric and section.get("checkpoint_format") is None:
        logger.warning("%s: checkpoint_format is absent: zeros are taken for version 1's", section.where)
    return GptqScheme(bits, _group_size(own), symmetric, 2 if form == "gptq_v2" else 1, ordered)


def _auto_round(section: HfConfig) -> Quantization:
    """Read the section of AutoRound: codes are packed as in GPTQ (version 1) or AWQ; some modules have settings of
    their own."""
    packings = {"auto_gptq": "gptq", "auto_awq": "awq"}
    packings |= {f"auto_round:{name}": method for name, method in packings.items()}
    packing = section.choice("packing_format", packings, "auto_round:auto_gptq")
    scheme = _auto_round_scheme(section, packing)
    extra = section.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(own, dict) for own in extra.values()):
        raise section.error("extra_config", "an object of objects")
    exceptions: dict[Scheme | None, list[str]] = {}
    for name, own in extra.items():
        exceptions.setdefault(_auto_round_scheme(section.fixed(**own), packing), []).append(name)
    rules: list[Rule] = []
    for own_scheme, names in exceptions.items():
        plain = [name for name in names if re.fullmatch(r"[\w.-]+", name)]
        expressions = [name for name in names if name not in plain]
        modules = _matching(section, "extra_config", [f".*?(?:{expression})" for expression in expressions])
        rules.append((replace(modules, names=frozenset(plain)), own_scheme))
    blocks = section.get("block_name_to_quantize") or section.get("to_quant_block_names") or []
    blocks = blocks.split(",") if isinstance(blocks, str) else blocks
    if not isinstance(blocks, list) or not all(isinstance(name, str) for name in blocks):
        raise section.error("block_name_to_quantize", "names of modules")
    if blocks:
        outside = "|".join(re.escape(name.strip()) for name in blocks)
        rules.append((_matching(section, "block_name_to_quantize", [f"(?!{outside})"]), None))
    else:
        rules.append((HEAD, None))
    return Quantization("auto-round", (*rules, (ALL, scheme)))


def _auto_round_scheme(own: HfConfig, packing: str) -> Scheme | None:
    bits = own.integer("bits")
    if bits >= 16:
        return None
    own.require("data_type", "int")
    if (own.get("act_bits") or 16) < 16:
        raise own.error("act_bits", "16: quantised activations are not supported")
    if packing == "awq":
        own.require("bits", 4, "AWQ packs no others")
        return AwqScheme(_group_size(own))
    if bits not in (2, 3, 4, 8):
        raise own.error("bits", "2, 3, 4 or 8")
    return GptqScheme(bits, _group_size(own), own.boolean("sym", True), 1)


def _float8(section: HfConfig) -> Quantization:
    form = section.choice("fmt", {"e4m3": "e4m3", "e5m2": "e5m2"}, "e4m3")
    found = section.choice("activation_scheme", {"dynamic": "dynamic", "static": "static"}, "dynamic")
    inputs = found if form == "e4m3" else None
    section.without_effect("scale_fmt")
    blocks = section.get("weight_block_size")
    if blocks is None:
        scheme = Float8Scheme("tensor", inputs=inputs)
    else:
        block = _block(section, "weight_block_size")
        scheme = Float8Scheme("block", block, "weight_scale_inv", _float8_inputs(block, inputs))
    names = _floats(section, "modules_to_not_convert"), _floats(section, "ignored_layers")
    return Quantization("fp8", (*names, (HEAD, None), (ALL, scheme)), kv_cache_dtype=_cache_dtype(section))


def _cache_dtype(section: HfConfig) -> str | None:
    """Return the dtype of the key/value cache that a checkpoint is made for; None if it names none that is
    supported."""
    scheme, algorithm = section.get("kv_cache_scheme"), section.get("kv_cache_quant_algo")
    if isinstance(scheme, dict):
        static = scheme.get("strategy", "tensor") == "tensor" and not scheme.get("dynamic")
        return "fp8_e4m3" if static and (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else None
    return "fp8_e4m3" if scheme == "static" or algorithm == "FP8" else None


def _float8_inputs(block: tuple[int, int], inputs: str | None) -> str | None:
    """Return how products with weights in blocks quantise activations: ``dynamic``, which needs blocks of the size that
    kernels support, or None: not at all."""
    return inputs if block == (BLOCK, BLOCK) and inputs == "dynamic" else None


def _block(section: HfConfig, key: str) -> tuple[int, int]:
    value = section.get(key)
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(n) is int and 0 < n < 65536 for n in value)
    ):
        raise section.error(key, "two whole numbers: rows and columns of a block")
    return value[0], value[1]


def _mxfp4(section: HfConfig) -> Quantization:
    """gpt-oss: the experts, and nothing else."""
    experts = Modules(frozenset({"mlp.experts"}))
    return Quantization("mxfp4", (_floats(section, "modules_to_not_convert"), (experts, MXFP4_EXPERTS)))


def _modelopt(section: HfConfig) -> Quantization:
    schemes: dict[str, Scheme] = {"FP8": Float8Scheme("tensor", inputs="static"), "NVFP4": NVFP4_MODELOPT}
    name = section.choice("quant_algo", {name: name for name in schemes})
    if name == "NVFP4":
        section.require("group_size", 16)
    section.without_effect("producer")
    names = _floats(section, "exclude_modules"), _floats(section, "ignore")
    rules = (*names, (HEAD, None), (ALL, schemes[name]))
    return Quantization("modelopt", rules, kv_cache_dtype=_cache_dtype(section))


def _bitsandbytes(section: HfConfig) -> Quantization:
    names = _floats(section, "llm_int8_skip_modules"), (HEAD, None)
    if section.get("load_in_8bit") is True:
        return Quantization("bitsandbytes", (*names, (ALL, Bnb8Scheme())))
    if section.get("load_in_4bit") is not True:
        raise section.error("load_in_4bit", "true, or load_in_8bit")
    kind = section.choice("bnb_4bit_quant_type", {"nf4": "nf4", "fp4": "fp4"}, "fp4")
    section.require("bnb_4bit_quant_storage", "uint8")
    nested = 256 if section.boolean("bnb_4bit_use_double_quant", False) else None
    return Quantization("bitsandbytes", (*names, (ALL, Bnb4Scheme(kind, nested=nested))))


def _compressed(section: HfConfig) -> Quantization:
    status = section.get("quantization_status")
    if status not in (None, "compressed", "frozen"):
        raise section.error("quantization_status", '"compressed" or "frozen"')
    sparsity = section.section("sparsity_config")
    if sparsity is not None:
        sparsity.require("format", "dense")
    if section.get("transform_config"):
        raise section.error("transform_config", "none")
    section.without_effect("global_compression_ratio")
    form = section.get("format")
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise section.error("config_groups", "an object of groups")
    rules: list[Rule] = [_floats(section, "ignore")]
    catch_all: list[Rule] = []
    for name, values in groups.items():
        if not isinstance(values, dict):
            raise section.error("config_groups", f"an object as {name}")
        group = HfConfig(values, f"{section.where}: config_groups: {name}")
        scheme = _compressed_scheme(group, str(group.get("format") or form))
        targets = _names(group, "targets") or ["Linear"]
        rules.append((_modules(group, "targets", [name for name in targets if name != "Linear"]), scheme))
        if "Linear" in targets:
            catch_all.append((ALL, scheme))
    return Quantization("compressed-tensors", (*rules, *catch_all), kv_cache_dtype=_cache_dtype(section))


def _compressed_scheme(group: HfConfig, form: str) -> Scheme:
    weights = group.section("weights")
    if weights is None:
        raise group.error("weights", "an object: activations alone are not quantised here")
    bits, kind = weights.integer("num_bits"), weights.choice("type", {"int": "int", "float": "float"}, "int")
    symmetric = weights.boolean("symmetric", True)
    accepted = {
        "tensor": "tensor",
        "channel": "channel",
        "group": "group",
        "block": "block",
        "tensor_group": "group",
    }
    strategy = weights.choice(
        "strategy", accepted, "channel" if weights.get("group_size") is None else "group"
    )
    group_size = _group_size(weights) if strategy == "group" else None
    if form == "pack-quantized" and kind == "int" and bits in (4, 8) and strategy in ("channel", "group"):
        order = weights.get("actorder")
        # "static" and "weight" reorder columns only while quantising and store groups as runs; "group" stores g_idx.
        return PackedIntScheme(bits, group_size, symmetric, ordered=order not in ("group", "dynamic", True))
    if form in ("int-quantized", "naive-quantized") and kind == "int" and bits == 8 and strategy != "block":
        activations = group.section("input_activations")
        if activations is None or group_size is not None:
            return IntScheme(group_size, symmetric, strategy == "tensor")
        return _int8_activations(activations, symmetric, strategy == "tensor")
    if (
        form in ("float-quantized", "naive-quantized")
        and kind == "float"
        and bits == 8
        and strategy != "group"
    ):
        return _compressed_float8(group, weights, strategy)
    if form == "nvfp4-pack-quantized" and kind == "float" and bits == 4:
        return NVFP4_COMPRESSED
    if form == "mxfp4-pack-quantized" and kind == "float" and bits == 4:
        return MXFP4
    raise ModelError(
        f"{group.where}: format={form!r} with {bits}-bit {kind} weights by {strategy}; accepted: pack-quantized with 4 "
        "or 8 bits by channel or group, int-quantized and float-quantized with 8, nvfp4-pack-quantized, "
        "mxfp4-pack-quantized"
    )


def _compressed_float8(group: HfConfig, weights: HfConfig, strategy: str) -> Float8Scheme:
    """Return the scheme of e4m3 weights; ``input_activations`` says how products quantise activations."""
    activations = group.section("input_activations")
    inputs = None
    if activations is not None:
        activations.require("num_bits", 8)
        activations.require("type", "float")
        inputs = "dynamic" if activations.boolean("dynamic", False) else "static"
    if strategy != "block":
        return Float8Scheme(strategy, inputs=inputs)
    block = _block(weights, "block_structure")
    return Float8Scheme("block", block, inputs=_float8_inputs(block, inputs))


def _int8_activations(activations: HfConfig, symmetric: bool, per_tensor: bool) -> W8A8Scheme:
    """Return the scheme of int8 weights whose products quantise activations as ``activations`` says."""
    activations.require("num_bits", 8)
    activations.require("type", "int")
    static = not activations.boolean("dynamic", False)
    accepted = "tensor" if static else "token"
    if activations.get("strategy") not in (None, accepted):
        raise activations.error(
            "strategy", f'"{accepted}" for {"static" if static else "dynamic"} activations'
        )
    return W8A8Scheme(
        None, symmetric, per_tensor, static=static, symmetric_input=activations.boolean("symmetric", True)
    )


def _floats(section: HfConfig, key: str) -> Rule:
    """Return a rule by which the weights of the modules listed under ``key`` are floats."""
    return _modules(section, key, _names(section, key)), None


def _names(section: HfConfig, key: str) -> list[str]:
    names = section.get(key)
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise section.error(key, "a list of module names")
    return names


def _modules(section: HfConfig, key: str, names: Sequence[str]) -> Modules:
    """Return the modules that ``names``, the value of ``key``, refer to: regular expressions after ``re:``, names with
    stars, or plain names."""
    expressions = [name[3:] for name in names if name.startswith("re:")]
    plain = {name for name in names if not name.startswith("re:")}
    starred = sorted(name for name in plain if "*" in name)
    expressions += [rf"(?:.*\.)?{re.escape(name)}(?:$|\.)".replace(r"\*", ".*") for name in starred]
    return replace(_matching(section, key, expressions), names=frozenset(plain.difference(starred)))


def _matching(section: HfConfig, key: str, expressions: Sequence[str]) -> Modules:
    """Return the modules whose names match one of ``expressions``, the value of ``key``, from the beginning."""
    patterns = []
    for expression in expressions:
        try:
            patterns.append(re.compile(f"^(?:{expression})"))
        except re.error as error:
            raise section.error(key, f"regular expressions ({expression[:80]!r}: {error})") from None
    return Modules(patterns=tuple(patterns))


_READERS: dict[str, Callable[[HfConfig], Quantization]] = {
    OWN: _own, "awq": _awq, "gptq": _gptq, "fp8": _float8, "modelopt": _modelopt, "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed, "auto-round": _auto_round, "mxfp4": _mxfp4,
}  # fmt: skip
_HINTS = {
    "quark": "export it as fp8 or compressed-tensors",
    "torchao": "save it dequantised, or quantise it with another tool",
    "hqq": "save it dequantised, or quantise it with another tool",
    "aqlm": "take another quantisation of the model",
    "exl2": "take another quantisation of the model",
    "exl3": "take another quantisation of the model",
}
"""Method that is not supported → advice for the error message."""
_WITHOUT_EFFECT = frozenset(
    """
    _load_in_4bit _load_in_8bit act_bits act_group_aware amp autoround_version backend batch_size
    bnb_4bit_compute_dtype calib_data damp_auto_increment damp_percent data_type dataset do_fuse enable_minmax_tuning
    enable_norm_bias_tuning enable_quanted_input exllama_config fuse_max_seq_len gradient_accumulate_steps
    has_fp16_weight is_marlin_format iters llm_int8_enable_fp32_cpu_offload low_gpu_mem_usage lr minmax_lr model_free
    nsamples provider scale_dtype seqlen vllm_backend
    llm_int8_has_fp16_weight llm_int8_threshold meta model_file_base_name model_name_or_path model_seqlen
    modules_in_block_to_quantize pack_dtype quant_method quantization_status quantizer static_groups tokenizer
    true_sequential use_cuda_fp16 use_exllama version
    """.split()
)
"""Keys that only record how a checkpoint was made or how another program computes with it."""
