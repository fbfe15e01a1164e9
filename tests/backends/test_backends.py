"""How a backend is chosen, and how much memory it may use."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint

from vllmlite.backends import memory, select
from vllmlite.backends.base import API, Backend
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.memory import Memory
from vllmlite.backends.native import NativeBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import BackendError, ParameterError
from vllmlite.models import load_model


def choose(**wanted: Any) -> tuple[Backend, str]:
    return select.select_backend(select.BackendRequest(**wanted))


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_choice_of_the_cpu_names_the_declined_backends() -> None:
    backend, why = choose(backend="torch", device="cpu", checkpoint_dtype="bfloat16")
    assert (backend.name, backend.device, backend.dtype, backend.asynchronous) == (
        "torch",
        "cpu",
        "bfloat16",
        False,
    )
    assert why == (
        "torch on cpu in bfloat16; cuda on cuda declined: backend torch was requested; "
        "torch on cuda declined: device cpu was requested; cpu on cpu declined: backend torch was requested"
    )


@pytest.mark.parametrize(
    ("dtype", "checkpoint", "found"),
    [
        ("auto", "float32", "float32"),
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float16", "float32"),
        ("float16", "float32", "float16"),
        ("float32", "bfloat16", "float32"),
    ],
)
def test_dtypes_on_the_cpu(dtype: str, checkpoint: str, found: str) -> None:
    assert choose(backend="torch", device="cpu", dtype=dtype, checkpoint_dtype=checkpoint)[0].dtype == found


@no_gpu
def test_without_a_gpu_each_candidate_says_why() -> None:
    _, why = choose()
    assert "torch on cuda declined: " in why
    assert "cuda on cuda declined: vllmlite._cuda" in why
    with pytest.raises(
        BackendError, match=r"no backend can run: cuda on cuda declined: .*; torch on cpu declined: "
    ):
        choose(device="cuda:3")


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(select, "GPU_NODES", ("/",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        "vllmlite.backends.torch.TorchBackend",
        lambda device, dtype, threads: SimpleNamespace(
            device=device, dtype=dtype, threads=threads, details=""
        ),
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "checkpoint", "found"),
    [
        ((9, 0), "auto", "bfloat16", "bfloat16"),
        ((7, 5), "auto", "bfloat16", "float16"),
        ((7, 5), "auto", "float32", "float32"),
        ((7, 5), "bfloat16", "float32", "bfloat16"),
        ((7, 5), "auto", "float16", "float16"),
    ],
)
def test_dtypes_on_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str, checkpoint: str, found: str
) -> None:
    fake_gpu(monkeypatch, capability)
    for device in ("auto", "cuda", "cuda:1"):
        backend, why = choose(
            backend="torch", device=device, dtype=dtype, checkpoint_dtype=checkpoint, threads=2
        )
        assert (backend.device, backend.dtype) == ("cuda" if device == "auto" else device, found)
        assert why.startswith(f"torch on {backend.device} in {found}")


def fake_native(monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    real = importlib.import_module
    native = SimpleNamespace(**{"API": API, "Runtime": lambda *arguments: None} | members)
    monkeypatch.setattr(
        importlib, "import_module", lambda name: native if name == "vllmlite._cuda" else real(name)
    )


def gpu(name: str, capability: tuple[int, int]) -> dict[str, Any]:
    return {"name": name, "compute_capability": capability}


@pytest.mark.parametrize("native", [CpuBackend, CudaBackend])
def test_native_backends_implement_every_op_themselves(native: type[NativeBackend]) -> None:
    own = (native.__module__, NativeBackend.__module__)
    assert {op for op in Backend.__abstractmethods__ if getattr(native, op).__module__ not in own} == set()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"probe": lambda: {"devices": [], "reason": "no driver"}}, "vllmlite._cuda finds no GPU: no driver"),
        ({"API": API + 1}, f"is built for interface {API + 1}, and this is {API}"),
        (
            {"probe": lambda: {"devices": [gpu("H200", (9, 0))], "reason": None}},
            "device cuda:3: vllmlite._cuda finds 1 GPUs",
        ),
    ],
)
def test_the_native_backend_says_why_it_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, members: dict[str, Any], words: str
) -> None:
    fake_native(monkeypatch, **members)
    with pytest.raises(BackendError, match=words):
        choose(backend="cuda", device="cuda:3")


@pytest.mark.parametrize(("capability", "found"), [((9, 0), "bfloat16"), ((7, 5), "float16")])
def test_the_native_backend_is_chosen_before_torch(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], found: str
) -> None:
    fake_native(monkeypatch, probe=lambda: {"devices": [gpu("Chip", capability)], "reason": None})
    for device in ("auto", "cuda", "cuda:0"):
        backend, why = choose(device=device, checkpoint_dtype="bfloat16")
        assert (backend.name, backend.dtype) == ("cuda", found)
        assert why == f"cuda on {'cuda' if device == 'auto' else device} in {found} (Chip)"


def test_without_a_backend_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "vllmlite._cpu", "vllmlite._cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vllmlite.backends.torch")
    torch_reason = "the Python package torch is not installed (Debian: python3-torch; pip: vllmlite[torch])"
    cpu_reason = "vllmlite._cpu is not installed (Debian: python3-vllmlite-cpu; pip: VLLMLITE_CPU=1)"
    with pytest.raises(BackendError) as caught:
        choose(device="cpu")
    assert f"cpu on cpu declined: {cpu_reason}; torch on cpu declined: {torch_reason}" in str(caught.value)
    with pytest.raises(BackendError) as caught:
        choose(device="cpu", model="MptForCausalLM", only=("torch",))
    assert "cpu on cpu declined: MptForCausalLM runs on torch only" in str(caught.value)
    assert torch_reason in str(caught.value)


def test_a_torch_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(BackendError, match="torch on cpu declined: torch cannot be imported: libtorch"):
        choose()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"backend": "jax"}, "backend"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:"}, "device"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_unknown_backends_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        choose(**options)
    assert caught.value.field == field


def test_an_unsupported_dtype_or_device_is_refused() -> None:
    with pytest.raises(BackendError, match="int8"):
        TorchBackend("cpu", "int8")
    with pytest.raises(BackendError, match="device nowhere"):
        TorchBackend("nowhere")


def test_the_thread_count_is_set() -> None:
    before = torch.get_num_threads()
    try:
        TorchBackend(threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    monkeypatch.setattr(TorchBackend, "memory", lambda self: Memory(100, 100))
    with pytest.raises(BackendError, match=r"weights take .* bytes in float32; 100 are free"):
        load_model(TorchBackend(), tmp_path, max_model_len=8, block_size=4)


# Memory


def test_memory_of_this_machine_is_read() -> None:
    found = memory.host_memory()
    assert 2**26 < found.free <= found.total


def test_control_groups_limit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = tmp_path / "a", tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.setattr(memory, "_groups", lambda: [inner, outer, tmp_path])
    monkeypatch.setattr(memory, "_machine", lambda: (1000, 900))
    assert memory.host_memory() == Memory(1000, 900)
    (inner / "memory.max").write_text("max\n")
    (outer / "memory.max").write_text("500\n")
    (outer / "memory.current").write_text("300\n")
    assert memory.host_memory() == Memory(500, 200)
    (outer / "memory.stat").write_text("anon 100\ninactive_file 150\n")
    assert memory.host_memory() == Memory(500, 350)
    (inner / "memory.max").write_text("10\n")
    (inner / "memory.current").write_text("30\n")
    assert memory.host_memory() == Memory(10, 0)
