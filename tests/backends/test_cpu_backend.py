"""Promises of the native CPU backend beyond the interface: results do not depend, bit for bit, on how work is split,
and torch is not used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cpu_time import least_cpu_seconds
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from paged import Paged, PagedModel, host_batch, host_tensor

from vllmlite.backends import select
from vllmlite.backends.batch import GraphKey, SlotParams, SlotSpec
from vllmlite.backends.cores import thread_places, usable_cores
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.kv_cache import KV_DTYPES, KVSpec
from vllmlite.errors import BackendError
from vllmlite.models import load_model
from vllmlite.weights.host import FLOAT_DTYPES

_cpu: Any = pytest.importorskip("vllmlite._cpu", reason="vllmlite._cpu is not built")

Array = NDArray[Any]
ISAS: list[str] = _cpu.instruction_sets()
STATUS = Path("/proc/self/status")
each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES)


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(found: Array, expected: Array) -> bool:
    """Whether two arrays are equal, bit for bit."""
    return found.tobytes() == expected.tobytes()


# ---- Rows by themselves


@each_isa
@each_dtype
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 300),
    parts=st.lists(st.integers(1, 60), min_size=1, max_size=3),
)
def test_products_are_batch_invariant(isa: str, dtype: str, rows: int, width: int, parts: list[int]) -> None:
    backend = CpuBackend(dtype, threads=2, isa=isa)
    weights = [random(out, width, seed=out) for out in parts]
    weight = backend.linear_weight([host_tensor(one, dtype) for one in weights])
    x = random(rows, width, seed=1)
    together = backend.to_host(backend.linear(backend.tensor(x), weight))
    alone = [backend.to_host(backend.linear(backend.tensor(row[None]), weight)) for row in x]
    assert same(together, np.concatenate(alone))
    held = np.concatenate(
        [backend.to_host(backend.tensor(host_tensor(one, dtype), "float32")) for one in weights]
    )
    expected = x.astype(np.float64) @ held.T.astype(np.float64)
    # In bfloat16, x is rounded as well, by 1/256 at most.
    rtol, atol = (2**-8, 2e-2 * np.sqrt(width)) if dtype == "bfloat16" else (0, 1e-3)
    np.testing.assert_allclose(together, expected, rtol=rtol, atol=atol)


@each_isa
@each_dtype
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 300),
    parts=st.lists(st.integers(1, 60), min_size=1, max_size=3).filter(lambda parts: sum(parts) % 2 == 0),
    bias=st.booleans(),
)
def test_gated_linear_equals_activation_of_linear(
    isa: str, dtype: str, rows: int, width: int, parts: list[int], bias: bool
) -> None:
    backend = CpuBackend(dtype, threads=2, isa=isa)
    weights = [host_tensor(random(out, width, seed=out), dtype) for out in parts]
    biases = [host_tensor(random(1, out, seed=out)[0], "float32") for out in parts] if bias else []
    weight = backend.linear_weight(weights, biases)
    x = backend.tensor(random(rows, width, seed=1))
    expected = backend.to_host(backend.gated_activation(backend.linear(x, weight), "silu"))
    assert same(backend.to_host(backend.gated_linear(x, weight, "silu")), expected)


@each_isa
def test_a_product_longer_than_a_chunk(isa: str) -> None:
    backend = CpuBackend("bfloat16", isa=isa)
    values = random(7, 4500, seed=3)
    x = random(13, 4500, seed=4)
    weight = backend.linear_weight(
        [host_tensor(values, "bfloat16")], [host_tensor(random(7, seed=5), "bfloat16")]
    )
    together = backend.to_host(backend.linear(backend.tensor(x), weight))
    for row, expected in zip(x, together, strict=True):
        assert same(backend.to_host(backend.linear(backend.tensor(row[None]), weight))[0], expected)


def attention(
    backend: CpuBackend, spec: KVSpec, qkv: Array, cuts: Sequence[int], heads: int, window: int | None
) -> Array:
    """The attention result of one sequence whose tokens are fed in pieces that end at ``cuts``."""
    paged = Paged(backend, spec, num_blocks=40 if spec.block_size > 1 else 400, max_slots=2)
    paged.admit(0)
    found = []
    for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
        batch = paged.upload(paged.batch([0], [end - start]))
        q = backend.attn_prep(backend.tensor(qkv[start:end]), heads, None, paged.kv, 0, batch)
        found.append(backend.to_host(backend.paged_attention(q, paged.kv, 0, batch, 0.3, window)))
    return np.concatenate(found)


@each_isa
@settings(max_examples=16, deadline=None)
@given(
    length=st.integers(2, 150),
    cut=st.floats(0, 1),
    shape=st.sampled_from([(1, 1, 16), (4, 2, 24), (6, 1, 64), (3, 3, 40), (32, 1, 8)]),
    block=st.sampled_from([1, 4, 16, 24, 32]),
    window=st.sampled_from([None, 1, 7, 64, 100]),
    kv_dtype=st.sampled_from(KV_DTYPES),
)
def test_attention_does_not_depend_on_prompt_chunks(
    isa: str,
    length: int,
    cut: float,
    shape: tuple[int, int, int],
    block: int,
    window: int | None,
    kv_dtype: str,
) -> None:
    heads, kv_heads, size = shape
    backend = CpuBackend("float32", isa=isa)
    spec = KVSpec(1, kv_heads, size, block, kv_dtype)
    qkv = random(length, (heads + 2 * kv_heads) * size, seed=length)
    whole = attention(backend, spec, qkv, [length], heads, window)
    assert np.isfinite(whole).all()
    assert same(
        attention(backend, spec, qkv, sorted({max(1, int(cut * length)), length}), heads, window), whole
    )
    if length <= 70:
        assert same(attention(backend, spec, qkv, range(1, length + 1), heads, window), whole)


# ---- Whole models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    pytest.importorskip("transformers", reason="transformers, which writes the checkpoint, is not installed")
    from checkpoints import write_checkpoint

    write_checkpoint(path, dtype="bfloat16")
    return path


def paged_model(path: Path, isa: str = "auto", threads: int = 2, dtype: str = "bfloat16") -> PagedModel:
    return PagedModel(load_model(CpuBackend(dtype, threads, isa), path, max_model_len=128, block_size=16))


PROMPTS = [np.random.default_rng(n).integers(0, 300, n).astype(np.int32) for n in (1, 5, 17, 40)]


@each_isa
def test_logits_are_the_same_batched_alone_and_in_chunks(checkpoint: Path, isa: str) -> None:
    paged = paged_model(checkpoint, isa)
    slots = range(len(PROMPTS))
    for slot in slots:
        paged.admit(slot)
    together = paged.logits(list(slots), PROMPTS)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        for size in (len(prompt), 1, 7):
            paged.admit(0)
            pieces = [prompt[at : at + size] for at in range(0, len(prompt), size)]
            assert same(np.concatenate([paged.logits([0], [piece])[0] for piece in pieces]), expected)


def test_results_do_not_depend_on_the_thread_count(checkpoint: Path) -> None:
    found = []
    for threads in (1, 2, 5):
        paged = paged_model(checkpoint, threads=threads)
        paged.admit(0)
        found.append(paged.logits([0], [PROMPTS[3]])[0])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@each_dtype
def test_instruction_sets_agree(checkpoint: Path, dtype: str) -> None:
    found = []
    for isa in ISAS:
        paged = paged_model(checkpoint, isa, dtype=dtype)
        paged.admit(0)
        found.append(paged.logits([0], [PROMPTS[3]])[0])
    scale = float(np.abs(found[0]).max())
    for isa, logits in zip(ISAS, found, strict=True):
        tolerance = 3e-2 if dtype == "bfloat16" and isa in ("avx512_bf16", "amx") else 1e-4
        assert float(np.abs(logits - found[0]).max()) <= tolerance * scale, isa


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("num_logprobs", [-1, 3])
def test_replayed_steps_equal_eager_steps(checkpoint: Path, random: bool, num_logprobs: int) -> None:
    """Captured steps of two sizes, replayed in turn, give the ids and log-probabilities of eager steps, and neither
    changes the other's results."""
    params = SlotParams(temperature=0.8, top_k=20, top_p=0.9, seed=5, frequency_penalty=0.5)
    found: list[list[bytes]] = []
    for captured in (False, True):
        paged = paged_model(checkpoint)
        for slot in range(3):
            paged.admit(slot, params if random else SlotParams())
        paged.sample([0, 1, 2], PROMPTS[:3])
        kept = [
            paged.sample([2, 0, 1][: 3 - step % 2], captured=captured, num_logprobs=num_logprobs)
            for step in range(20)
        ]
        found.append([])
        for sampled in kept:
            parts = [sampled.ids]
            if sampled.logprobs is not None:
                top = sampled.logprobs
                parts += [top.chosen, top.rank, top.top_ids, top.top]
            found[-1] += [paged.backend.to_host(part).tobytes() for part in parts]
    assert found[0] == found[1]


