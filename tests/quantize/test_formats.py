"""Checkpoints that ``vllmlite quantize`` writes: a model read from one computes with its dequantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_runs import first_logits, float32_backend
from quantize_families import FAMILIES, checkpoint

from vllmlite.backends.torch import TorchBackend
from vllmlite.cli import main
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import open_model, read_spec
from vllmlite.models.tensors import sources
from vllmlite.quantize import FORMATS, quantize_checkpoint
from vllmlite.weights.host import float_values
from vllmlite.weights.packing import Packing

STANDARD = ("gptq", "awq", "compressed-tensors", "fp8")


def values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return every tensor by the model's names, dequantised to float32."""
    backend = TorchBackend()
    weights = open_model(path, read_spec(path), Packing(backend))
    return {name: float_values(weights.floats(name)) for name in weights.sources}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", STANDARD)
def test_only_products_are_rounded(form: str, family: str, tmp_path: Path) -> None:
    if form == "fp8" and family in ("fused", "transposed", "parallel"):
        pytest.skip("the fused parts of the tiny checkpoint are smaller than a block")
    source = checkpoint(tmp_path / "source", family)
    group = {} if form == "fp8" else {"group_size": 32}
    quantize_checkpoint(source, tmp_path / "made", form, **group)  # type: ignore[arg-type]
    before, after = values(source), values(tmp_path / "made")
    products = {name for name, one in sources(read_spec(tmp_path / "made")).items() if one.product}
    assert before.keys() == after.keys()
    for name, expected in before.items():
        if name not in products or name == "head.weight":
            assert np.array_equal(after[name], expected), name
            continue
        error = np.sqrt(np.square(after[name] - expected).mean()) / expected.std()
        assert 0 < error < (0.03 if form == "fp8" else 0.12), name


@pytest.mark.parametrize(
    ("form", "options", "part", "bits"),
    [
        ("gptq", {"bits": 8}, "qweight", 8),
        ("gptq", {"symmetric": False, "group_size": 32}, "qzeros", 4),
        ("gptq", {"head": True, "group_size": 64}, "qweight", 4),
        ("awq", {"group_size": -1}, "qweight", 4),
        ("compressed-tensors", {"bits": 8, "group_size": -1}, "weight_packed", 8),
        ("compressed-tensors", {"symmetric": False, "group_size": 32}, "weight_zero_point", 4),
        ("compressed-tensors", {"head": True, "group_size": 64}, "weight_packed", 4),
    ],
)
def test_options_of_formats(form: str, options: dict[str, Any], part: str, bits: int, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "tied", hidden_size=128, vocab_size=320)
    head = options.pop("head", False)
    quantize_checkpoint(source, tmp_path / "made", form, **{"group_size": 128} | options, quantize_head=head)
    spec = read_spec(tmp_path / "made")
    assert spec.tie_word_embeddings == (not head)
    before, after = values(source), values(tmp_path / "made")
    if head:
        assert np.array_equal(after["embedding.weight"], before["embedding.weight"])
        assert 0 < np.abs(after["head.weight"] - before["embedding.weight"]).max() < 0.1
    relative = np.abs(after["0.q.weight"] - before["0.q.weight"]).max() / np.abs(before["0.q.weight"]).max()
    assert relative < (0.01 if bits == 8 else 0.25)
    expected, found = (first_logits(float32_backend(), tmp_path / name) for name in ("source", "made"))
    assert np.square(found - expected).mean() < (0.001 if bits == 8 else 0.2) * expected.var()


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "source", "dense")
    quantize_checkpoint(source, tmp_path / "one", "gptq", group_size=32)
    monkeypatch.setattr("vllmlite.weights.writer.SHARD_BYTES", 40_000)
    quantize_checkpoint(source, tmp_path / "many", "gptq", group_size=32)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    one, many = values(tmp_path / "one"), values(tmp_path / "many")
    assert all(np.array_equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("exl2", {}, "format='exl2': accepted: int8, int4, gptq"),
        ("int8", {"method": "gptq"}, "method='gptq': accepted with int8: rtn"),
        ("awq", {"bits": 8}, "bits=8: accepted with awq: 4"),
        ("awq", {"symmetric": True}, "symmetric=True: accepted with awq: False"),
        ("awq", {"quantize_head": True}, "head=True: accepted with awq: False"),
        ("gptq", {"act_order": True}, "act_order=True: accepted with gptq and method rtn: False"),
        ("gptq", {"group_size": 4}, "group_size=4: accepted: -1 for a whole row, or 8 to 65536"),
        ("fp8", {"group_size": 64}, "group_size=64: accepted with fp8: 128"),
        (
            "gptq",
            {"group_size": 48},
            "group_size=48: accepted for model.layers.0.*rows have 64 elements: 64, 32, -1",
        ),
        ("gptq", {"calibration": Path("text")}, "calibration='text': accepted with method gptq or awq"),
        ("gptq", {"num_tokens": 5}, "num_tokens=5: accepted: 512 to"),
    ],
)
def test_what_cannot_be_written_is_refused(
    form: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "source", "dense")
    with pytest.raises(ParameterError, match=message):
        quantize_checkpoint(source, tmp_path / "made", form, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_that_do_not_fill_words_are_refused_by_tensor(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "dense", intermediate_size=100)
    with pytest.raises(ModelError, match=r"tensor 'model.layers.0.mlp.gate_proj.weight'.*\[100, 64\].*AWQ"):
        quantize_checkpoint(source, tmp_path / "made", "awq", group_size=-1)
    shutil.rmtree(source)
    checkpoint(source, "fused")
    with pytest.raises(
        ModelError, match=r"qkv_proj.weight': its fused parts begin at rows \[0\].* multiples of 128"
    ):
        quantize_checkpoint(source, tmp_path / "made", "fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    source = checkpoint(tmp_path / "source", "dense")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place in ("os.posix_fallocate", "vllmlite.weights.writer.TensorFile.flush"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(ModelError, match="the disk is full: repeat the command once there is space"):
                quantize_checkpoint(source, tmp_path / "made", "gptq", group_size=32)
        assert {path.name for path in tmp_path.iterdir()} == {"source", ".made.partial"}
    quantize_checkpoint(source, tmp_path / "made", "gptq", group_size=32)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "made"}


def test_the_command_names_formats_and_keeps_the_old_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllmlite.cli.quantize import FORMATS as OFFERED

    assert tuple(FORMATS) == OFFERED
    source = checkpoint(tmp_path / "source", "dense")
    options = ["--model", str(source), "--output", str(tmp_path / "made")]
    assert main(["quantize", "--format", "gptq", "--group-size", "48", *options]) == 1
    assert "group_size=48: accepted for" in capsys.readouterr().err
    assert main(["quantize", "--quantization", "int8", *options]) == 0
    assert "MB in int8" in capsys.readouterr().out
    assert main(["quantize", "--quantization", "int8", "--format", "gptq", *options]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
    assert main(["quantize", *options]) == 2
    assert "--format --quantization is required" in capsys.readouterr().err
