"""The text models inside multimodal checkpoints: equal to transformers', without their vision tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from checkpoints import TINY
from model_runs import chunked, expected_logits, prompts
from native import needs_native_cpu
from paged import PagedModel
from tokenizer_files import write_tokenizer

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import load_model, open_model, plan_model, read_spec
from vllmlite.quantize import quantize_checkpoint
from vllmlite.weights.packing import Packing

SIGLIP = {"model_type": "siglip_vision_model", "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
QWEN = {"depth": 1, "hidden_size": 64, "embed_dim": 32, "num_heads": 2, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 3, 3]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 11, "num_hidden_layers": 7}, SIGLIP | SIZES),
    "gemma3-linear": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        SIGLIP | SIZES,
    ),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None, "tie_word_embeddings": False},
        {"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 16} | SIZES,
    ),
    "qwen2-vl": ("Qwen2VL", {"rope_parameters": MROPE}, QWEN),
    "qwen2-vl-tied": ("Qwen2VL", {"rope_parameters": MROPE, "tie_word_embeddings": True}, QWEN),
    "qwen2.5-vl": ("Qwen2_5_VL", {"rope_parameters": MROPE}, QWEN),
}


def write_shell(path: Path, case: str) -> Any:
    """Write a random multimodal checkpoint, and return transformers' model of it."""
    family, text, vision = CASES[case]
    outer = {key: text[key] for key in ("tie_word_embeddings",) if key in text}
    config = getattr(transformers, f"{family}Config")(text_config=TINY | text, vision_config=vision, **outer)
    torch.manual_seed(0)
    named = getattr(transformers, f"{family}ForConditionalGeneration")
    model = named._from_config(config, attn_implementation="eager")
    one = 0.0 if family == "Gemma3" else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(one if "norm" in name else 0.0, 0.1)
    model.save_pretrained(path)
    return model.eval()


def check(path: Path, reference: Any) -> None:
    paged = PagedModel(load_model(TorchBackend(), path, max_model_len=128, block_size=4), num_blocks=320)
    sequences = prompts()
    for found, sequence in zip(chunked(paged, sequences, "ragged"), sequences, strict=True):
        wanted = expected_logits(reference, sequence, False)
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_on_text(case: str, tmp_path: Path) -> None:
    """With the tensor names of checkpoints, and with those that newer versions of transformers use in memory."""
    reference = write_shell(tmp_path, case)
    plan = plan_model(tmp_path)
    assert plan.implementation == "native" and plan.architecture == type(reference).__name__
    check(tmp_path, reference)
    state = {name: value.numpy() for name, value in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(value) for name, value in state.items()}, tmp_path / "model.safetensors"
    )
    check(tmp_path, reference)
    with pytest.raises(ParameterError, match="runs natively only"):
        plan_model(tmp_path, "transformers")


def test_older_names_and_flat_configurations_are_read(tmp_path: Path) -> None:
    """Qwen2-VL checkpoints on the hub have the language model's tensor names, and its values outside of a section."""
    reference = write_shell(tmp_path, "qwen2-vl")
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    flat = {key: value for key, value in text.items() if key not in ("rope_parameters", "model_type")}
    config |= flat | {"rope_scaling": rope, "rope_theta": 5000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value.numpy()
        for name, value in reference.state_dict().items()
    }
    assert "model.layers.0.self_attn.q_proj.weight" in names and any("visual." in name for name in names)
    safetensors.numpy.save_file(names, tmp_path / "model.safetensors")
    check(tmp_path, reference)


def test_the_vision_tower_is_not_counted(tmp_path: Path) -> None:
    reference = write_shell(tmp_path, "mistral3")
    weights = open_model(tmp_path, read_spec(tmp_path), Packing(TorchBackend()))
    text = sum(
        value.numel()
        for name, value in reference.state_dict().items()
        if "vision" not in name and "projector" not in name
    )
    assert weights.num_bytes() == 4 * text
    assert not [source.key for source in weights.sources.values() if "vision" in source.key]