def test_a_failed_recording_leaves_the_backend_usable(checkpoint: Path) -> None:
    paged = paged_model(checkpoint)
    paged.admit(0)

    def broken(batch: Any) -> Any:
        paged.model.forward(batch, paged.kv)
        raise RuntimeError("on purpose")

    step = paged.backend.capture(GraphKey(1, 1), broken, paged.slots, paged.spec)
    with pytest.raises(RuntimeError, match="on purpose"):
        step(paged.upload(paged.batch([0], [1]), GraphKey(1, 1)))
    assert paged.logits([0], [PROMPTS[1]])[0].shape == (5, paged.model.vocab_size)


# ---- Memory, errors, choice


def test_weights_are_used_without_a_copy(checkpoint: Path) -> None:
    backend = CpuBackend("bfloat16")
    host = host_tensor(random(4, 8), "bfloat16")
    tensor = backend.tensor(host)
    host.data[:2] = 0
    assert backend.to_host(tensor)[0, 0] == 0


@pytest.mark.skipif(not STATUS.exists(), reason="the system does not say what memory is touched")
def test_layers_of_a_block_are_adjacent_in_memory() -> None:
    """The first token of a block touches one piece of memory, not a huge page for every layer."""

    def resident() -> int:
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) << 10

    backend = CpuBackend(threads=1)
    spec = KVSpec(32, 2, 64, 16, "float32")
    kv, slots = backend.alloc_kv(spec, 512), backend.alloc_slots(SlotSpec(1, 1, 16, 8, 512))
    backend.append_blocks(slots, *np.array([[0], [0], [100]], np.int32))
    batch = backend.upload(host_batch([0], [0], [1]), slots, spec)
    qkv = backend.tensor(random(1, 6 * 64))
    before = resident()
    for layer in range(32):
        backend.to_host(backend.attn_prep(qkv, 2, None, kv, layer, batch))
    assert resident() - before < 8 << 20


