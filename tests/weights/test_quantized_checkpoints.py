"""Quantised checkpoints of other programs: read, sliced, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from native import needs_native_cpu
from numpy.typing import NDArray
from packers import PACKERS, W8A8, Packer
from paged import PagedModel
from quantized_checkpoints import logits, quantised, tensors_of, write

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.backends.torch import TorchBackend
from vllmlite.config.engine_config import CHECKPOINT_METHODS, EngineConfig
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.models import load_model, open_model, read_spec
from vllmlite.models.plan import plan_model
from vllmlite.models.quantization_config import read_quantization
from vllmlite.models.shard import sharded
from vllmlite.weights.host import PackedWeight, float_values
from vllmlite.weights.packing import Packing

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "fused": ("Phi3", {}),
    "mixture": ("Mixtral", {"num_local_experts": 2}),
    "transposed": ("GPT2", {"n_embd": 64, "n_inner": 128}),
}


@pytest.mark.parametrize("name", PACKERS)
def test_a_quantised_checkpoint_equals_its_dequantised_weights(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"vocab_size": 320} if PACKERS[name].head else {}
    packed, floats = quantised(tmp_path, PACKERS[name], **changes)
    expected = logits(floats, TorchBackend())
    np.testing.assert_allclose(
        logits(packed, TorchBackend()), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("packing", "packer"), [("auto_gptq", packers.gptq(4, 32)), ("auto_awq", packers.awq(32))]
)
def test_auto_round_is_read_as_its_packing(packing: str, packer: Packer, tmp_path: Path) -> None:
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": packing == "auto_gptq"}
    config |= {"packing_format": f"auto_round:{packing}", "data_type": "int"}
    packed, floats = quantised(tmp_path, replace(packer, config=config))
    expected = logits(floats, TorchBackend())
    np.testing.assert_allclose(
        logits(packed, TorchBackend()), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32}),
        ("quantize_config.json", {"bits": 5}),  # not even a format that is read
        ("quant_config.json", {"w_bit": 4, "zero_point": True, "version": "gemv"}),
        ("config.json", {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    ],
)
def test_float_weights_win_over_a_configuration(
    file: str, section: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, floats = quantised(tmp_path, packers.gptq(4, 32))
    expected = logits(floats, TorchBackend())
    config = json.loads((floats / "config.json").read_text())
    values = config | {"quantization_config": section} if file == "config.json" else section
    (floats / file).write_text(json.dumps(values))
    np.testing.assert_array_equal(logits(floats, TorchBackend()), expected)
    assert read_spec(floats).quantization is None
    assert "is ignored: all weights are stored as floats" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["awq g32", "gptq asymmetric", "pack-quantized asymmetric", "fp8 blocks"])
def test_checkpoints_of_every_family_are_read(name: str, family: str, tmp_path: Path) -> None:
    architecture, changes = FAMILIES[family]
    packed, floats = quantised(tmp_path, PACKERS[name], architecture, **changes)
    expected = logits(floats, TorchBackend())
    np.testing.assert_allclose(
        logits(packed, TorchBackend()), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@needs_native_cpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name",
    [
        "awq g32",
        "gptq asymmetric",
        "gptq desc_act",
        "pack-quantized by channel",
        "fp8 blocks",
        "float-quantized by channel",
        "float-quantized by block",
        "modelopt nvfp4",
    ],
)
def test_the_native_backend_computes_what_the_values_do(name: str, family: str, tmp_path: Path) -> None:
    """Integers and e4m3 are multiplied as they are stored; other weights are dequantised."""
    architecture, changes = FAMILIES[family]
    packed, floats = quantised(tmp_path, PACKERS[name], architecture, **changes)
    for dtype, share in (("float32", 1e-4), ("bfloat16", 0.05)):
        expected = logits(floats, CpuBackend("float32"))
        found = logits(packed, CpuBackend(dtype))
        np.testing.assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


@needs_native_cpu
@pytest.mark.parametrize("name", ["awq g32", "gptq desc_act", "int-quantized", "fp8 blocks", *W8A8])
def test_native_logits_do_not_depend_on_the_batch_or_on_chunks(name: str, tmp_path: Path) -> None:
    packed, _ = quantised(tmp_path, (PACKERS | W8A8)[name])
    for dtype in ("float32", "bfloat16"):
        model = load_model(CpuBackend(dtype), packed, max_model_len=64, block_size=16)
        ids = [np.arange(3, 43, dtype=np.int32), np.arange(50, 59, dtype=np.int32)]
        whole = []
        for one in ids:
            paged = PagedModel(model, num_blocks=8, max_slots=2, max_context=64)
            paged.admit(0)
            whole.append(paged.logits([0], [one])[0])
        paged = PagedModel(model, num_blocks=8, max_slots=2, max_context=64)
        paged.admit(0)
        paged.admit(1)
        first = paged.logits([0, 1], [ids[0][:33], ids[1][:2]])
        second = paged.logits([0, 1], [ids[0][33:], ids[1][2:]])
        for slot in range(2):
            found = np.concatenate([first[slot], second[slot]])
            assert found.tobytes() == whole[slot].tobytes()


@pytest.mark.parametrize("family", ["dense", "mixture"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "name", [name for name in PACKERS if name.startswith(("awq", "gptq", "pack-quantized", "int-quantized"))]
)
def test_the_cuda_backend_multiplies_what_is_packed(
    name: str, dtype: str, family: str, tmp_path: Path
) -> None:
    """As well as what it dequantises at load."""
    try:
        backend, dequantising = CudaBackend("cuda", dtype), CudaBackend("cuda", dtype)
    except BackendError as error:
        pytest.skip(str(error))
    architecture, changes = {"dense": ("Llama", {}), **FAMILIES}[family]
    if PACKERS[name].head:
        changes = changes | {"vocab_size": 320}
    packed, _ = quantised(tmp_path, PACKERS[name], architecture, **changes)
    dequantising.schemes = frozenset()
    expected = logits(packed, dequantising)
    bound = {"float16": 0.01, "bfloat16": 0.06}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(logits(packed, backend), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", PACKERS)
def test_slices_dequantise_to_slices_of_the_whole(name: str, tmp_path: Path) -> None:
    """Slices as two ranks take them: rows of q and the MLP, columns of o and down."""
    changes: dict[str, Any] = {"vocab_size": 320} if PACKERS[name].head else {}
    packed, floats = quantised(
        tmp_path, PACKERS[name], num_attention_heads=4, num_key_value_heads=4, hidden_size=128, **changes
    )
    for rank in range(2):
        found, expected = (
            open_model(path, sharded(read_spec(path), rank, 2), Packing(TorchBackend()))
            for path in (packed, floats)
        )
        for part in ("q", "k", "o", "gate", "down"):
            one, other = (weights.floats(f"0.{part}.weight") for weights in (found, expected))
            np.testing.assert_allclose(float_values(one), float_values(other), rtol=1e-6, atol=1e-9)


def test_modules_are_excluded_by_name_substring_and_expression(tmp_path: Path) -> None:
    packer = packers.packed_ints(4, 32)
    config = packer.config | {"ignore": ["lm_head", "model.layers.1.mlp.down_proj", "re:.*layers\\.2\\..*"]}
    quantization = read(tmp_path, config)
    left_out = [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "lm_head.weight",
    ]
    assert [quantization.scheme(name) for name in left_out] == [None, None, None]
    assert quantization.scheme("model.layers.1.mlp.up_proj.weight") is not None
    awq = read(tmp_path, packers.awq(32).config | {"modules_to_not_convert": ["mlp.gate", "layers.0"]})
    assert awq.scheme("model.layers.0.self_attn.q_proj.weight") is None
    assert awq.scheme("model.layers.10.mlp.gate.weight") is None
    assert awq.scheme("model.layers.10.mlp.gate_proj.weight") is not None


def read(path: Path, config: dict[str, Any]) -> Any:
    from vllmlite.models.hf_config import HfConfig

    return read_quantization(HfConfig({"quantization_config": config}, "config.json"), path)


def test_gptq_overrides_by_module(tmp_path: Path) -> None:
    dynamic = {r"-:.*layers\.0\..*": {}, r"+:.*down_proj": {"bits": 8, "group_size": 64}}
    quantization = read(tmp_path, packers.gptq(4, 32).config | {"dynamic": dynamic})
    assert quantization.scheme("model.layers.0.mlp.up_proj.weight") is None
    assert quantization.scheme("model.layers.1.mlp.down_proj.weight").bits == 8
    assert quantization.scheme("model.layers.1.mlp.up_proj.weight").bits == 4


def test_an_unquantised_weight_is_read_as_floats(tmp_path: Path) -> None:
    """Some programs leave layers unquantised without saying so in the configuration."""
    packed, floats = quantised(tmp_path, packers.awq(32))
    name = "model.layers.1.mlp.down_proj"
    kept = {key: value for key, value in tensors_of(packed).items() if not key.startswith(f"{name}.")} | {
        f"{name}.weight": tensors_of(floats)[f"{name}.weight"]
    }
    write(packed, kept)
    expected = logits(floats, TorchBackend())
    np.testing.assert_allclose(
        logits(packed, TorchBackend()), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_older_files_beside_config_json_are_read(tmp_path: Path) -> None:
    packed, _ = quantised(tmp_path, packers.gptq(4, 32))
    config = json.loads((packed / "config.json").read_text())
    section = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stored as AWQ or GPTQ, but its configuration does not say so"):
        load_model(TorchBackend(), packed, max_model_len=64, block_size=16)
    section.pop("quant_method")
    (packed / "quantize_config.json").write_text(json.dumps(section))
    assert logits(packed, TorchBackend()).shape == (37, 307)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "exl2"}, "quant_method='exl2'; accepted: auto-round, awq, .*take another quantisation"),
        ({"quant_method": "quark"}, "quant_method='quark'.*export it as fp8"),
        ({"quant_method": ["awq"]}, "quant_method=.*accepted: auto-round, awq"),
        ({"quant_method": "awq", "bits": 8}, "bits=8; accepted: 4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version='gemv'; accepted: \"gemm\""),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "bits=5; accepted: 2, 3, 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0; accepted: an integer from 1"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:(": {}}}, "dynamic=.*regular expr"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "gptq, gptq_v2"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size=.*two whole numbers"),
        ({"quant_method": "modelopt", "quant_algo": "INT4"}, "quant_algo='INT4'; accepted: FP8, NVFP4"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit is absent|bnb_4bit_quant_type|load_in_4bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups=.*an object of groups"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "marlin-24",
                "config_groups": {"g": {"weights": {"num_bits": 4}}},
            },
            "format='marlin-24' with 4-bit int weights by channel; accepted: pack-quantized",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
            "transform_config=.*accepted: none",
        ),
    ],
)  # fmt: skip
def test_unsupported_quantisation_configs_are_refused_by_name(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        read(tmp_path, config)


def edited(path: Path, suffix: str, change: Any) -> None:
    """Change the elements of the q projection's part of layer 1."""
    tensors = tensors_of(path)
    name = f"model.layers.1.self_attn.q_proj.{suffix}"
    code, values = tensors[name]
    tensors[name] = code, change(values.copy())
    write(path, tensors)


