"""GGUF files that ``vllmlite quantize`` writes: vllmlite and gguf-py read the expected values from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf_families import CASES, MOE
from model_runs import first_logits, float32_backend
from numpy.typing import NDArray
from quantize_families import checkpoint
from tokenizer_files import TEMPLATE, write_tokenizer

import vllmlite.quantize.checkpoint as writing
from vllmlite.cli import main
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import open_model, read_spec
from vllmlite.models.gguf import open_gguf
from vllmlite.models.tensors import sources
from vllmlite.quantize import quantize_checkpoint
from vllmlite.weights.gguf import read_gguf
from vllmlite.weights.gguf_writer import Entry, gguf_checkpoint
from vllmlite.weights.host import float_tensor, float_values
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import ModelWeights
from vllmlite.weights.schemes.gguf_blocks import type_name

Values = dict[str, NDArray[np.float32]]


def values(path: Path) -> Values:
    """Return every tensor by the model's names, dequantised to float32."""
    spec, packing = read_spec(path), Packing(float32_backend())
    weights = (
        ModelWeights(sources(spec), open_gguf(path, spec), packing)
        if path.is_file()
        else open_model(path, spec, packing)
    )
    return {name: float_values(weights.floats(name)) for name in weights.sources}


def write_values(source: Path, target: Path, tensors: Values) -> Path:
    """Copy the checkpoint in directory ``source`` with other values."""
    from safetensors.numpy import save_file

    stored: Values = {}
    for name, one in sources(read_spec(source)).items():
        whole = stored.setdefault(one.key, np.zeros(one.stored, np.float32))
        matrix = whole.reshape(-1, *one.stored[2:]) if one.stacked else whole
        rows, begin = (matrix.T if one.transposed else matrix), 0
        for first, last in one.rows or ((0, len(rows)),):
            part = rows[first : last : one.step]
            part = part if one.columns is None else part[:, slice(*one.columns)]
            part[:] = tensors[name][begin : begin + len(part)].reshape(part.shape)
            begin += len(part)
    target.mkdir()
    save_file(stored, target / "model.safetensors")
    shutil.copy(source / "config.json", target)
    return target


def source_of(case: str, path: Path) -> Path:
    _, family, changes = CASES[case]
    write_checkpoint(path, family, **changes)
    return write_tokenizer(path)


@pytest.mark.parametrize(
    ("case", "form"),
    [*((case, "gguf-q4_0") for case in CASES), ("llama", "gguf-q8_0"), ("bloom", "gguf-q8_0")],
)
def test_every_family(case: str, form: str, tmp_path: Path) -> None:
    """The file has the rounded tensors of the source, and gives the results of a checkpoint with the rounded values."""
    source, made = source_of(case, tmp_path / "source"), tmp_path / "made.gguf"
    quantize_checkpoint(source, made, form)
    before, after = values(source), values(made)
    assert before.keys() == after.keys()
    for name, expected in before.items():
        error = np.abs(after[name] - expected).max() / np.abs(expected).max()
        products = expected.ndim == 2 and not name.endswith(("router.weight", "shared_gate.weight"))
        rounded = products and name != "positions.weight" and expected.shape[-1] % 32 == 0
        bound = (0.005 if form == "gguf-q8_0" else 0.3) if rounded else 1e-6
        assert error <= bound and (error > 0) >= rounded, name
    plain = write_values(source, tmp_path / "plain", after)
    found, wanted = (first_logits(float32_backend(), path) for path in (made, plain))
    if read_spec(source).norm.unit_offset or "longrope" in case:
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    else:
        assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("case", ["llama", "qwen2moe", "phi3-longrope", "gemma3", "gpt2"])
