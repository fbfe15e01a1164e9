"""Reading adapters: PEFT's options, llama.cpp's files, and everything that is refused."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import encode, reordered
from peft_files import Factors, random_factors, write_peft
from safetensors.numpy import load_file, save_file

from vllmlite.errors import ModelError, ParameterError, VllmliteError
from vllmlite.lora import files, patterns
from vllmlite.lora.reader import AdapterReader
from vllmlite.models import read_spec
from vllmlite.weights.adapter import Adapter
from vllmlite.weights.host import float_values

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3, **_SIZES},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_hidden_layers": 1, **_SIZES},
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 1, "head_dim": 8, **_SIZES},
    },
}
ATTENTION = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
MLP = {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
ALL = [*ATTENTION, *MLP]


def module(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"


def place(name: str) -> str:
    """The model's own name of a module's weight."""
    parts = name.split(".")
    return f"{parts[2]}.{parts[4].removesuffix('_proj')}"


def modules(*names: str, layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, tuple[int, int]]:
    return {module(layer, name): (ATTENTION | MLP)[name] for layer in layers for name in names}


def reader_of(path: Path, family: str = "llama", dtype: str = "float32", **options: Any) -> AdapterReader:
    base = path / family
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(json.dumps(CONFIGS[family]))
    return AdapterReader(base, read_spec(base), dtype, **{"max_rank": 64, "max_bytes": 1 << 24} | options)


def changes(adapter: Adapter) -> dict[str, tuple[int, float]]:
    return {name: (change.rank, change.scale) for name, change in adapter.weights.items()}


Q = [*modules("q_proj")]
EVERY = [*modules(*ALL)]
PLAIN = {"": (4, 2.0)}
HONOURED: dict[str, tuple[dict[str, Any], list[str], dict[str, tuple[int, float]]]] = {
    "alpha over rank": ({}, Q, PLAIN),
    "rsLoRA": ({"use_rslora": True}, Q, {"": (4, 8 / math.sqrt(4))}),
    "rank and alpha patterns": (
        {
            "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 2, "^model.layers.2.self_attn.o_proj": 3, "roj": 9},
            "alpha_pattern": {"1.mlp.down_proj": 1, "^layers.0.mlp.up_proj": 7},
        },
        EVERY,
        {"q": (8, 1.0), "1.gate": (2, 4.0), "1.up": (2, 4.0), "1.down": (2, 0.5), "2.o": (3, 8 / 3), **PLAIN},
    ),
    "names with parents": (
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]}, [*Q, module(1, "up_proj")], PLAIN
    ),
    "an expression": (
        {"target_modules": r".*\.[02]\.(self_attn|mlp)\.(q|down)_proj"},
        [*modules("q_proj", "down_proj", layers=(0, 2))],
        PLAIN,
    ),
    "all-linear": ({"target_modules": "all-linear"}, EVERY, PLAIN),
    "excluded names": (
        {"exclude_modules": ["1.self_attn.q_proj"]}, [name for name in EVERY if name != module(1, "q_proj")], PLAIN
    ),
    "excluded by an expression": (
        {"exclude_modules": r".*\.layers\.1\..*"}, [*modules(*ALL, layers=(0, 2))], PLAIN
    ),
    "layers": ({"layers_to_transform": [0, 2]}, [*modules(*ALL, layers=(0, 2))], PLAIN),
    "one layer, named": ({"layers_to_transform": 1, "layers_pattern": "layers"}, [module(1, "q_proj")], PLAIN),
    "a transposed base": ({"fan_in_fan_out": True}, Q, PLAIN),
    "a quantised training": ({"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "loftq"}, Q, PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("case", HONOURED)
def test_options_of_peft_are_honoured(tmp_path: Path, case: str) -> None:
    config, names, expected = HONOURED[case]
    wanted = {
        name: next(value for end, value in expected.items() if place(name).endswith(end)) for name in names
    }
    shapes = {name: modules(*ALL)[name] for name in names}
    factors = random_factors(shapes, {name: rank for name, (rank, _) in wanted.items()})
    found = reader_of(tmp_path).read(write_peft(tmp_path / "adapter", factors, **{"r": 4} | config))
    assert changes(found) == {place(name): value for name, value in wanted.items()}
    for name, (a, b) in factors.items():
        assert np.array_equal(float_values(found.weights[place(name)].a), a)
        assert np.array_equal(float_values(found.weights[place(name)].b), b)


def test_weights_of_a_fused_projection_share_a_and_split_b(tmp_path: Path) -> None:
    shapes = {"model.layers.0.self_attn.qkv_proj": (64, 32), "model.layers.0.mlp.gate_up_proj": (96, 32)}
    factors = random_factors(shapes, 4)
    found = reader_of(tmp_path, "phi3").read(write_peft(tmp_path / "adapter", factors)).weights
    (a, b), (mlp_a, mlp_b) = factors.values()
    rows = {"q": b[:32], "k": b[32:48], "v": b[48:], "gate": mlp_b[:48], "up": mlp_b[48:]}
    assert found.keys() == {f"0.{part}" for part in rows}
    for part, expected in rows.items():
        assert np.array_equal(float_values(found[f"0.{part}"].b), expected)
        assert np.array_equal(float_values(found[f"0.{part}"].a), a if part in "qkv" else mlp_a)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_adapters_of_multimodal_checkpoints_change_the_language_model(tmp_path: Path, prefix: str) -> None:
    text = random_factors({f"{prefix}layers.0.self_attn.q_proj": (32, 32)}, 4)
    vision = random_factors({"model.vision_tower.layers.0.self_attn.q_proj": (24, 24)}, 4)
    path = write_peft(tmp_path / "adapter", {**text, **vision})
    assert changes(reader_of(tmp_path, "gemma3").read(path)) == {"0.q": (4, 2.0)}


def test_names_without_the_base_models_prefix_are_read(tmp_path: Path) -> None:
    factors = random_factors({f"layers.{layer}.self_attn.q_proj": (32, 32) for layer in range(3)}, 4)
    found = reader_of(tmp_path).read(write_peft(tmp_path / "adapter", factors))
    assert changes(found) == {f"{layer}.q": (4, 2.0) for layer in range(3)}


def test_values_are_kept_in_the_models_dtype(tmp_path: Path) -> None:
    factors = random_factors(modules("q_proj"), 4)
    path = write_peft(tmp_path / "adapter", factors)
    half = reader_of(tmp_path, dtype="bfloat16").read(path).weights["0.q"]
    assert half.a.dtype == half.b.dtype == "bfloat16"
    assert float_values(half.a) == pytest.approx(factors[module(0, "q_proj")][0], rel=4e-3)
    factors[module(0, "q_proj")][0][0, 0] = 1e5
    write_peft(path, factors)
    with pytest.raises(ModelError, match=r"lora_A of module 'model.layers.0.self_attn.q_proj' in float16"):
        reader_of(tmp_path, dtype="float16").read(path)


def test_torchs_files_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    factors = random_factors(modules("q_proj"), 4)
    path = write_peft(tmp_path / "adapter", factors)
    before = reader_of(tmp_path).read(path)
    (path / "adapter_model.safetensors").unlink()
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": torch.tensor(values)
        for name, pair in factors.items()
        for factor, values in zip("AB", pair, strict=True)
    }
    torch.save(tensors, path / "adapter_model.bin")
    found = reader_of(tmp_path).read(path)
    assert np.array_equal(found.weights["0.q"].b.data, before.weights["0.q"].b.data)
    assert found.digest != before.digest
    file = path / "adapter_model.bin"
    torch.save({"x": Path}, file)
    with pytest.raises(ModelError, match="objects other than tensors"):
        reader_of(tmp_path).read(path)
    torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, file)
    with pytest.raises(ModelError, match="more elements than are stored"):
        reader_of(tmp_path).read(path)
    torch.save({"x": torch.zeros(10**5)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ModelError, match="compressed archive"):
        reader_of(tmp_path).read(path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "trained tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "biases": ({"bias": "lora_only"}, "bias"),
    "biases of adapters": ({"lora_bias": True}, "lora_bias"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "an unknown start": ({"init_lora_weights": "odd"}, "init_lora_weights"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "an unknown field": ({"use_future": 1}, "use_future"),
    "a huge rank": ({"r": 10**9}, "r=1000000000"),
    "no rank": ({"r": 0}, "r=0"),
    "a rank that is text": ({"r": "4"}, "r='4'"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha"),
    "a rank pattern of text": ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern"),
    "a bad expression": ({"target_modules": "(q_proj"}, "target_modules"),
    "experts": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
    "many patterns": ({"rank_pattern": {f"m{index}": 4 for index in range(1001)}}, "at most 1000"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules"),
    "layers by name": ({"layers_to_transform": ["a"]}, "layers_to_transform"),
    "untargeted tensors": ({"target_modules": ["v_proj"]}, "target_modules .*applies the adapter"),
    "absent tensors": ({"target_modules": ["q_proj", "v_proj"]}, "lacks tensors .*v_proj"),
    "another rank than the tensors": ({"r": 8}, "expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(tmp_path: Path, case: str) -> None:
    config, says = REFUSED[case]
    path = write_peft(tmp_path / "adapter", random_factors(modules("q_proj"), 4), **config)
    with pytest.raises(ModelError, match=says):
        reader_of(tmp_path).read(path)


Change = Callable[[Path], None]


def _tensors(changed: Mapping[str, Any]) -> Change:
    """Return a function that adds or replaces tensors of an adapter, or removes those that are None."""

    def change(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        tensors = {**load_file(file), **changed}
        save_file({name: value for name, value in tensors.items() if value is not None}, file)

    return change


def _content(changed: Callable[[bytes], bytes], name: str = "adapter_model.safetensors") -> Change:
    def change(path: Path) -> None:
        (path / name).write_bytes(changed((path / name).read_bytes()))

    return change


def _zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
Q9 = Q0.replace("0", "9")
CONFIG = "adapter_config.json"
BROKEN: dict[str, tuple[Change, str]] = {
    "cut short": (_content(lambda data: data[:-7]), "cut short"),
    "empty": (_content(lambda data: b""), "0 bytes"),
    "a giant header": (_content(lambda data: (10**12).to_bytes(8, "little") + data[8:]), "header of 1000000000000"),
    "a header of 40 MB": (_content(lambda data: (40 << 20).to_bytes(8, "little") + bytes(50 << 20)), "at most 33554"),
    "no JSON": (_content(lambda data: b"{", CONFIG), "is not JSON"),
    "nested JSON": (_content(lambda data: b"[" * 100_000, CONFIG), "is not JSON"),
    "a list": (_content(lambda data: b"[]", CONFIG), "JSON object"),
    "a large configuration": (_content(lambda data: b" " * (2 << 20), CONFIG), "at most 1048576"),
    "NaN": (_tensors({Q0 + "A.weight": _zeros(4, 32) + np.float32(np.nan)}), "not finite"),
    "integers": (_tensors({Q0 + "A.weight": np.zeros((4, 32), np.int32)}), "int32"),
    "a wide input": (_tensors({Q0 + "A.weight": _zeros(4, 33)}), r"\[4, 33\]; expected \[4, 32\]"),
    "a short output": (_tensors({Q0 + "B.weight": _zeros(31, 4)}), r"expected \[32, 4\]"),
    "three dimensions": (_tensors({Q0 + "A.weight": _zeros(4, 32, 1)}), r"expected \[4, 32\]"),
    "one factor": (_tensors({Q0 + "B.weight": None}), "has no lora_B"),
    "DoRA's vectors": (_tensors({Q0 + "magnitude_vector": _zeros(32)}), "use_dora=False"),
    "an embedding": (_tensors({"model.embed_tokens.lora_embedding_A": _zeros(4, 96)}), "target_modules"),
    "a whole norm": (_tensors({"model.norm.weight": _zeros(32)}), "modules_to_save: replaces module 'model.norm'"),
    "a bias": (_tensors({Q0 + "B.bias": _zeros(32)}), "lora_bias"),
    "a tensor of another kind": (_tensors({"model.norm": _zeros(32)}), "is not part of a LoRA adapter"),
    "another layer": (
        _tensors({Q9 + "A.weight": _zeros(4, 32), Q9 + "B.weight": _zeros(32, 4)}), "the base model does not have"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(tmp_path: Path, case: str) -> None:
    change, says = BROKEN[case]
    path = write_peft(tmp_path / "adapter", random_factors(modules("q_proj"), 4))
    change(path)
    with pytest.raises(ModelError, match=says):
        reader_of(tmp_path, max_bytes=1 << 26).read(path)


def test_limits_of_rank_and_size_name_their_options(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "adapter", random_factors(modules("q_proj"), 4))
    with pytest.raises(ParameterError, match="max_lora_rank=3: must be at least the adapter's rank, 4"):
        reader_of(tmp_path, max_rank=3).read(path)
    with pytest.raises(ModelError, match="accepted: at most 99"):
        reader_of(tmp_path, max_bytes=99).read(path)


def test_an_expression_that_takes_for_ever_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    factors = random_factors(modules("q_proj"), 4)
    path = write_peft(tmp_path / "adapter", factors, target_modules="((.|[a-z])+)+!")
    with pytest.raises(ModelError, match="takes more than"):
        reader_of(tmp_path).read(path)


def test_digests_differ_by_what_weights_are_converted_to(tmp_path: Path) -> None:
    """The disk tier keeps blocks for engines with other options."""
    path = write_peft(tmp_path / "adapter", random_factors(modules("q_proj"), 4))
    digests = [
        reader_of(tmp_path, dtype=dtype).read(path).digest for dtype in ("float32", "bfloat16", "float32")
    ]
    assert digests[0] == digests[2] != digests[1]


def test_no_file_outside_the_root_is_read(tmp_path: Path) -> None:
    root, reader = tmp_path / "root", reader_of(tmp_path)
    factors = random_factors(modules("q_proj"), 4)
    inside, outside = write_peft(root / "good", factors), write_peft(tmp_path / "outside", factors)
    (root / "link").symlink_to(outside)
    (root / "within").symlink_to(inside)
    (root / "half").mkdir()
    (root / "half" / CONFIG).write_bytes((inside / CONFIG).read_bytes())
    (root / "half" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (root / "loop").symlink_to(root / "loop")
    assert reader.read(inside, root).digest == reader.read(root / "within", root).digest
    for path in (outside, root / "link", root / "half", root / ".." / "outside", Path("/etc/passwd"), root):
        with pytest.raises(VllmliteError, match=r"lora_path.*must be inside|cannot be read"):
            reader.read(path, root)
    with pytest.raises(ModelError, match="cannot be read"):
        reader.read(root / "loop", root)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "adapter", random_factors(modules("q_proj"), 4))
    (path / "adapter_model.safetensors").unlink()
    reader = reader_of(tmp_path)
    with pytest.raises(ModelError, match="has none of"):
        reader.read(path)
    os.mkfifo(path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        reader.read(path)
    with pytest.raises(ModelError, match="cannot be read"):
        reader.read(tmp_path / "absent")


@pytest.mark.parametrize("change", ["truncated", "written to", "replaced"])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is an error, or the old contents, if another file takes its place."""
    path = write_peft(tmp_path / "adapter", random_factors(modules("q_proj"), 4))
    file, read, reader = path / "adapter_model.safetensors", os.readv, reader_of(tmp_path)
    before = reader.read(path)
    monkeypatch.setattr(files, "CHUNK", 1000)
    changed = False

    def readv(descriptor: int, buffers: Any) -> int:
        nonlocal changed
        if len(buffers[0]) == 1000 and not changed:
            changed = True
            if change == "replaced":
                os.replace(path / CONFIG, file)
            else:
                with file.open("r+b") as opened:
                    opened.truncate(1500) if change == "truncated" else opened.write(b"12345678")
                os.utime(file, ns=(1, 1))
        return read(descriptor, buffers)

    monkeypatch.setattr(os, "readv", readv)
    if change == "replaced":
        assert reader.read(path).digest == before.digest
    else:
        with pytest.raises(ModelError, match=r"was truncated to 1500 bytes|was changed while it was read"):
            reader.read(path)
    assert changed


