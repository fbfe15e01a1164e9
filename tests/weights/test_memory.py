"""Memory of a mapped checkpoint while its weights are loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

from vllmlite.backends.torch import TorchBackend
from vllmlite.models import load_model
from vllmlite.weights import checkpoint
from vllmlite.weights.host import HostTensor, HostWeight, release
from vllmlite.weights.safetensors import read_safetensors, write_safetensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(path))}\n(?:\w+: .*\n)*?Rss: +(\d+) kB", maps)
    assert found, "the file is not mapped"
    return sum(map(int, found)) << 10


def test_a_released_tensor_takes_no_memory_and_is_read_again(tmp_path: Path) -> None:
    values = {
        name: np.random.default_rng(i).integers(0, 256, 1 << 20, np.uint8) for i, name in enumerate("abc")
    }
    layout = {name: ("uint8", data.shape) for name, data in values.items()}
    held = [HostTensor("uint8", data.shape, data) for data in values.values()]
    write_safetensors(tmp_path / "x.safetensors", held, layout)
    mapped = read_safetensors(tmp_path / "x.safetensors")
    for name, tensor in mapped.items():
        np.testing.assert_array_equal(tensor.data, values[name])
    assert resident(tmp_path / "x.safetensors") >= 3 << 20
    for tensor in mapped.values():
        release(tensor)
    assert resident(tmp_path / "x.safetensors") <= 1 << 16
    for name, tensor in mapped.items():
        np.testing.assert_array_equal(tensor.data, values[name])
    release(held[0])
    np.testing.assert_array_equal(held[0].data, values["a"])


class Watching(TorchBackend):
    """Keeps the resident bytes of ``file`` before each weight; computes in float32, so that weights are copied."""

    file: Path

    def __init__(self) -> None:
        super().__init__()
        self.resident: list[int] = []

    def linear_weight(self, parts: Sequence[HostWeight], biases: Sequence[HostTensor] = ()) -> Any:
        self.resident.append(resident(self.file))
        return super().linear_weight(parts, biases)


def test_loading_keeps_no_more_than_a_weight_mapped(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype="bfloat16", hidden_size=256, intermediate_size=2048)
    backend = Watching()
    backend.file = tmp_path / "model.safetensors"
    load_model(backend, tmp_path, max_model_len=32, block_size=16)
    gate_and_up = 2 * 2 * 256 * 2048
    assert backend.file.stat().st_size > 2 * gate_and_up
    assert max(backend.resident) < gate_and_up + (1 << 19)


def test_dummy_weights_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    made: list[str] = []
    make = checkpoint._dummy

    def note(name: str, *given: Any) -> HostWeight:
        made.append(name)
        return make(name, *given)

    monkeypatch.setattr(checkpoint, "_dummy", note)
    load_model(TorchBackend(), tmp_path, max_model_len=32, block_size=16, load_format="dummy")
    assert len(made) == len(set(made))
