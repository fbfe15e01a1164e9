"""GGUF files of every family that llama.cpp supports: what its converter does to a checkpoint is undone, bit by bit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf_families import CASES, GEMMA, converted_family, metadata_of, tensors_of
from gguf_files import encode
from model_runs import first_logits, float32_backend
from native import needs_native_cpu

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import ModelError
from vllmlite.models import read_spec
from vllmlite.models.gguf_families import FAMILIES, NEUTRAL
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.gguf import read_gguf


def shortened(spec: DecoderSpec) -> DecoderSpec:
    """``spec`` with the one value rounded that GGUF files store with fewer digits than the source."""
    layers = (
        layer
        if layer.rope is None
        else replace(layer, rope=replace(layer.rope, attention_factor=round(layer.rope.attention_factor, 5)))
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def test_there_is_a_case_for_every_architecture() -> None:
    assert {name for name, _, _ in CASES.values()} | {"mistral", "mixtral"} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_equals_its_source(case: str, tmp_path: Path) -> None:
    name, family, changes = CASES[case]
    write_checkpoint(tmp_path, family, **changes)
    path = converted_family(tmp_path, tmp_path / "x.gguf", name)
    expected = read_spec(tmp_path)
    assert shortened(replace(read_spec(path), keys=expected.keys)) == shortened(expected)
    for backend in (float32_backend(), TorchBackend()):
        found, wanted = first_logits(backend, path), first_logits(backend, tmp_path)
        if expected.norm.unit_offset or "longrope" in case:  # one is added and taken away again
            np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
        else:
            assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_tensors_have_the_names_of_the_gguf_package(case: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="python3-gguf is not installed")
    name, family, changes = CASES[case]
    write_checkpoint(tmp_path, family, **changes)
    path = converted_family(tmp_path, tmp_path / "x.gguf", name)
    architecture = next(arch for arch, its_name in gguf.MODEL_ARCH_NAMES.items() if its_name == name)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[architecture]}
    for tensor in read_gguf(path).tensors:
        assert re.sub(r"^blk\.\d+\.", "blk.{bid}.", tensor.rsplit(".", 1)[0]) in known, tensor


@needs_native_cpu
@pytest.mark.parametrize("case", ["mixtral", "qwen2moe", "phi3", "falcon-40b", "gpt2", "gemma2"])
def test_splitting_rows_keeps_quantised_blocks(case: str, tmp_path: Path) -> None:
    """This covers experts, and q, k and v stored as one tensor."""
    name, family, changes = CASES[case]
    write_checkpoint(tmp_path, family, **changes)
    path = converted_family(tmp_path, tmp_path / "x.gguf", name, "Q8_0")
    kept, exact = (
        first_logits(CpuBackend("bfloat16", packed=True), path, keep_blocks=True),
        first_logits(CpuBackend(), path),
    )
    assert np.square(kept - exact).mean() < 0.01 * exact.var()


def test_stacked_norms_of_heads_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "StableLm")
    path = converted_family(tmp_path, tmp_path / "x.gguf", "stablelm")
    spec, tensors = read_spec(tmp_path), tensors_of(tmp_path, "stablelm")
    tensors["blk.0.attn_q_norm.weight"] = "F32", (1, 1), bytes(4)
    path.write_bytes(encode(metadata_of(spec, "stablelm"), tensors))
    with pytest.raises(ModelError, match="StableLM 12B"):
        read_spec(path)


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("llama", {"llama.logit_scale": 2.0}, r"llama\.logit_scale=2.0; accepted: 0.0 or 1.0"),
        ("qwen2", {"qwen2.attention.sliding_window": 8}, r"sliding_window=8; accepted: 0"),
        ("phi3", {"phi3.rope.dimension_count": 24}, r"dimension_count=24; accepted: 16"),
        ("stablelm", {"stablelm.rope.dimension_count": 3}, "even"),
        ("granite", {"granite.residual_scale": "x"}, "residual_multiplier='x'"),
        ("bloom", {"bloom.feed_forward_length": "x"}, "feed_forward_length='x'; accepted: an integer"),
        ("gpt2", {"gpt2.attention.layer_norm_epsilon": -1.0}, "above 0"),
        ("mixtral", {"llama.expert_used_count": 9}, "num_experts_per_tok=9"),
        ("llama", {"llama.attention.causal": False}, "causal=False; accepted: True"),
        ("llama", {"llama.rope.freq_base_swa": 5.0}, "freq_base_swa=5.0; accepted: 10000.0"),
        (
            "mistral",
            {"llama.attention.sliding_window_pattern": 2},
            "pattern=2; accepted: a window in every layer",
        ),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [1, 0]}, "one for each of 7 layers"),
        ("gemma3", {"gemma3.attention.key_length_swa": 32}, "key_length_swa=32; accepted: 24"),
        ("llama", {"llama.rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor=1.0; accepted: 0.0"),
        ("llama", {"llama.rope.scaling.attn_factor": 2.0}, "attn_factor=2.0; accepted: 1"),
        ("llama", {"general.type": "mmproj"}, "not a language model: metadata general.type='mmproj'"),
    ],
)
def test_bad_metadata_is_refused_by_key(
    case: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    name, family, config = CASES[case]
    write_checkpoint(tmp_path, family, **config)
    with pytest.raises(ModelError, match=says):
        read_spec(converted_family(tmp_path, tmp_path / "x.gguf", name, **changes))


def test_metadata_that_changes_results_is_never_ignored(tmp_path: Path) -> None:
    """Each key has a value without effect, and every other value is refused by name."""
    write_checkpoint(tmp_path, "Qwen2")
    spec, tensors = read_spec(tmp_path), tensors_of(tmp_path, "qwen2")
    path, plain_metadata = tmp_path / "x.gguf", metadata_of(spec, "qwen2")
    for key, neutral in NEUTRAL.items():
        for value in neutral:
            path.write_bytes(encode({**plain_metadata, f"qwen2.{key}": value}, tensors))
            assert read_spec(path).layers == spec.layers
        other = False if neutral[0] is True else True if neutral[0] is False else type(neutral[0])(7)
        path.write_bytes(encode({**plain_metadata, f"qwen2.{key}": other}, tensors))
        with pytest.raises(ModelError, match=re.escape(f"qwen2.{key}={other!r}; accepted: ")):
            read_spec(path)


ROPE: dict[str, Any] = {"rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"rope.scale_linear": 4.0}, {**ROPE, "rope_type": "linear"}),
        ({"rope.scaling.factor": 4.0}, {**ROPE, "rope_type": "linear"}),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, {**ROPE, "rope_type": "linear"}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_theta": 10000.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
             "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0,
             "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0},
            {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)  # fmt: skip
def test_rope_scaling_is_honoured(metadata: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", rope_parameters=rope)
    changes = {f"llama.{key}": value for key, value in metadata.items()}
    (tmp_path / "plain").mkdir()
    write_checkpoint(tmp_path / "plain", "Llama")
    path = converted_family(tmp_path / "plain", tmp_path / "x.gguf", "llama", **changes)
    assert read_spec(path).layers == read_spec(tmp_path).layers


@pytest.mark.parametrize("pattern", [3, [1, 1, 0, 1, 1, 0, 1]])
def test_layers_with_a_window_are_those_that_the_file_says(pattern: int | list[int], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Gemma3", **GEMMA, num_hidden_layers=7)
    changes: dict[str, Any] = {
        "gemma3.attention.sliding_window_pattern": pattern,
        "gemma3.rope.freq_base_swa": 500.0,
    }
    path = converted_family(tmp_path, tmp_path / "x.gguf", "gemma3", **changes)
    layers = read_spec(path).layers
    assert [layer.window for layer in layers] == [11, 11, None, 11, 11, None, 11]
    assert {layer.rope.theta for layer in layers if layer.window and layer.rope} == {500.0}


def test_unknown_metadata_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, "Llama")
    changes: dict[str, Any] = {"llama.unheard.of": 1, "llama.vocab_size": 7, "general.name": "x"}
    read_spec(converted_family(tmp_path, tmp_path / "x.gguf", "llama", **changes))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'x.gguf'}: unknown metadata without effect: unheard.of"
    ]