def filled(value: Any) -> Any:
    def change(values: NDArray[Any]) -> NDArray[Any]:
        values.reshape(-1)[-1] = value
        return values

    return change


@pytest.mark.parametrize(
    ("name", "suffix", "change", "words"),
    [
        (
            "gptq 4 bits",
            "g_idx",
            filled(2),
            "q_proj.weight'.*g_idx holds groups from 0 to 2; accepted: 0 to 1",
        ),
        ("gptq 4 bits", "g_idx", filled(-1), "groups from -1"),
        ("gptq 4 bits", "qzeros", filled(0), "q_proj.weight'.*qzeros of a symmetric weight hold"),
        ("awq g32", "scales", filled(np.inf), "q_proj.weight'.*a scale is not finite"),
        (
            "awq g32",
            "scales",
            lambda values: values[:1],
            r"scales': expected \[2, 64\] of float16.*found \[1, 64\]",
        ),
        (
            "float-quantized by channel",
            "weight_scale",
            filled(np.nan),
            "q_proj.weight'.*a scale is not finite",
        ),
        ("bitsandbytes nf4", "weight.absmax", filled(np.inf), "q_proj.weight'.*a scale is not finite"),
        (
            "bitsandbytes nf4",
            "weight.quant_state.bitsandbytes__nf4",
            lambda values: values[:5],
            "not a JSON object",
        ),
        (
            "bitsandbytes int8",
            "weight_format",
            lambda values: values + 1,
            "weight_format must be 0",
        ),
    ],
)
def test_damaged_weights_are_refused_by_name(
    name: str, suffix: str, change: Any, words: str, tmp_path: Path
) -> None:
    packed, _ = quantised(tmp_path, PACKERS[name])
    edited(packed, suffix, change)
    with pytest.raises(ModelError, match=words):
        load_model(TorchBackend(), packed, max_model_len=64, block_size=16)