def test_wrong_shapes_are_named() -> None:
    backend = CpuBackend()
    weight = backend.linear_weight([host_tensor(random(4, 8))])
    with pytest.raises(ValueError, match=r"x must be \[rows, 8\]"):
        backend.linear(backend.tensor(random(2, 9)), weight)
    with pytest.raises(ValueError, match="parts of a weight differ"):
        backend.linear_weight([host_tensor(random(4, 8)), host_tensor(random(4, 7))])
    with pytest.raises(ValueError, match="invalid literal"):
        backend.set_slot(backend.alloc_slots(SlotSpec(1, 1, 16, 8, 4)), 0, SlotParams(prompt_ids="x"))  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="token id 9"):
        backend.embedding(backend.tensor(np.array([9], np.int32)), backend.tensor(random(4, 8)))


def test_unsupported_dtypes_instruction_sets_and_interfaces_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BackendError, match="int8"):
        CpuBackend("int8")
    with pytest.raises(BackendError, match="instruction set quantum: this CPU and this build have"):
        CpuBackend(isa="quantum")
    monkeypatch.setattr(
        "vllmlite.backends.native.importlib.import_module", lambda name: SimpleNamespace(API=0)
    )
    with pytest.raises(BackendError, match="interface 0, and this is"):
        CpuBackend()


def test_the_native_cpu_backend_is_chosen_before_torch() -> None:
    backend, why = select.select_backend(
        select.BackendRequest(device="cpu", checkpoint_dtype="float16", cpu_isa=ISAS[0], threads=1)
    )
    assert isinstance(backend, CpuBackend)
    assert (backend.dtype, backend.isa, backend.threads) == ("float16", ISAS[0], 1)
    assert why.startswith("cpu on cpu in float16")


def test_usable_cores_are_counted() -> None:
    assert 1 <= usable_cores() == CpuBackend().threads


# ---- Processes


def test_generate_imports_neither_torch_nor_transformers(checkpoint: Path) -> None:
    code = (
        "import json, sys\n"
        "from vllmlite import LLM, SamplingParams\n"
        f"llm = LLM({str(checkpoint)!r}, backend='cpu', skip_tokenizer_init=True)\n"
        "llm.generate([{'prompt_token_ids': [1, 2, 3]}], SamplingParams(max_tokens=3), use_tqdm=False)\n"
        "print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert json.loads(out.splitlines()[-1]) == []


def test_idle_threads_sleep(checkpoint: Path) -> None:
    paged = paged_model(checkpoint, threads=4)
    paged.admit(0)
    paged.logits([0], [PROMPTS[2]])
    assert least_cpu_seconds() < 0.02


def test_threads_are_spread_over_numa_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5, 9, 12}, raising=False)

    def nodes(*lists: str) -> Path:
        root = tmp_path / str(len(lists))
        for index, cpus in enumerate(lists):
            (root / f"node{index}").mkdir(parents=True)
            (root / f"node{index}" / "cpulist").write_text(cpus + "\n")
        return root

    none, one, two = nodes(), nodes("0-15"), nodes("0-5,8", "9-15")
    three = nodes("", "0-1,64-70", "2-5,9-12")
    assert thread_places(3, none) == thread_places(3, one) == [[], [], []]
    first, second = [0, 1, 2, 3, 4, 5], [9, 12]
    assert thread_places(8, two) == [first] * 6 + [second] * 2
    assert thread_places(4, two) == [first] * 3 + [second]
    assert thread_places(16, two) == [first] * 12 + [second] * 4
    assert thread_places(4, three) == [[0, 1]] + [[2, 3, 4, 5, 9, 12]] * 3
    (two / "node1" / "cpulist").write_text("nonsense")
    assert thread_places(2, two) == [[], []]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux alone")
def test_threads_run_on_the_cpus_they_are_bound_to() -> None:
    cpu = max(os.sched_getaffinity(0))
    before = {task.name for task in Path("/proc/self/task").iterdir()}
    runtime = _cpu.Runtime("auto", [[], [cpu], []], "float32")
    assert runtime.threads == 3
    made = [task for task in Path("/proc/self/task").iterdir() if task.name not in before]
    for _ in range(200):
        found = sorted(os.sched_getaffinity(int(task.name)) for task in made)
        if {cpu} in found:
            break
        time.sleep(0.01)
    everywhere = os.sched_getaffinity(0)
    assert len(made) == 2 and {cpu} in found and everywhere in found
