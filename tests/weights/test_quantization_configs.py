"""``quantization_config`` as in checkpoints on the hub: which scheme each module gets, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllmlite.errors import ModelError
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.quantization import Quantization
from vllmlite.models.quantization_config import read_quantization
from vllmlite.weights.host import Scheme
from vllmlite.weights.schemes.awq import AwqScheme
from vllmlite.weights.schemes.bitsandbytes import Bnb4Scheme, Bnb8Scheme
from vllmlite.weights.schemes.compressed import IntScheme, PackedIntScheme
from vllmlite.weights.schemes.float4 import NVFP4_COMPRESSED, NVFP4_MODELOPT
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.schemes.gptq import GptqScheme

INT4: dict[str, Any] = {
    "actorder": "weight", "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
    "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
}  # fmt: skip
CHANNEL: dict[str, Any] = INT4 | {"actorder": None, "group_size": None, "num_bits": 8, "strategy": "channel"}
BNB: dict[str, Any] = {
    "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
}  # fmt: skip
BLOCKS: dict[str, Any] = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
}  # fmt: skip


def compressed(form: str, weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group}, "format": form, "global_compression_ratio": 1.5, "ignore": ["lm_head"],
        "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
    } | changes  # fmt: skip


def read(path: Path, config: dict[str, Any]) -> Quantization:
    found = read_quantization(HfConfig({"quantization_config": config}, "config.json"), path)
    assert found is not None
    return found


AUTO_ROUND: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
DOWN, ROUTER, HEAD = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate", "lm_head"
REAL: dict[str, tuple[dict[str, Any], Scheme]] = {
    "AutoAWQ": (
        {"bits": 4, "group_size": 128, "modules_to_not_convert": ["gate"], "quant_method": "awq", "version": "gemm",
         "zero_point": True},
        AwqScheme(128),
    ),
    "AutoAWQ, older": (
        {"q_group_size": 64, "quant_method": "awq", "version": "GEMM", "w_bit": 4, "zero_point": True},
        AwqScheme(64),
    ),
    "AutoGPTQ": (
        {"bits": 4, "group_size": -1, "damp_percent": 0.1, "desc_act": True, "sym": True, "true_sequential": True,
         "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq"},
        GptqScheme(4, None, True, 1, ordered=False),
    ),
    "GPTQModel": (
        {"bits": 4, "dynamic": {r"-:.*mlp\.gate$": {}, r"+:.*o_proj": {"bits": 8}}, "group_size": 128,
         "desc_act": False, "sym": True, "lm_head": False, "quant_method": "gptq", "checkpoint_format": "gptq",
         "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:2.0.0"]}},
        GptqScheme(4, 128, True, 1),
    ),
    "AutoRound": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128,
         "sym": True, "data_type": "int", "iters": 0, "model_free": True, "autoround_version": "0.14.2",
         "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}, ROUTER: {"bits": 16, "data_type": "fp"}}},
        GptqScheme(4, 128, True, 1),
    ),
    "AutoRound packed as AWQ": (
        {"quant_method": "intel/auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 64,
         "sym": False, "act_bits": 16, "block_name_to_quantize": "model.layers",
         "extra_config": {r".*mlp\.gate$": {"bits": 16}}},
        AwqScheme(64),
    ),
    "fp8 in blocks": (
        BLOCKS | {"modules_to_not_convert": ["lm_head", "model.layers.1.input_layernorm", ROUTER]},
        Float8Scheme("block", (128, 128), "weight_scale_inv", "dynamic"),
    ),
    "AutoFP8": (
        {"activation_scheme": "static", "ignored_layers": ["lm_head", "re:.*gate"], "quant_method": "fp8"},
        Float8Scheme("tensor", inputs="static"),
    ),
    "w4a16": (
        compressed("pack-quantized", INT4, ignore=["lm_head", r"re:.*mlp\.gate$"]),
        PackedIntScheme(4, 128, True),
    ),
    "w8a8": (compressed("int-quantized", CHANNEL, ignore=["lm_head", ROUTER]), IntScheme(None, True)),
    "fp8 by channel": (
        compressed("float-quantized", CHANNEL | {"type": "float"}, ignore=["re:.*lm_head", ROUTER]),
        Float8Scheme("channel"),
    ),
    "fp8 of 2024": (
        compressed("naive-quantized", {"num_bits": 8, "strategy": "tensor", "type": "float"},
                   ignore=["lm_head", ROUTER], quantization_status="frozen"),
        Float8Scheme("tensor"),
    ),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", CHANNEL | {"group_size": 16, "num_bits": 4, "strategy": "tensor_group",
                   "type": "float"}, ignore=["lm_head", ROUTER], sparsity_config={}, transform_config={}),
        NVFP4_COMPRESSED,
    ),
    "ModelOpt": (
        {"ignore": ["lm_head", "model.layers.*.mlp.gate"], "quant_algo": "NVFP4", "quant_method": "modelopt",
         "kv_cache_scheme": {"num_bits": 8}, "producer": {"name": "modelopt"}, "config_groups": {}},
        NVFP4_MODELOPT,
    ),
    "unsloth": (
        BNB | {"load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True, "quant_method": "bitsandbytes",
               "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "mlp.gate"]},
        Bnb4Scheme("nf4", nested=256),
    ),
    "bitsandbytes without quant_method": (
        {"llm_int8_skip_modules": ["gate"], "llm_int8_threshold": 6.0, "load_in_8bit": True},
        Bnb8Scheme(),
    ),
}  # fmt: skip
"""The configuration, and the scheme of :data:`DOWN`; :data:`HEAD` is floats, and :data:`ROUTER` where it is named."""


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_are_read(name: str, tmp_path: Path) -> None:
    config, scheme = REAL[name]
    found = read(tmp_path, config)
    assert found.scheme(f"{DOWN}.weight") == scheme
    left_out = [HEAD, ROUTER] if "gate" in str(config) else [HEAD]
    assert not [module for module in left_out if found.scheme(f"{module}.weight") is not None]


STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (compressed("int-quantized", CHANNEL, kv_cache_scheme=STATIC), "fp8_e4m3"),
        (compressed("int-quantized", CHANNEL, kv_cache_scheme=STATIC | {"type": "int"}), None),
        (compressed("int-quantized", CHANNEL, kv_cache_scheme=STATIC | {"strategy": "attn_head"}), None),
        (compressed("int-quantized", CHANNEL, kv_cache_scheme=None), None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8_e4m3"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, None),
        ({"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}, "fp8_e4m3"),
    ],
)
def test_the_dtype_of_the_cache_is_read(config: dict[str, Any], dtype: str | None, tmp_path: Path) -> None:
    assert read(tmp_path, config).kv_cache_dtype == dtype


def test_auto_round_has_settings_by_module(tmp_path: Path) -> None:
    config = {
        "quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": False, "data_type": "int",
        "to_quant_block_names": ["model.layers.0", "model.layers.1", "lm_head"],
        "extra_config": {DOWN: {"bits": 8, "group_size": -1, "sym": True}},
    }  # fmt: skip
    found = read(tmp_path, config)
    assert found.scheme(f"{DOWN}.weight") == GptqScheme(8, None, True, 1)
    assert found.scheme("model.layers.1.mlp.up_proj.weight") == GptqScheme(4, 128, False, 1)
    assert found.scheme("model.layers.2.mlp.up_proj.weight") is None
    assert found.scheme("lm_head.weight") == GptqScheme(4, 128, False, 1)


def test_formats_may_differ_by_group(tmp_path: Path) -> None:
    groups = {
        "group_0": {"format": "pack-quantized", "targets": [r"re:.*mlp\..*"], "weights": INT4},
        "group_1": {"format": "float-quantized", "targets": ["Linear"], "weights": CHANNEL | {"type": "float"}},
    }  # fmt: skip
    found = read(tmp_path, compressed("mixed-precision", {}, config_groups=groups))
    assert found.scheme(f"{DOWN}.weight") == PackedIntScheme(4, 128, True)
    assert found.scheme("model.layers.1.self_attn.q_proj.weight") == Float8Scheme("channel")


def test_patterns_match_from_the_beginning_of_a_name(tmp_path: Path) -> None:
    """As GPTQModel and compressed-tensors match them."""
    dynamic = {"-:layers\\.1": {}, "+:model\\.layers\\.2\\.": {"bits": 8}}
    found = read(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic})
    schemes = [found.scheme(f"model.layers.{layer}.mlp.up_proj.weight") for layer in (1, 2)]
    assert schemes == [GptqScheme(4, 32, True, 1), GptqScheme(8, 32, True, 1)]
    config = compressed("int-quantized", CHANNEL, ignore=["re:layers\\.1"])
    assert read(tmp_path, config).scheme(f"{DOWN}.weight") is not None


def test_long_lists_of_modules_are_one_rule(tmp_path: Path) -> None:
    """A mixture of 94 layers and 128 experts has 36,000 weights and lists several hundred modules; one rule for each
    would take minutes."""
    names = [f"model.layers.{layer}.mlp.gate" for layer in range(600)]
    found = read(tmp_path, BLOCKS | {"modules_to_not_convert": names})
    short = read(tmp_path, BLOCKS | {"modules_to_not_convert": names[:1]})
    assert len(found.rules) == len(short.rules)
    assert not any(modules.patterns for modules, scheme in found.rules if scheme is None)
    assert found.scheme("model.layers.599.mlp.gate.weight") is None
    assert found.scheme("model.layers.599.mlp.gate_proj.weight") is not None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {".*": [1]}}, "dynamic=.*object of objects"),
        (AUTO_ROUND | {"packing_format": "auto_round:fp8"}, "packing_format='auto_round:fp8'; accepted: auto_gptq, "),
        (AUTO_ROUND | {"data_type": "mx_fp"}, "data_type='mx_fp'; accepted: \"int\""),
        (AUTO_ROUND | {"act_bits": 8}, "act_bits=8; accepted: 16"),
        (AUTO_ROUND | {"packing_format": "auto_awq", "bits": 8}, "bits=8; accepted: 4; AWQ packs no others"),
        (AUTO_ROUND | {"extra_config": {"lm_head": 16}}, "extra_config=.*an object of objects"),
        (AUTO_ROUND | {"block_name_to_quantize": [["model.layers.0"]]}, "block_name_to_quantize=.*names of modules"),
        (compressed("int-quantized", CHANNEL, sparsity_config="dense"), "sparsity_config='dense'; accepted: an object"),
        (compressed("int-quantized", CHANNEL, sparsity_config={"format": "sparse-24-bitmask"}),
         "sparsity_config: format='sparse-24-bitmask'; accepted: \"dense\""),
        (compressed("int-quantized", CHANNEL, quantization_status="initialized"), "'initialized'; accepted: "),
        (compressed("", {}, config_groups={"g": {"targets": 3, "weights": CHANNEL, "format": "int-quantized"}}),
         "targets=3; accepted: a list of module names"),
        (compressed("", {}, config_groups={"g": {"targets": [3], "weights": CHANNEL, "format": "int-quantized"}}),
         r"targets=\[3\]; accepted: a list of module names"),
    ],
)  # fmt: skip
def test_values_of_other_types_are_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        read(tmp_path, config)