def test_groups_must_divide_a_row(tmp_path: Path) -> None:
    packed, _ = quantised(tmp_path, packers.awq(32))
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["group_size"] = 48
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"q_proj.weight': a weight \[64, 64\] in AWQ: .* of 8 rows and 48"):
        load_model(TorchBackend(), packed, max_model_len=64, block_size=16)


def test_the_quantisation_method_is_checked_and_reported(tmp_path: Path) -> None:
    from vllmlite import LLM

    packed, floats = quantised(tmp_path, packers.awq(32))
    options: dict[str, Any] = {"skip_tokenizer_init": True, "backend": "torch", "max_model_len": 64}
    llm = LLM(str(packed), quantization="awq_marlin", **options)
    assert "awq weights dequantised to float32" in llm.llm_engine.backend_choice
    with pytest.raises(ParameterError, match=r"quantization='gptq'.*the checkpoint is in awq already"):
        LLM(str(packed), quantization="gptq", **options)
    with pytest.raises(
        ParameterError, match=r"quantization='awq'.*weights are floats; int8 or int4 or fp8 quantises them"
    ):
        LLM(str(floats), quantization="awq", **options)
    assert {EngineConfig(quantization=method).quantization for method in CHECKPOINT_METHODS} == {
        *CHECKPOINT_METHODS
    }


