"""Checkpoint files: what is read, and what is refused with which message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import same_bytes

from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import read_spec
from vllmlite.models.tensors import stored_shapes
from vllmlite.weights.checkpoint import open_weights
from vllmlite.weights.host import HostTensor
from vllmlite.weights.safetensors import MAX_HEADER, read_safetensors

Header = dict[str, Any]
GOOD: Header = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def write(
    path: Path, header: Header | bytes, data: bytes = bytes(range(24)), length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(name: str, **changes: Any) -> Header:
    return GOOD | {name: GOOD[name] | changes}


def test_stored_tensors_are_read(tmp_path: Path) -> None:
    tensors = read_safetensors(write(tmp_path / "x", {"__metadata__": {"format": "pt"}} | GOOD))
    assert {name: (one.dtype, one.shape) for name, one in tensors.items()} == {
        "a": ("float32", (2, 2)),
        "b": ("bfloat16", (4,)),
    }
    assert tensors["a"].data.tobytes() == bytes(range(16))
    assert tensors["b"].data.tobytes() == bytes(range(16, 24))


def test_files_of_the_safetensors_package_are_read(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    arrays = {name: (rng.standard_normal((3, 5)) * 9).astype(name) for name in names}
    arrays |= {"scalar": np.ones((), np.float32), "none": np.ones((0, 4), np.float32)}
    save_file(arrays, tmp_path / "x", {"format": "np"})
    found = read_safetensors(tmp_path / "x")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype.name, array.shape)
        assert found[name].data.tobytes() == array.tobytes()
        assert not found[name].data.flags.writeable, "a copy, not a view of the file"


def test_unaligned_data_is_copied_to_aligned_memory(tmp_path: Path) -> None:
    text = json.dumps(GOOD).encode()
    for padding in range(4):
        tensors = read_safetensors(write(tmp_path / "x", text + b" " * padding))
        assert tensors["a"].data.ctypes.data % 4 == 0
        assert tensors["a"].data.tobytes() == bytes(range(16))


def test_header_order_may_differ_from_file_order(tmp_path: Path) -> None:
    tensors = read_safetensors(write(tmp_path / "x", dict(reversed(GOOD.items()))))
    assert tensors["a"].data.tobytes() == bytes(range(16))


MALFORMED: dict[str, tuple[Header | bytes, dict[str, Any], list[str]]] = {
    "header longer than the file": (GOOD, {"length": 10**6}, ["header of 1000000 bytes"]),
    "header longer than allowed": (GOOD, {"length": MAX_HEADER + 1}, [str(MAX_HEADER)]),
    "header length of all ones": (GOOD, {"length": 2**64 - 1}, ["header"]),
    "no JSON": (b"{]", {}, ["not JSON"]),
    "not UTF-8": (b'{"\xff": 1}', {}, ["not JSON"]),
    "nested too deep": (b"[" * 200000, {}, ["not JSON"]),
    "huge number": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", {}, ["not JSON"]),
    "a list": (b"[]", {}, ["list"]),
    "duplicate name": (b'{"a": 1, "a": 2}', {}, ["'a' twice"]),
    "duplicate key": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', {}, ["'dtype' twice"]),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, {}, ["__metadata__"]),
    "metadata a string": ({"__metadata__": "x"}, {}, ["__metadata__"]),
    "entry a list": (GOOD | {"b": [1]}, {}, ["'b'", "dtype, shape and data_offsets", "[1]"]),
    "entry without offsets": (GOOD | {"b": {"dtype": "F32", "shape": []}}, {}, ["'b'", "data_offsets"]),
    "entry with more": (entry("b", strides=[1]), {}, ["'b'", "strides"]),
    "unknown dtype": (entry("b", dtype="F6_E2M3"), {}, ["'b'", "F6_E2M3", "BF16"]),
    "dtype a list": (entry("b", dtype=["F32"]), {}, ["'b'", "F32"]),
    "negative size": (entry("b", shape=[-4]), {}, ["'b'", "[-4]"]),
    "fractional size": (entry("b", shape=[4.0]), {}, ["'b'", "[4.0]"]),
    "size a boolean": (entry("b", shape=[True]), {}, ["'b'", "[True]"]),
    "shape a number": (entry("b", shape=4), {}, ["'b'", "shape"]),
    "huge shape": (entry("b", shape=[2**62, 2**62]), {}, ["'b'", "8 bytes"]),
    "offsets past the end": (entry("b", data_offsets=[16, 25]), {}, ["'b'", "24 bytes of data"]),
    "offsets far past the end": (entry("b", data_offsets=[2**63, 2**63 + 8]), {}, ["'b'", "24 bytes"]),
    "offsets descending": (entry("b", data_offsets=[24, 16]), {}, ["'b'", "ascending"]),
    "offsets negative": (entry("b", data_offsets=[-8, 0]), {}, ["'b'", "data_offsets"]),
    "three offsets": (entry("b", data_offsets=[16, 20, 24]), {}, ["'b'", "data_offsets"]),
    "too few bytes": (entry("b", data_offsets=[16, 22]), {}, ["'b'", "8 bytes", "6 bytes"]),
    "overlap": (entry("b", data_offsets=[8, 16]), {}, ["'b'", "overlap"]),
    "gap": (entry("b", shape=[2], data_offsets=[20, 24]), {}, ["'b'", "gap"]),
    "truncated": (GOOD, {"data": bytes(23)}, ["'b'", "23 bytes"]),
    "bytes left over": (GOOD, {"data": bytes(25)}, ["25 bytes", "24"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case: str, tmp_path: Path) -> None:
    header, options, words = MALFORMED[case]
    path = write(tmp_path / "bad.safetensors", header, **options)
    with pytest.raises(ModelError) as caught:
        read_safetensors(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("size", range(9))
def test_files_of_a_few_bytes_are_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x01" + bytes(size - 1) if size else b"")
    with pytest.raises(ModelError):
        read_safetensors(tmp_path / "x")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_safetensors(tmp_path / "x")
    with pytest.raises(ModelError, match="directory"):
        read_safetensors(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever bytes are changed, the reader raises its own error or returns tensors within the file."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    content = bytearray(write(path, GOOD).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    try:
        tensors = read_safetensors(path)
    except ModelError:
        return
    assert sum(one.data.size for one in tensors.values()) <= len(content)


# Directories


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    write_checkpoint(path, "Llama", max_shard_size="60KB")
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single")
    write_checkpoint(path, "Llama", tie_word_embeddings=True)
    return path


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        for file in path.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return make


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors file with changed tensors."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_shards_load_as_a_single_file_does(sharded: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama")
    shapes = stored_shapes(read_spec(sharded))
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, other = open_weights(sharded, shapes), open_weights(tmp_path, shapes)
    for name in shapes:
        assert same_bytes(one.tensor(name), other.tensor(name))


def test_links_into_a_blob_store_are_followed(single: Path, tmp_path: Path) -> None:
    os.symlink(single / "model.safetensors", tmp_path / "model.safetensors")
    open_weights(tmp_path, stored_shapes(read_spec(single)))


def refused(path: Path, shapes: dict[str, tuple[int, ...]], *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_weights(path, shapes)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_tensors_must_be_those_of_the_model(single: Path, copy: Callable[[Path], Path]) -> None:
    shapes = stored_shapes(read_spec(single))
    refused(single, shapes | {"lm_head.bias": (7,), "x": (1,)}, "missing", "lm_head.bias, x")
    without = {name: shape for name, shape in shapes.items() if "norm" not in name}
    refused(single, without, "unexpected tensors", "norm.weight and 2 more")
    wrong = shapes | {"model.norm.weight": (65,)}
    refused(single, wrong, "'model.norm.weight'", "[65]", "[64]", "float32")
    path = copy(single)
    edit(path / "model.safetensors", lambda t: t.update({"model.norm.weight": np.ones(64, np.int8)}))
    refused(path, shapes, "'model.norm.weight'", "int8", "bfloat16")


def test_stored_rope_tables_and_tied_heads_are_ignored(single: Path, copy: Callable[[Path], Path]) -> None:
    shapes, path = stored_shapes(read_spec(single)), copy(single)
    tables = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for layer in range(3)
    }
    edit(
        path / "model.safetensors",
        lambda t: t.update(tables | {"lm_head.weight": t["model.embed_tokens.weight"]}),
    )
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    open_weights(path, shapes, tied=tied)
    edit(
        path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    )
    stored = open_weights(path, shapes, tied=tied)
    assert stored.shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"]


def test_a_tensor_in_two_shards_must_be_the_same_in_both(sharded: Path, copy: Callable[[Path], Path]) -> None:
    path, name = copy(sharded), "model.norm.weight"
    shapes, files = stored_shapes(read_spec(path)), json.loads((path / INDEX).read_text())["weight_map"]
    other = next(file for file in files.values() if file != files[name])
    weight = open_weights(path, shapes).tensor(name)
    assert isinstance(weight, HostTensor)
    values = weight.data.view(np.float32).copy()
    edit(path / other, lambda tensors: tensors.update({name: values}))
    open_weights(path, shapes)
    edit(path / other, lambda tensors: tensors.update({name: values + 1}))
    refused(path, shapes, other, repr(name), f"differs from the one in {files[name]}")


def test_directories_without_weights_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, {}, "none of model.safetensors, model.safetensors.index.json, pytorch_model.bin")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "x.bin",
        3,
        None,
    ],
)
def test_an_index_may_not_point_outside_its_directory(file: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    refused(tmp_path, {}, INDEX, "'a'", repr(file))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 100000]
)
def test_malformed_indices_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content)
    refused(tmp_path, {}, INDEX)


def test_shards_and_index_must_agree(sharded: Path, copy: Callable[[Path], Path]) -> None:
    shapes, path = stored_shapes(read_spec(sharded)), copy(sharded)
    index = json.loads((path / INDEX).read_text())
    files = index["weight_map"]
    name, other = "model.norm.weight", "model.embed_tokens.weight"

    def write_map(**changes: Any) -> None:
        changed = {key: value for key, value in (files | changes).items() if value is not None}
        (path / INDEX).write_text(json.dumps(index | {"weight_map": changed}))

    write_map(**{name: files[other]})
    refused(path, shapes, files[name], repr(name), "expected in " + files[other])
    write_map(**{name: None})
    refused(path, shapes, files[name], repr(name))
    write_map(nothing=files[name])
    refused(path, shapes, files[name], "'nothing'", "found none")
    write_map()
    open_weights(path, shapes)
    (path / files[other]).unlink()
    refused(path, shapes, f"1 of {len(set(files.values()))} files missing", files[other])


def test_unknown_load_format(single: Path) -> None:
    with pytest.raises(ParameterError, match=r"load_format='pickle'.*dummy"):
        open_weights(single, {}, "pickle")


def test_neither_specs_nor_weights_need_torch(single: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vllmlite.models import read_spec\n"
        "from vllmlite.models.tensors import stored_shapes\n"
        "from vllmlite.weights.checkpoint import open_weights\n"
        f"path = Path({str(single)!r}); spec = read_spec(path); open_weights(path, stored_shapes(spec))\n"
        "import vllmlite.models, vllmlite.backends.select\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