def test_gguf_py_reads_the_same(case: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="python3-gguf is not installed")
    cached = tmp_path / "models--owner--Some-1B" / "snapshots" / "0123"
    source, made = source_of(case, cached), tmp_path / "made.gguf"
    quantize_checkpoint(source, made, "gguf-q4_0")
    reader, own = gguf.GGUFReader(made), read_gguf(made)
    assert {tensor.name for tensor in reader.tensors} == own.tensors.keys()
    for tensor in reader.tensors:
        expected = own.tensors[tensor.name]
        assert tensor.tensor_type.name == type_name(expected)
        assert tuple(tensor.shape[::-1]) == expected.shape
        found = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        scheme = getattr(expected, "scheme", None)
        decoded = float_values(expected) if scheme is None else scheme.dequantize(expected)  # type: ignore[arg-type]
        assert np.array_equal(found.reshape(-1), decoded.reshape(-1)), tensor.name
    assert reader.fields["general.architecture"].contents() == CASES[case][0]
    assert reader.fields["general.name"].contents() == "Some-1B"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert reader.fields["tokenizer.chat_template"].contents() == TEMPLATE


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}, "architectures='OPTForCausalLM' cannot be stored as GGUF"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            r"layers\[0\].rope.kind=dynamic; it would be read as default",
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "truncate": False,
                                 "original_max_position_embeddings": 64}},
            r"rope.truncate=False; it would be read as True",
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 2.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
            "tensor rope_freqs.weight: the rotary divisors are not Llama 3's",
        ),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "attention.sliding_window=8; accepted: 0",
        ),
        ("StableLm", {"qk_layernorm": True}, "qk_norm=layer; it would be read as None"),
        (
            "Qwen3Moe",
            MOE | {"norm_topk_prob": True, "mlp_only_layers": [1]},
            r"layers\[1\].moe=None; it would be read as MoeSpec",
        ),
        ("Gemma3", {"layer_types": ["full_attention"] * 3, "head_dim": 16}, r"window=None; it would be read as"),
    ],
)  # fmt: skip
def test_a_model_that_gguf_cannot_describe_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "source", family, **changes)
    write_tokenizer(tmp_path / "source")
    with pytest.raises(ModelError, match=message):
        quantize_checkpoint(tmp_path / "source", tmp_path / "made.gguf", "gguf-q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_name_of_the_output_is_checked(tmp_path: Path) -> None:
    source = write_tokenizer(checkpoint(tmp_path / "source", "dense"))
    for name, form, what in (
        ("made", "gguf-q8_0", "file that ends in .gguf"),
        ("x.gguf", "gptq", "directory"),
    ):
        with pytest.raises(ParameterError, match=f"output=.*accepted with {form}: the name of a {what}"):
            quantize_checkpoint(source, tmp_path / name, form)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ParameterError, match="exists already: name a new file"):
        quantize_checkpoint(source, tmp_path / "x.gguf", "gguf-q8_0")


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("gptq", "mixture"),
        ("awq", "fused"),
        pytest.param("gptq", "dense", marks=pytest.mark.slow),
        pytest.param("gptq", "norms less one", marks=pytest.mark.slow),
    ],
)
def test_calibrated_files_are_closer_and_interrupted_runs_go_on(
    method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "calibration_tokens", lambda *_: np.tile(np.arange(40, dtype=np.int32), 15))
    source = write_tokenizer(checkpoint(tmp_path / "source", family))
    expected = first_logits(float32_backend(), source)
    errors = []
    for name in (method, "rtn"):
        quantize_checkpoint(source, tmp_path / f"{name}.gguf", "gguf-q4_0", method=name)
        errors.append(np.square(first_logits(float32_backend(), tmp_path / f"{name}.gguf") - expected).mean())
    assert errors[0] < errors[1]

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "made.gguf", "gguf-q4_0", method=method, show=interrupt)
    assert quantize_checkpoint(source, tmp_path / "made.gguf", "gguf-q4_0", method=method).resumed_at == 2
    assert (tmp_path / "made.gguf").read_bytes() == (tmp_path / f"{method}.gguf").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "made.gguf", "rtn.gguf", f"{method}.gguf"}


def test_models_named_phi_3_without_its_tokens_get_another_name(tmp_path: Path) -> None:
    source = write_tokenizer(checkpoint(tmp_path / "My-Phi-3-mini", "dense"))
    quantize_checkpoint(source, tmp_path / "made.gguf", "gguf-q8_0")
    assert read_gguf(tmp_path / "made.gguf").metadata["general.name"] == "My-phi_3-mini"


def test_a_head_that_is_not_the_table_is_written(tmp_path: Path) -> None:
    """A checkpoint may store another output layer although its configuration ties it to the embedding."""
    source = write_tokenizer(checkpoint(tmp_path / "source", "dense"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    quantize_checkpoint(source, tmp_path / "made.gguf", "gguf-q4_0")
    kinds = {name: type_name(tensor) for name, tensor in read_gguf(tmp_path / "made.gguf").tensors.items()}
    assert kinds["output.weight"] == "Q8_0" and kinds["token_embd.weight"] == "Q4_0"


def test_the_command_says_the_size_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tokenizer(checkpoint(tmp_path / "source", "dense", hidden_size=128))
    made = tmp_path / "made.gguf"
    assert main(["quantize", "--model", str(source), "--format", "gguf-q8_0", "--output", str(made)]) == 0
    assert f"{made.stat().st_size / 1e6:.1f} MB in gguf-q8_0" in capsys.readouterr().out


def test_metadata_are_read_as_they_were_written(tmp_path: Path) -> None:
    metadata = {
        "text": "a\u00e9",
        "flag": True,
        "count": 3,
        "ratio": 0.5,
        "ids": [1, -2],
        "merges": [],
        "of": ["b"],
    }
    files = gguf_checkpoint(tmp_path / "x.gguf", metadata, {"w": Entry("F32", (2, 4))})
    files.write("w", float_tensor(np.zeros((2, 4), np.float32), "float32"))
    files.close()
    found = read_gguf(tmp_path / "x.gguf").metadata
    assert {
        key: list(value) if isinstance(metadata[key], list) else value for key, value in found.items()
    } == metadata