def test_parts_are_views_of_the_file(tmp_path: Path) -> None:
    """A packed weight uses no memory until it is dequantised."""
    packed, _ = quantised(tmp_path, packers.awq(32))
    stored = open_model(packed, read_spec(packed), Packing(TorchBackend())).stored
    weight = stored.tensor("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(weight, PackedWeight)
    assert all(not part.data.flags.writeable for part in weight.parts.values())


@pytest.mark.parametrize("family", ["Phi3", "GPT2"])
def test_blocks_across_rows_and_fused_weights(family: str, tmp_path: Path) -> None:
    """Rows of 96 elements are no whole number of bitsandbytes' blocks, and Phi-3's q is a slice of one weight."""
    changes: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 6, "n_embd": 96, "n_head": 6}
    packed, floats = quantised(tmp_path, packers.bnb4("nf4", nested=True), family, **changes)
    expected = logits(floats, TorchBackend())
    np.testing.assert_allclose(
        logits(packed, TorchBackend()), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [64, 32]}, r"with a scale each, of a weight \[64, 64\]"),
        ({"shape": 64}, r"with a scale each, of a weight \[64, 64\]"),
        ({"nested_blocksize": 128}, "nested blocks of 256"),
        ({"nested_offset": "x"}, "expected a nested_offset"),
    ],
)
def test_damaged_states_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    packed, _ = quantised(tmp_path, packers.bnb4("nf4", nested=True))

    def changed(values: NDArray[Any]) -> NDArray[Any]:
        text = json.dumps(json.loads(values.tobytes()) | change).encode()
        return np.frombuffer(text, np.uint8)

    edited(packed, "weight.quant_state.bitsandbytes__nf4", changed)
    with pytest.raises(ModelError, match=f"q_proj.weight'.*{words}"):
        load_model(TorchBackend(), packed, max_model_len=64, block_size=16)


@pytest.mark.parametrize(
    ("family", "dtype"), [("Qwen2", "bfloat16"), ("Gemma2", "bfloat16"), ("Llama", "float16")]
)
def test_float16_of_a_quantisation_tool_is_not_what_a_bfloat16_family_computes_in(
    family: str, dtype: str, tmp_path: Path
) -> None:
    packed, floats = quantised(tmp_path, packers.awq(32), family, dtype="float16", torch_dtype="float16")
    assert (plan_model(packed).dtype, plan_model(floats).dtype) == (dtype, "float16")


def test_the_order_of_columns_must_be_what_the_configuration_says(tmp_path: Path) -> None:
    """desc_act needs g_idx, and a checkpoint without desc_act may not have its columns in another order."""
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
    packed, _ = quantised(tmp_path, packers.gptq(4, 32, order=True), **sizes)
    config = json.loads((packed / "config.json").read_text())
    kept = {name: value for name, value in tensors_of(packed).items() if not name.endswith("q_proj.g_idx")}
    write(packed, kept)
    with pytest.raises(ModelError, match=r"tensors missing from the checkpoint: .*q_proj\.g_idx"):
        load_model(TorchBackend(), packed, max_model_len=64, block_size=16)
    config["quantization_config"]["desc_act"] = False
    (packed / "config.json").write_text(json.dumps(config))
    weights = open_model(packed, sharded(read_spec(packed), 1, 2), Packing(TorchBackend()))
    with pytest.raises(ModelError, match=r"o_proj.weight'.*g_idx has groups that are not runs of columns"):
        weights.floats("0.o.weight")


def test_a_weight_that_may_be_transposed_must_be_what_the_configuration_says(tmp_path: Path) -> None:
    """GPT-2 stores floats transposed, and the shape of a square weight does not show whether they are."""
    packed, floats = quantised(tmp_path, packers.awq(32), "GPT2", n_embd=64, n_inner=128)
    name = "transformer.h.1.attn.c_proj"
    kept = {key: value for key, value in tensors_of(packed).items() if not key.startswith(f"{name}.q")}
    kept.pop(f"{name}.scales")
    write(packed, kept | {f"{name}.weight": tensors_of(floats)[f"{name}.weight"]})
    with pytest.raises(ModelError, match=rf"tensor '{name}.weight': is stored as floats; expected awq"):
        load_model(TorchBackend(), packed, max_model_len=64, block_size=16)