def _gguf(path: Path, factors: Factors, **metadata: Any) -> Path:
    tensors = {}
    for name, pair in factors.items():
        for factor, values in zip("ab", pair, strict=True):
            tensors[f"{name}.weight.lora_{factor}"] = ("F32", values.shape, values.tobytes())
    fields = {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 8.0
    }  # fmt: skip
    path.write_bytes(
        encode(fields | {key.replace("__", "."): each for key, each in metadata.items()}, tensors)
    )
    return path


def test_a_gguf_adapter_equals_pefts(tmp_path: Path) -> None:
    """llama.cpp's converter reorders the rows of q and k in this family."""
    factors = random_factors(modules("q_proj", "k_proj", "down_proj"), 4)
    names, heads = {"q": "attn_q", "k": "attn_k", "down": "ffn_down"}, {"q": 4, "k": 2}
    converted = {}
    for name, (a, b) in factors.items():
        layer, part = place(name).split(".")
        ordered = reordered(b, heads[part]) if part in heads else b
        converted[f"blk.{layer}.{names[part]}"] = a, np.ascontiguousarray(ordered)
    reader = reader_of(tmp_path)
    expected = reader.read(write_peft(tmp_path / "adapter", factors))
    found = reader.read(_gguf(tmp_path / "adapter.gguf", converted))
    assert changes(found) == changes(expected)
    for name, change in expected.weights.items():
        assert np.array_equal(found.weights[name].b.data, change.b.data)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"general__type": "model"}, "general.type='model'"),
        ({"adapter__type": "control_vector"}, "adapter.type"),
        ({"general__architecture": "qwen2"}, "general.architecture='qwen2'"),
        ({"adapter__alora__invocation_tokens": [1]}, "activated LoRA"),
    ],
)
def test_other_gguf_files_are_refused(tmp_path: Path, metadata: dict[str, Any], says: str) -> None:
    path = _gguf(tmp_path / "x.gguf", random_factors({"blk.0.attn_q": (32, 32)}, 4), **metadata)
    with pytest.raises(ModelError, match=says):
        reader_of(tmp_path).read(path)
