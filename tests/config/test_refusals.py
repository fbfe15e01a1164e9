"""What cannot run is refused early, with one message that says what would work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, write_checkpoint
from paged import PagedModel

from vllmlite import LLM, SamplingParams
from vllmlite.backends.memory import Memory
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.models import load_model, read_spec
from vllmlite.weights.packing import Packing

LLAMA = {**TINY, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def config_only(path: Path, **changes: object) -> Path:
    (path / "config.json").write_text(json.dumps(LLAMA | changes))
    return path


def test_an_unsupported_model_is_refused_with_one_line_before_slow_imports(tmp_path: Path) -> None:
    """The command line exits with status 1 and one line, without a traceback, and fails before any slow import."""
    config_only(tmp_path, quantization_config={"quant_method": "exl2", "bits": 4})
    argv = [sys.executable, "-X", "importtime", "-m", "vllmlite", "generate", "--model", str(tmp_path), "x"]
    run = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    imports, said = (
        [
            line
            for line in run.stderr.splitlines(keepends=True)
            if line.startswith("import time:") == is_import
        ]
        for is_import in (True, False)
    )
    assert run.returncode == 1
    assert not {"torch", "transformers"} & {line.rpartition("|")[2].strip() for line in imports}
    assert re.fullmatch(
        r"vllmlite: error: .*quant_method='exl2'; accepted: auto-round, awq, .*\n", "".join(said)
    ), said


@pytest.mark.parametrize("method", ["exl3", "aqlm", "hqq", "torchao", "quark", "spqr"])
def test_unsupported_quantisation_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    config_only(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=f"quant_method='{method}'; accepted: auto-round, awq, .*vllmlite; "):
        read_spec(tmp_path)


def test_weights_that_do_not_fit_get_an_error_with_suggestions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message gives the bytes needed and the quantisations that would fit."""
    write_checkpoint(tmp_path, dtype="bfloat16")
    backend = TorchBackend("cpu", "bfloat16")
    for free, says in (
        (
            200_000,
            r"--quantization int8 takes \d+, --quantization int4 takes \d+, --quantization fp8 takes \d+$",
        ),
        (130_000, r"are free: --quantization int4 takes \d+$"),
        (1000, "too few for any quantisation$"),
    ):
        monkeypatch.setattr(backend, "memory", lambda free=free: Memory(1 << 30, free))
        with pytest.raises(
            BackendError, match=r"its weights take \d+ bytes in bfloat16; " + f"{free} .*{says}"
        ):
            load_model(backend, tmp_path, max_model_len=64, block_size=16)


def test_suggested_sizes_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, dtype="bfloat16")
    backend = TorchBackend("cpu", "bfloat16")
    monkeypatch.setattr(backend, "memory", lambda: Memory(1 << 30, 200_000))
    with pytest.raises(BackendError) as raised:
        load_model(backend, tmp_path, max_model_len=64, block_size=16)
    offered = dict(re.findall(r"--quantization (\w+) takes (\d+)", str(raised.value)))
    for kind, size in offered.items():
        quantised = TorchBackend("cpu", "bfloat16")
        packing = Packing(quantised, kind)
        monkeypatch.setattr(quantised, "memory", lambda size=size: Memory(1 << 30, int(size)))
        load_model(quantised, tmp_path, max_model_len=64, block_size=16, packing=packing)
        monkeypatch.setattr(quantised, "memory", lambda size=size: Memory(1 << 30, int(size) - 1))
        with pytest.raises(BackendError, match=f"take {size} bytes in {kind}"):
            load_model(quantised, tmp_path, max_model_len=64, block_size=16, packing=packing)


def test_a_rotation_table_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """The error is raised before any table is allocated."""
    write_checkpoint(tmp_path, max_position_embeddings=2**31 - 1)
    backend = TorchBackend("cpu")
    with pytest.raises(
        ParameterError, match=r"max_model_len=.*rotary tables take \d+ bytes.*lower it to \d+"
    ) as raised:
        load_model(backend, tmp_path, max_model_len=2**31 - 1, block_size=16)
    fits = int(re.findall(r"lower it to (\d+)", str(raised.value))[0])
    assert fits < 2**31 - 1
    load_model(backend, tmp_path, max_model_len=1000, block_size=16)


def test_a_context_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    options = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 4, "backend": "torch"}
    with pytest.raises(
        ParameterError, match=r"takes \d+ bytes of key/value cache.*hold 64 tokens: lower it"
    ) as raised:
        LLM(str(tmp_path), max_model_len=100, **options)
    needed, there = map(int, re.findall(r"(?:takes|the) (\d+)", str(raised.value)))
    assert needed * 4 == there * 7
    LLM(str(tmp_path), max_model_len=64, **options)


def test_the_rotation_table_covers_what_the_cache_holds(tmp_path: Path) -> None:
    """A table of the cache's few positions, instead of the model's million, gives the same results."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    longrope: dict[str, Any] = {"rope_parameters": rope, "original_max_position_embeddings": 64}
    for changes in ({}, longrope):
        write_checkpoint(
            tmp_path, "Phi3" if changes else "Llama", max_position_embeddings=1_024_000, **changes
        )
        tracemalloc.start()
        llm = LLM(
            str(tmp_path), skip_tokenizer_init=True, num_gpu_blocks_override=8, block_size=16, backend="torch"
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 << 20, peak
        prompt = {"prompt_token_ids": list(range(5, 100))}
        (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        whole = load_model(TorchBackend("cpu"), tmp_path, max_model_len=1_024_000, block_size=16)
        paged = PagedModel(whole, num_blocks=8, max_slots=1)
        paged.admit(0)
        ids = np.array([*prompt["prompt_token_ids"], *output.outputs[0].token_ids], np.int32)
        expected = paged.logits([0], [ids])[0].argmax(-1)[94:-1]
        assert list(output.outputs[0].token_ids) == expected.tolist()