SCALE_NAMES = [("attn.k_scale", "attn.v_scale"), ("k_proj.k_scale", "v_proj.v_scale"), ("kv_scale",)]
"""Names of the scales of an fp8 key/value cache, after a layer's attention."""


def scale(value: float) -> tuple[str, Any]:
    return "F32", np.full(1, value, np.float32)


@pytest.mark.parametrize("names", SCALE_NAMES)
def test_scales_of_an_fp8_cache(tmp_path: Path, names: tuple[str, ...]) -> None:
    """They are read where the cache is in fp8, by an option or because the checkpoint says so, and by nothing else."""
    packed, floats = quantised(tmp_path, packers.fp8("channel", "compressed"))
    tensors = tensors_of(packed)
    scales = {
        f"model.layers.{layer}.self_attn.{name}": scale(0.25 * (layer + 1) + 0.125 * at)
        for layer in range(3)
        for at, name in enumerate(names)
    }
    write(packed, tensors | scales)
    assert logits(packed, TorchBackend()).tobytes() == logits(floats, TorchBackend()).tobytes()

    def spec(**options: Any) -> KVSpec:
        return load_model(TorchBackend(), packed, max_model_len=64, block_size=16, **options).kv_spec

    both = len(names) == 1
    expected = tuple((0.25 * n, 0.25 * n + 0.125 * (not both)) for n in (1, 2, 3))
    for dtype in ("fp8_e4m3", "fp8_e5m2"):
        assert spec(kv_cache_dtype=dtype).scales == expected
    assert spec(kv_cache_dtype="int8").scales == spec().scales == ()
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = "static"
    (packed / "config.json").write_text(json.dumps(config))
    assert (spec().dtype, spec().scales) == ("fp8_e4m3", expected)
    assert spec(kv_cache_dtype="bfloat16").scales == ()


def test_an_fp8_cache_without_scales_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed, _ = quantised(tmp_path, packers.fp8("tensor"))
    model = load_model(
        TorchBackend(), packed, max_model_len=64, block_size=16, kv_cache_dtype="fp8_per_token_head"
    )
    assert model.kv_spec.scales == ()
    assert not caplog.messages
    load_model(TorchBackend(), packed, max_model_len=64, block_size=16, kv_cache_dtype="fp8_e4m3")
    assert caplog.messages == ["the checkpoint has no scales for an fp8 key/value cache: 1.0 is used"]


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("layers.1.self_attn.v_scale", None, "layer 1: v_scale is missing"),
        ("layers.1.self_attn.v_scale", scale(0.0), "expected one positive number.*found float32"),
        ("layers.1.self_attn.v_scale", scale(np.nan), "expected one positive number"),
        ("layers.1.self_attn.v_scale", ("F32", np.ones(2, np.float32)), r"found float32 \[2\]"),
        ("layers.1.self_attn.v_scale", ("I8", np.ones(1, np.int8)), "found int8"),
    ],
)
def test_bad_scales_of_an_fp8_cache_are_refused(tmp_path: Path, name: str, tensor: Any, says: str) -> None:
    packed, _ = quantised(tmp_path, packers.fp8("tensor"))
    scales = {
        f"model.layers.{layer}.self_attn.{part}_scale": scale(1.0) for layer in range(3) for part in "kv"
    }
    scales[f"model.{name}"] = tensor
    write(packed, tensors_of(packed) | {key: value for key, value in scales.items() if value is not None})
    with pytest.raises(ModelError, match=says):
        load_model(TorchBackend(), packed, max_model_len=64, block_size=16, kv_cache_dtype="fp8_e4m3")


def test_other_biases_are_refused(tmp_path: Path) -> None:
    packed, _ = quantised(tmp_path, packers.fp8("tensor"))
    tensors, name = tensors_of(packed), "model.layers.1.self_attn"
    for bias in (("F16", np.ones(64, np.float16)), ("I8", np.zeros(64, np.int8))):
        write(packed, tensors | {f"{name}.o_proj.bias": bias})
        with pytest.raises(
            ModelError, match=r"unexpected tensors: model\.layers\.1\.self_attn\.o_proj\.bias"
        ):
            load_model(TorchBackend(), packed, max_model_len=64, block_size=16)
