"""Files and directories that are not checkpoints are refused with one line that says what they are."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf_files import encode
from safetensors.numpy import save_file

from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import ModelError
from vllmlite.hub import find_model
from vllmlite.models import open_model, read_spec
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.weights.checkpoint import open_weights
from vllmlite.weights.gguf import read_gguf
from vllmlite.weights.packing import Packing
from vllmlite.weights.pt import read_pt
from vllmlite.weights.safetensors import read_safetensors

PACKING = Packing(TorchBackend())
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a21" * 10 + b"\nsize 3970000000\n"


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("a", bytes(100))
    return buffer.getvalue()


def tarball() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        made.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, "is a git-lfs pointer"),
    "page": (b"\n<!DOCTYPE html>\n<html><head>", "is a web page"),
    "page in capitals": (b"<HTML>" + bytes(20), "is a web page"),
    "zeros": (bytes(4096), "is of zeros, as an interrupted download leaves it"),
    "gzip": (gzip.compress(bytes(100)), "is compressed with gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "old ggml": (b"tjgg" + bytes(100), "is a file of ggml's old formats: convert it to GGUF"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_other_formats_are_refused_by_name(case: str, tmp_path: Path) -> None:
    content, says = FILES[case]
    readers: dict[str, Callable[[Path], object]] = {
        "model.safetensors": read_safetensors, "x.gguf": read_gguf, "pytorch_model.bin": read_pt,
        "config.json": lambda path: read_spec(path.parent), "tokenizer.json": lambda path: Tokenizer(path.parent),
    }  # fmt: skip
    for name, read in readers.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(ModelError, match=rf"^{re.escape(str(file))}: {re.escape(says)}") as caught:
            read(file)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
        file.unlink()


def test_archives_instead_of_weights_are_refused(tmp_path: Path) -> None:
    for content, says in (
        (archive(), "is a zip archive"),
        (tarball(), "is a tar archive: unpack it, or name it"),
        (encode({}, {}), "is a GGUF file: name it"),
    ):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=says):
            read_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(archive()[:-30])
    with pytest.raises(ModelError, match="is cut short"):
        read_pt(tmp_path / "pytorch_model.bin")
    (tmp_path / "model.zip").write_bytes(archive())
    with pytest.raises(ModelError, match=r"model\.zip: is a zip archive$"):
        find_model(str(tmp_path / "model.zip"))


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(100, np.float32), "b": np.zeros(3, np.float32)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(ModelError, match="392 bytes of data: the file is cut short"):
        read_safetensors(file)
    path = tmp_path / "x.gguf"
    content = encode({"general.architecture": "llama"}, {"t": ("F32", (4, 4), bytes(64))})
    path.write_bytes(content[:-8])
    with pytest.raises(ModelError, match="the file is cut short"):
        read_gguf(path)


DIRECTORIES: dict[str, tuple[dict[str, str], str]] = {
    "LoRA": (
        {"adapter_config.json": '{"base_model_name_or_path": "owner/base"}', "adapter_model.safetensors": ""},
        "is a LoRA adapter of owner/base, not a model: merge it",
    ),
    "LoRA without words": ({"adapter_config.json": "[]"}, "is a LoRA adapter, not a model"),
    "Mistral": ({"params.json": "{}", "consolidated.safetensors": ""}, "is a model in Mistral's own format"),
    "Meta": ({"params.json": "{}", "consolidated.00.pth": ""}, "is a model in its maker's own format"),
    "ONNX": ({"onnx/model.onnx": ""}, "is an ONNX model"),
    "TensorFlow": ({"tf_model.h5": ""}, "is a TensorFlow model"),
    "Flax": ({"flax_model.msgpack": ""}, "is a Flax model"),
    "MLX": ({"weights.npz": ""}, "is an MLX model"),
    "diffusers": ({"model_index.json": "{}"}, "is a diffusers pipeline"),
    "Ollama": (
        {"manifests/x": "", "blobs/sha256-12": ""},
        "is Ollama's store: name the model's file in blobs/",
    ),
}


@pytest.mark.parametrize("case", DIRECTORIES)
@pytest.mark.parametrize("with_config", [False, True])
def test_directories_of_other_formats_are_refused_by_name(
    case: str, with_config: bool, tmp_path: Path
) -> None:
    files, says = DIRECTORIES[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    if with_config:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=re.escape(says)):
        open_weights(find_model(str(tmp_path)), {})


def test_dangling_links_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../blobs/4d7a")
    for _ in range(2):
        with pytest.raises(
            ModelError, match=r"holds dangling links.*: model\.safetensors to \.\./blobs/4d7a"
        ):
            open_weights(find_model(str(tmp_path)), {})
        (tmp_path / "config.json").write_text("{}")


def test_shards_without_an_index_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    spec = read_spec(tmp_path)
    arrays = {name: one.data.view("<f4").reshape(one.shape) for name, one in tensors.items()}
    (tmp_path / "model.safetensors").unlink()
    shards = [tmp_path / f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, shard in enumerate(shards):
        save_file({name: arrays[name] for name in list(arrays)[number::3]}, shard)
    stored = open_model(tmp_path, spec, PACKING)
    assert stored.floats("final_norm.weight").data.tobytes() == tensors["model.norm.weight"].data.tobytes()
    extra = next(iter(arrays))
    save_file({name: arrays[name] for name in {*list(arrays)[1::3], extra}}, shards[1])
    with pytest.raises(ModelError, match=rf"{re.escape(extra)}.*is in another shard, too"):
        open_model(tmp_path, spec, PACKING)
    shards[1].unlink()
    with pytest.raises(ModelError, match=r"1 of 3 shards missing, as is .*index\.json: model-00002-of-00003"):
        open_model(tmp_path, spec, PACKING)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("q_weight", "EXL2"),
        ("qzeros", "AWQ or GPTQ"),
        ("weight_packed", "compressed-tensors"),
        ("SCB", "bitsandbytes"),
        ("biases", "MLX's quantisation"),
        ("weight_scale_2", r"NVFP4 \(ModelOpt\)"),
    ],
)
def test_quantised_weights_without_a_configuration_are_refused(part: str, says: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: one.data.view("<f4").reshape(one.shape) for name, one in read_safetensors(file).items()}
    added = {f"model.layers.0.mlp.up_proj.{part}": np.zeros(3, np.int32)}
    save_file({name: tensor.copy() for name, tensor in tensors.items()} | added, file)
    with pytest.raises(
        ModelError, match=rf"its weights are stored as {says}, but its configuration does not say so"
    ):
        open_model(tmp_path, read_spec(tmp_path), PACKING)


def test_gguf_models_are_found_beside_other_files(tmp_path: Path) -> None:
    model = tmp_path / "gemma-3-4b-Q4_K_M.gguf"
    for name in (model.name, "mmproj-model-f16.gguf", "gemma.MMPROJ.gguf", "imatrix.gguf"):
        (tmp_path / name).write_bytes(encode({"general.architecture": "llama"}, {}))
    assert find_model(str(tmp_path)) == model
    blob = tmp_path / "sha256-0f1e"  # as Ollama names files
    model.rename(blob)
    assert find_model(str(blob)) == blob


def test_the_first_falcon_config_names_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Falcon", new_decoder_architecture=True, num_kv_heads=2)
    expected, config = read_spec(tmp_path), json.loads((tmp_path / "config.json").read_text())
    renamed = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_kv_heads": "n_head_kv"}
    old = {renamed.get(key, key): value for key, value in config.items() if key != "new_decoder_architecture"}
    old |= {"architectures": ["RWForCausalLM"], "model_type": "RefinedWeb"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_spec(tmp_path) == expected
