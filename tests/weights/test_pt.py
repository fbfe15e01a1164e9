"""PyTorch weight files load as safetensors files do, and no code in them is run."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from paged import same_bytes

from vllmlite import LLM, SamplingParams
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import read_spec
from vllmlite.models.tensors import stored_shapes
from vllmlite.weights.checkpoint import open_weights
from vllmlite.weights.pt import read_pt


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    write_checkpoint(path, dtype="bfloat16")
    return path


def tensors(source: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(source / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    shapes = stored_shapes(read_spec(one))
    found, expected = open_weights(one, shapes), open_weights(other, shapes)
    return all(same_bytes(found.tensor(name), expected.tensor(name)) for name in shapes)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_one_file(source: Path, tmp_path: Path, name: str, zipped: bool) -> None:
    shutil.copy(source / "config.json", tmp_path)
    torch.save(tensors(source), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(tmp_path, source)
    if name.endswith(".bin"):
        params = SamplingParams(temperature=0, max_tokens=8)
        found = [
            LLM(str(path), skip_tokenizer_init=True, load_format=form)
            .generate([{"prompt_token_ids": [1, 2]}], params, use_tqdm=False)[0]
            .outputs[0]
            .token_ids
            for path, form in ((tmp_path, "pt"), (source, "safetensors"))
        ]
        assert found[0] == found[1]


def test_shards(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "config.json", tmp_path)
    found = tensors(source)
    files = {name: f"pytorch_model-{i % 3 + 1}-of-3.bin" for i, name in enumerate(found)}
    for file in set(files.values()):
        torch.save({name: found[name] for name in files if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert same(tmp_path, source)
    for number in (2, 3):
        (tmp_path / f"pytorch_model-{number}-of-3.bin").unlink()
    with pytest.raises(
        ModelError, match=r"2 of 3 files missing .*pytorch_model-2-of-3\.bin, pytorch_model-3-of-3"
    ):
        open_weights(tmp_path, stored_shapes(read_spec(source)))
    files[next(iter(files))] = "../x.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ModelError, match=r"expected a \*\.bin file beside the index"):
        open_weights(tmp_path, stored_shapes(read_spec(source)))


def test_safetensors_come_first(source: Path, tmp_path: Path) -> None:
    for file in source.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    assert same(tmp_path, source)
    with pytest.raises(
        ModelError, match=r"pytorch_model\.bin: cannot be read by torch|contains objects other than tensors"
    ):
        open_weights(tmp_path, stored_shapes(read_spec(source)), "pt")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"holds none of model\.safetensors, model\.safetensors\.index\.json$"
    ):
        open_weights(tmp_path, stored_shapes(read_spec(source)), "safetensors")
    with pytest.raises(ParameterError, match=r"load_format='gguf'.*is a directory"):
        open_weights(tmp_path, {}, "gguf")


class Evil:
    """Writes a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(how: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    content = {"a": torch.ones(2), "b": Evil(trace)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ModelError, match=rf"{path.name}: contains objects other than tensors"):
        read_pt(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(2)], "holds list"),
        ({"a": 3}, "'a': is not a dense tensor"),
        ({3: torch.ones(2)}, "'3': is not a dense tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a': is not a dense tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "is of complex64; accepted: float64"),
    ],
)
def test_files_that_hold_no_mapping_of_tensors_are_refused(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=says):
        read_pt(tmp_path / "x.pt")


def test_without_torch_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ModelError, match=r"torch is not installed .*vllmlite\[torch\].*; safetensors files need no torch"
    ):
        read_pt(tmp_path / "pytorch_model.bin")


def test_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base, "b": base.T, "c": base[1:, 2]}, tmp_path / "x.pt")
    found = read_pt(tmp_path / "x.pt")
    assert found["b"].shape == (4, 3)
    np.testing.assert_array_equal(found["b"].data.view("<f4").reshape(4, 3), base.T.numpy())
    np.testing.assert_array_equal(found["c"].data.view("<f4"), [6.0, 10.0])


@pytest.mark.parametrize("size", [0, 1, 100, 1000])
def test_truncated_pickles_are_refused(source: Path, tmp_path: Path, size: int) -> None:
    torch.save(tensors(source), tmp_path / "whole.bin")
    (tmp_path / "x.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:size])
    with pytest.raises(ModelError, match=r"x\.bin: "):
        read_pt(tmp_path / "x.bin")
