"""Recognise files and directories that are not checkpoints, for error messages that say what they are instead."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

from vllmlite.errors import ModelError

HEAD = 512
_CUT_SHORT = "of zeros, as an interrupted download leaves it: fetch it again"

_BEGINNINGS: tuple[tuple[str, int, bytes, str], ...] = (
    (
        "lfs",
        0,
        b"version https://git-lfs",
        "a git-lfs pointer, not the file itself: fetch that with `git lfs pull`",
    ),
    ("html", 0, b"<!doctype html", "a web page, saved in the file's place: download the file itself"),
    ("html", 0, b"<html", "a web page, saved in the file's place: download the file itself"),
    ("gguf", 0, b"gguf", "a GGUF file: name it *.gguf"),
    ("zip", 0, b"pk\x03\x04", "a zip archive"),
    ("pickle", 0, b"\x80\x02", "a file of pickled objects"),
    ("gzip", 0, b"\x1f\x8b", "compressed with gzip: unpack it first"),
    ("zstd", 0, b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    ("xz", 0, b"\xfd7zxz\x00", "compressed with xz: unpack it first"),
    ("7z", 0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive: unpack it first"),
    ("tar", 257, b"ustar", "a tar archive: unpack it, or name it *.tar"),
    ("hdf5", 0, b"\x89hdf\r\n", "an HDF5 file (TensorFlow, Keras), which is not read"),
    ("ggml", 0, b"lmgg", "a file of ggml's old formats: convert it to GGUF"),
    ("ggml", 0, b"tjgg", "a file of ggml's old formats: convert it to GGUF"),
    ("ggml", 0, b"fmgg", "a file of ggml's old formats: convert it to GGUF"),
    ("numpy", 0, b"\x93numpy", "a NumPy array"),
)
"""Kind, offset and bytes (letters in lower case) by which a file is recognised, and a description."""

_DIRECTORIES: tuple[tuple[str, str], ...] = (
    (
        "adapter_config.json",
        "a LoRA adapter{of}, not a model: merge it into its base model (peft: merge_and_unload)",
    ),
    ("adapter_model.*", "a LoRA adapter, not a model: merge it into its base model (peft: merge_and_unload)"),
    ("model_index.json", "a diffusers pipeline, not a language model"),
    ("consolidated*.safetensors", "a model in Mistral's own format: take its Hugging Face format"),
    (
        "consolidated*.pth",
        "a model in its maker's own format (consolidated.*.pth): take its Hugging Face format",
    ),
    ("*.onnx", "an ONNX model, which is not read"),
    ("onnx/*.onnx", "an ONNX model, which is not read"),
    ("openvino_model.xml", "an OpenVINO model, which is not read"),
    ("*.engine", "a TensorRT engine, which is not read"),
    ("*.mlpackage", "a Core ML model, which is not read"),
    ("weights*.npz", "an MLX model in NumPy's format, which is not read"),
    ("tf_model*.h5", "a TensorFlow model, which is not read"),
    ("saved_model.pb", "a TensorFlow model, which is not read"),
    ("flax_model*.msgpack", "a Flax model, which is not read"),
    ("*.nemo", "a NeMo model, which is not read"),
    ("ggml-model*.bin", "a model in ggml's old formats: convert it to GGUF"),
    ("params.json", "a model in its maker's own format (params.json): take its Hugging Face format"),
)
"""File patterns by which a directory without a checkpoint is recognised, with a description."""

_TENSORS: tuple[tuple[str, str], ...] = (
    (".lora_A.", "a LoRA adapter"),
    (".q_weight", "EXL2"),
    (".trellis", "EXL3"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".qzeros", "AWQ or GPTQ"),
    (".qweight", "AWQ or GPTQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_2", "NVFP4 (ModelOpt)"),
    (".weight_scale_inv", "FP8 in blocks"),
    (".weight_scale", "FP8 or INT8 with scales"),
    ("_proj_blocks", "MXFP4 (gpt-oss)"),
    (".biases", "MLX's quantisation"),
)
"""Parts of tensor names by which a quantisation format is recognised."""


def refuse_foreign_file(path: Path, allowed: Iterable[str] = ()) -> None:
    """Raise ModelError if the file at ``path`` is of a known kind that is not ``allowed``, or is cut short.

    An unreadable file raises nothing here."""
    found = what_it_is(path)
    if found is None:
        return
    kind, words = found
    if kind == "zip" and "zip" in allowed and not zipfile.is_zipfile(path):
        words = "cut short (a zip archive without its end): fetch it again"
    elif kind in allowed:
        return
    raise ModelError(f"{path}: is {words}")


def what_it_is(path: Path) -> tuple[str, str] | None:
    """Return the kind of a file and a description, by its first bytes; None if they are unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None
    if len(head) >= 64 and not any(head):
        return "zeros", _CUT_SHORT
    lowered = head.lower()
    for kind, at, beginning, words in _BEGINNINGS:
        text = lowered.lstrip() if kind == "html" else lowered
        if text[at : at + len(beginning)] == beginning:
            return kind, words
    return None


def what_directory_is(path: Path) -> str | None:
    """Return a description of a directory that is not a checkpoint, with advice; None if its kind is not recognised."""
    dangling = sorted(file for file in path.iterdir() if file.is_symlink() and not file.exists())
    if dangling:
        first, more = dangling[0], f" and {len(dangling) - 1} more" if len(dangling) > 1 else ""
        return f"holds dangling links, as an incomplete copy does: {first.name} to {first.readlink()}{more}"
    if (path / "manifests").is_dir() and any(path.glob("blobs/sha256-*")):
        return "is Ollama's store: name the model's file in blobs/"
    for pattern, words in _DIRECTORIES:
        if any(path.glob(pattern)):
            return "is " + words.replace("{of}", _base_of(path / pattern) if "{of}" in words else "")
    return None


def quantization_of(names: Iterable[str]) -> str | None:
    """Return the quantisation format that the tensor ``names`` belong to; None if they look like plain floats."""
    names = list(names)
    return next((kind for part, kind in _TENSORS if any(part in name for name in names)), None)


def _base_of(adapter: Path) -> str:
    """Return `` of NAME`` for the base model in an adapter's configuration, or ""."""
    try:
        base = json.loads(adapter.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return f" of {base}" if isinstance(base, str) and base else ""