@pytest.mark.parametrize("case", ["gemma3", "mistral3", "qwen2.5-vl"])
def test_float16_of_a_quantisation_tool_is_not_what_a_bfloat16_family_computes_in(
    case: str, tmp_path: Path
) -> None:
    write_shell(tmp_path, case)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # its floats would win over the configuration
    config = json.loads((tmp_path / "config.json").read_text())
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    config |= {"dtype": "float16", "torch_dtype": "float16", "quantization_config": quantization}
    config["text_config"] |= {
        "dtype": "float16",
        "torch_dtype": "float16",
        "quantization_config": quantization,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_model(tmp_path).dtype == "bfloat16"


@needs_native_cpu
def test_quantised_copies_hold_only_the_text_model(tmp_path: Path) -> None:
    reference = write_shell(tmp_path / "source", "mistral3")
    quantize_checkpoint(tmp_path / "source", tmp_path / "int8", "int8")
    quantization = read_spec(tmp_path / "int8").quantization
    assert quantization is not None and quantization.method == "int8"
    paged = PagedModel(
        load_model(CpuBackend(), tmp_path / "int8", max_model_len=128, block_size=4), num_blocks=320
    )
    (found,) = chunked(paged, prompts()[5:6], "whole")
    wanted = expected_logits(reference, prompts()[5], False)
    assert np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("case", ["mistral3", "qwen2-vl-tied"])
def test_gguf_files_hold_the_text_model(case: str, tmp_path: Path) -> None:
    """The other programs' formats are refused: they would need the vision tower."""
    reference = write_shell(tmp_path / "source", case)
    write_tokenizer(tmp_path / "source")
    with pytest.raises(ParameterError, match=r"format=.gptq.: accepted for .*whose vision tower"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "made", "gptq", group_size=32)
    quantize_checkpoint(tmp_path / "source", tmp_path / "made.gguf", "gguf-q8_0")
    model = load_model(TorchBackend(), tmp_path / "made.gguf", max_model_len=128, block_size=4)
    (found,) = chunked(PagedModel(model, num_blocks=320), prompts()[5:6], "whole")
    wanted = expected_logits(reference, prompts()[5], False)
    assert np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max()


def test_text_configurations_have_transformers_defaults(tmp_path: Path) -> None:
    """Gemma 3 checkpoints on the hub give few values."""
    text: dict[str, Any] = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "sliding_window": 1024,
    }
    text |= {"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config: dict[str, Any] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vision_config": {},
    }
    config |= {"text_config": text, "torch_dtype": "bfloat16", "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    assert (spec.vocab_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (262208, 8, 4, 256)
    assert spec.dtype == "bfloat16" and spec.tie_word_embeddings and spec.max_position_embeddings == 131072
    assert [layer.window for layer in spec.layers[:6]] == [1024] * 5 + [None]
    (full,) = {layer.rope for layer in spec.layers if layer.window is None}
    assert full is not None and (full.kind, full.factor, full.theta) == ("linear", 8.0, 1e6)
    config["text_config"] = text | {"model_type": "gemma4_text"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"text_config: model_type='gemma4_text'; accepted: gemma3_text"):
        read_spec(tmp_path)


@pytest.mark.parametrize("outer", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
@pytest.mark.parametrize(
    "architecture", ["Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"]
)
def test_either_config_section_can_tie_the_output_layer(
    architecture: str, inner: bool | None, outer: bool | None, tmp_path: Path
) -> None:
    """If neither section says so, as in Mistral Small 3.1, the layer is tied unless one is stored."""
    model_type = "gemma3_text" if architecture.startswith("Gemma") else "mistral"
    text: dict[str, Any] = {"model_type": model_type, "tie_word_embeddings": inner}
    config = {"architectures": [architecture], "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": outer}))
    assert read_spec(tmp_path).tie_word_embeddings == (outer is not False or inner is True)
