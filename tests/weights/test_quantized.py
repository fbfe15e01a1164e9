"""8- and 4-bit weights: layout, native against reference results, accuracy, and checkpoints that hold them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from gguf_files import random_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from op_backends import HAS_TORCH, of_torch
from paged import PagedModel, host_tensor

from vllmlite.backends.base import Backend
from vllmlite.backends.cpu import CpuBackend
from vllmlite.cli import main
from vllmlite.config.engine_config import QUANTIZATIONS, EngineConfig
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.hub import BUILT_IN
from vllmlite.models import load_model, open_model, read_spec
from vllmlite.quantize import quantize_checkpoint
from vllmlite.sampling_params import SamplingParams
from vllmlite.weights.host import HostTensor, PackedWeight, Scheme
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import HEAD
from vllmlite.weights.safetensors import read_safetensors, write_safetensors
from vllmlite.weights.schemes.gguf_blocks import BLOCK_SCHEMES, BlockScheme
from vllmlite.weights.schemes.grouped import GroupedScheme
from vllmlite.weights.schemes.tiles import GROUP, QWEIGHT, SCALES, TILE_ROWS, TILES, quantize

if TYPE_CHECKING:
    from vllmlite import LLM

_cpu: Any = pytest.importorskip("vllmlite._cpu", reason="vllmlite._cpu is not built")

ISAS: list[str] = _cpu.instruction_sets()
each_kind = pytest.mark.parametrize("kind", QUANTIZATIONS)
each_isa = pytest.mark.parametrize("isa", ISAS)
of_text = pytest.mark.skipif(find_spec("tokenizers") is None, reason="tokenizers is not installed")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

Array = NDArray[Any]


def engine(**options: Any) -> LLM:
    from vllmlite import LLM

    return LLM(backend="cpu", **options)


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x as a product rounds it: 8 bits in groups of a row, with float32 scales."""
    groups = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)
    extremes = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    inverse = np.divide(-128, extremes, out=np.zeros_like(extremes), where=extremes != 0)
    codes = np.clip(np.rint(groups * inverse), -128, 127)
    return (codes * (extremes / -128)).reshape(len(x), -1)[:, : x.shape[1]].astype(np.float32)


def stored(weight: PackedWeight) -> tuple[bytes, bytes]:
    return weight.parts[QWEIGHT].data.tobytes(), weight.parts[SCALES].data.tobytes()


def dequantize(weight: PackedWeight) -> NDArray[np.float32]:
    return weight.scheme.dequantize(weight)


# ---- The layout


def test_the_layout_is_the_documented_one() -> None:
    weight = np.zeros((TILE_ROWS + 1, GROUP + 8), np.float32)
    weight[0, :4] = [-128, 1, 2, 3]
    weight[TILE_ROWS, GROUP + 5] = -128 * 0.5
    made = quantize(weight, "int8")
    codes = made.parts[QWEIGHT].data.reshape(2, 2, GROUP // 4, TILE_ROWS, 4)
    assert codes[0, 0, 0, 0].tolist() == [0, 129, 130, 131]
    assert codes[1, 1, 1, 0].tolist() == [128, 0, 128, 128]
    assert (np.sort(codes.reshape(-1))[[0, 1, 2, -1]] == [0, 0, 128, 131]).all()
    scales = made.parts[SCALES].data.view("<u2").reshape(2, 2, TILE_ROWS)
    assert scales[0, 0, 0] == 0x3F80 and scales[1, 1, 0] == 0x3F00 and np.count_nonzero(scales) == 2

    nibbles = np.zeros((1, GROUP), np.float32)
    nibbles[0, :8] = [-8, 1, 2, 3, 4, 5, 6, 7]
    made = quantize(nibbles, "int4")
    assert made.parts[SCALES].data.view("<u2")[0] == 0x3F80
    pairs = made.parts[QWEIGHT].data.reshape(GROUP // 8, TILE_ROWS, 4)
    assert pairs[0, 0].tolist() == [
        low + 8 | (high + 8) << 4 for low, high in zip((-8, 1, 2, 3), (4, 5, 6, 7), strict=True)
    ]
    assert np.delete(pairs.reshape(-1), range(4)).tolist() == [0x88] * (GROUP // 8 * TILE_ROWS * 4 - 4)


@each_kind
def test_sizes(kind: str) -> None:
    made = quantize(random(37, 70), kind)
    assert (made.parts[QWEIGHT].shape, made.parts[SCALES].shape) == (
        (3, 3, 512 if kind == "int8" else 256),
        (3, 3, 16),
    )
    assert TILES[kind].num_bytes((37, 70)) == made.parts[QWEIGHT].data.nbytes + made.parts[SCALES].data.nbytes


@each_kind
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
)
def test_every_element_is_rounded_to_the_nearest_code(
    kind: str, rows: int, columns: int, seed: int, scale: float
) -> None:
    weight = random(rows, columns, seed=seed) * np.float32(scale)
    made = dequantize(quantize(weight, kind))
    assert made.shape == weight.shape
    groups = np.pad(weight, ((0, 0), (0, -columns % GROUP))).reshape(rows, -1, GROUP)
    largest = np.repeat(np.abs(groups).max(-1), GROUP, -1)[:, :columns]
    # Half a step; one and a half for what is as large as the largest and has the other sign; int4's step is fitted.
    assert (np.abs(made - weight) <= largest * (1.6 if kind == "int8" else 1.2) / TILES[kind].zero).all()


def test_eight_bits_err_less_than_four() -> None:
    weight = random(64, 256)
    error = {
        kind: float(np.square(dequantize(quantize(weight, kind)) - weight).mean()) for kind in QUANTIZATIONS
    }
    assert error["int8"] < 3.5e-5 and error["int4"] < 7e-3, error


def test_the_int4_scale_search_reduces_the_error() -> None:
    """The search gives a smaller error than a scale that maps the largest element to -8."""
    weight = random(256, GROUP)
    largest = np.take_along_axis(weight, np.abs(weight).argmax(1, keepdims=True), 1)
    plain = np.clip(np.rint(weight / (largest / -8)), -8, 7) * (largest / -8)
    assert (
        np.square(dequantize(quantize(weight, "int4")) - weight).mean()
        < 0.9 * np.square(plain - weight).mean()
    )


@pytest.mark.parametrize("scheme", [*TILES.values(), *BLOCK_SCHEMES.values()], ids=lambda scheme: scheme.name)
def test_slices_dequantise_to_slices_of_the_whole(scheme: Scheme) -> None:
    whole = packed_in(scheme, 3 * TILE_ROWS + 5, 1024)
    values = dequantize(whole)
    spans = [(2 * TILE_ROWS, 3 * TILE_ROWS), (0, TILE_ROWS), (3 * TILE_ROWS, len(values))]
    rows = scheme.take_rows(whole, spans)
    assert {suffix: (part.shape, part.dtype) for suffix, part in rows.parts.items()} == {
        suffix: (part.shape, part.dtype) for suffix, part in scheme.parts(rows.shape).items()
    }
    np.testing.assert_array_equal(
        dequantize(rows), np.concatenate([values[first:last] for first, last in spans])
    )
    for first, last in ((0, 512), (512, 1024), (256, 768)):
        np.testing.assert_array_equal(
            dequantize(scheme.take_columns(whole, first, last)), values[:, first:last]
        )


def packed_in(scheme: Scheme, rows: int, columns: int) -> PackedWeight:
    """A weight of random codes and scales."""
    generator = np.random.default_rng(0)
    parts = {}
    for suffix, part in scheme.parts((rows, columns)).items():
        data = generator.integers(0, 256, part.num_bytes, np.uint8)
        if isinstance(scheme, BlockScheme):
            data = random_blocks(scheme.name, part.num_bytes // scheme.block_bytes).reshape(-1)
        elif suffix == SCALES:
            data = host_tensor(random(*part.shape), part.dtype).data
        parts[suffix] = HostTensor(part.dtype, part.shape, data)
    return PackedWeight(scheme, (rows, columns), parts)


# ---- Native = reference


@each_kind
@each_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_native_codes_equal_the_references(isa: str, kind: str, dtype: str) -> None:
    backend = CpuBackend(isa=isa, threads=2)
    held = host_tensor(random(53, 333), dtype)
    floats = backend.to_host(backend.tensor(held, "float32"))
    found, expected = backend.quantize(held, kind), quantize(floats, kind)
    if kind == "int8":
        assert stored(found) == stored(expected)
        return
    # Of two scales that fit alike, sums in another order may choose the other.
    assert np.mean(found.parts[SCALES].data.view("<u2") == expected.parts[SCALES].data.view("<u2")) > 0.99
    errors = [np.square(dequantize(one) - floats).sum(dtype=np.float64) for one in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@each_kind
@each_isa
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    parts=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    biased=st.booleans(),
)
def test_a_product_equals_the_reference_and_is_batch_invariant(
    isa: str, kind: str, rows: int, width: int, parts: list[int], biased: bool
) -> None:
    backend = CpuBackend("bfloat16", threads=2, isa=isa, packed=True)
    packed = [quantize(random(out, width, seed=out), kind) for out in parts]
    biases = [random(out, seed=out) for out in parts] if biased else []
    weight = backend.linear_weight(packed, [host_tensor(bias) for bias in biases])
    x = random(rows, width, seed=1)
    together = backend.to_host(backend.linear(backend.tensor(x), weight))
    expected = rounded(x).astype(np.float64) @ np.concatenate([dequantize(part) for part in packed]).T
    if biased:
        expected = expected + np.concatenate(biases)
    np.testing.assert_allclose(together, expected, rtol=0, atol=2e-5 * np.sqrt(width))
    alone = [backend.to_host(backend.linear(backend.tensor(row[None]), weight)) for row in x]
    assert together.tobytes() == np.concatenate(alone).tobytes()


@each_kind
@each_isa
@pytest.mark.parametrize("width", [2048, 4128])
def test_long_products(isa: str, kind: str, width: int) -> None:
    backend = CpuBackend(threads=2, isa=isa, packed=True)
    packed = quantize(random(100, width), kind)
    weight = backend.linear_weight([packed])
    x = random(33, width, seed=1)
    together = backend.to_host(backend.linear(backend.tensor(x), weight))
    np.testing.assert_allclose(
        together, rounded(x).astype(np.float64) @ dequantize(packed).T, rtol=0, atol=2e-3
    )
    for row in (0, 7, 32):
        assert (
            backend.to_host(backend.linear(backend.tensor(x[row : row + 1]), weight)).tobytes()
            == together[row].tobytes()
        )


@each_kind
def test_instruction_sets_agree_to_rounding(kind: str) -> None:
    """Integer sums are exact everywhere; only sums over groups are in floats, with or without fused multiply-add."""
    packed, x = quantize(random(40, 200), kind), random(9, 200, seed=1)
    found = []
    for isa in ISAS:
        backend = CpuBackend(isa=isa, packed=True)
        found.append(backend.to_host(backend.linear(backend.tensor(x), backend.linear_weight([packed]))))
    for one in found:
        np.testing.assert_allclose(one, found[0], rtol=0, atol=1e-5)


def torch_backend(dtype: str) -> Backend:
    from vllmlite.backends.torch import TorchBackend

    return TorchBackend("cpu", dtype)


@of_torch
@each_kind
def test_the_torch_reference_computes_the_same(kind: str) -> None:
    x, packed = random(5, 100), quantize(random(50, 100, seed=1), kind)
    for dtype, atol in (("float32", 1e-4), ("bfloat16", 0.4)):
        backend = torch_backend(dtype)
        weight = backend.linear_weight([packed], [host_tensor(random(50, seed=2))])
        found = backend.to_host(backend.linear(backend.tensor(x, dtype), weight))
        np.testing.assert_allclose(
            found, rounded(x) @ dequantize(packed).T + random(50, seed=2), rtol=0, atol=atol
        )


def backends() -> list[Backend]:
    return [CpuBackend(packed=True), *([torch_backend("float32")] if HAS_TORCH else [])]


def test_zero_weights_and_inputs_without_rows() -> None:
    for kind in QUANTIZATIONS:
        for backend in backends():
            weight = backend.linear_weight(
                [backend.quantize(host_tensor(np.zeros((20, 40), np.float32)), kind)]
            )
            assert not backend.to_host(backend.linear(backend.tensor(random(3, 40)), weight)).any()
            weight = backend.linear_weight([backend.quantize(host_tensor(random(20, 40)), kind)])
            assert not backend.to_host(
                backend.linear(backend.tensor(np.zeros((3, 40), np.float32)), weight)
            ).any()
            assert backend.to_host(
                backend.linear(backend.tensor(np.zeros((0, 40), np.float32)), weight)
            ).shape == (0, 20)


@each_isa
def test_nan_inputs_stay_nan(isa: str) -> None:
    backend = CpuBackend(isa=isa, packed=True)
    weight = backend.linear_weight([quantize(random(20, 70), "int8")])
    x = random(3, 70)
    x[1, 40] = np.nan
    found = backend.to_host(backend.linear(backend.tensor(x), weight))
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()


# ---- Bad input


@each_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(kind: str, bad: float) -> None:
    weight = random(20, 70)
    weight[13, 65] = bad
    for backend in backends():
        with pytest.raises(ModelError, match=r"\[20, 70\].*not finite"):
            backend.quantize(host_tensor(weight), kind)


def test_packed_and_float_parts_are_not_mixed() -> None:
    for backend in backends():
        with pytest.raises(BackendError, match=r"a weight \[16, 32\] of float32 beside packed ones"):
            backend.linear_weight([quantize(random(16, 32), "int4"), host_tensor(random(16, 32))])


def test_quantised_values_and_scales_must_fit() -> None:
    backend = CpuBackend(packed=True)
    made = quantize(random(16, 64), "int8")
    short = replace(made, shape=(16, 96))
    with pytest.raises(ValueError, match=r"qweight must be uint8\[1, 3, 512\], not uint8\[1, 2, 512\]"):
        backend.linear_weight([short])
    other = replace(made, parts={**made.parts, SCALES: quantize(random(16, 32), "int8").parts[SCALES]})
    with pytest.raises(ValueError, match="scales must be"):
        backend.linear_weight([other])
    weight = backend.linear_weight([made])
    with pytest.raises(ValueError, match=r"\[rows, 64\]"):
        backend.linear(backend.tensor(random(2, 65)), weight)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ParameterError, match="must be int8, int4, auto-round, awq"):
        EngineConfig(quantization="int3")


# ---- Models


@of_torch
@each_kind
def test_native_logits_equal_the_references(kind: str) -> None:
    tokens = np.arange(100, 160, dtype=np.int32)
    found = []
    for backend in backends():
        packing = Packing(backend, kind)
        model = load_model(backend, BUILT_IN, max_model_len=128, block_size=16, packing=packing)
        paged = PagedModel(model, num_blocks=16, max_slots=2)
        paged.admit(0)
        found.append(paged.logits([0], [tokens])[0])
    assert np.square(found[0] - found[1]).mean() < 0.02 * found[1].var()


@of_text
@each_kind
def test_scheduling_does_not_change_the_output(kind: str) -> None:
    prompts = ["The package manager", "Debian is", "The kernel " * 20, "The kernel " * 20 + "is the part"]

    def texts(**options: Any) -> list[str]:
        defaults: dict[str, Any] = {"quantization": kind, "max_model_len": 256}
        llm = engine(**defaults | options)
        return [output.outputs[0].text for output in llm.generate(prompts, GREEDY, use_tqdm=False)]

    alone = texts(max_num_seqs=1, enable_prefix_caching=False)
    assert texts() == alone
    assert texts(max_num_batched_tokens=16) == alone
    assert texts(num_gpu_blocks_override=9, max_model_len=128) == alone
    assert texts(cpu_isa=ISAS[-1], enforce_eager=True) == alone


# ---- Checkpoints


def texts(path: Path | None, **options: Any) -> list[str]:
    llm = engine(model=None if path is None else str(path), max_model_len=128, **options)
    prompts = ["Debian is", "The kernel", "A"]
    return [output.outputs[0].text for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


@of_text
@each_kind
def test_a_saved_checkpoint_equals_quantising_at_load(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--quantization", kind, "--output", str(tmp_path / "deep" / "saved")]) == 0
    assert f"MB in {kind}" in capsys.readouterr().out
    saved = tmp_path / "deep" / "saved"
    assert {file.name for file in saved.iterdir()} == {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert texts(saved) == texts(saved, quantization=kind) == texts(None, quantization=kind)
    other = "int4" if kind == "int8" else "int8"
    with pytest.raises(ParameterError, match=f"quantization='{other}'.*in {kind} already"):
        texts(saved, quantization=other)


@each_kind
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_every_family_and_sharded_sources(kind: str, family: str, tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "source", family, tie_word_embeddings=family == "Qwen3", max_shard_size="60KB"
    )
    assert (tmp_path / "source" / "model.safetensors.index.json").exists()
    quantize_checkpoint(tmp_path / "source", tmp_path / "saved", kind)
    assert not (tmp_path / "saved" / "model.safetensors.index.json").exists()
    tokens = np.arange(40, dtype=np.int32)
    found = []
    for path in (tmp_path / "source", tmp_path / "saved"):
        packing = Packing(CpuBackend(packed=True), kind)
        model = load_model(packing.backend, path, max_model_len=64, block_size=16, packing=packing)
        paged = PagedModel(model, num_blocks=8, max_slots=2, max_context=64)
        paged.admit(0)
        found.append(paged.logits([0], [tokens])[0])
    assert found[0].tobytes() == found[1].tobytes()


@of_torch
@each_kind
def test_a_backend_without_the_scheme_dequantises_at_load(kind: str, tmp_path: Path) -> None:
    """The logits equal those of a float checkpoint with the dequantised values."""
    write_checkpoint(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "saved", kind)
    backend = torch_backend("float32")
    backend.schemes = frozenset()
    packing = Packing(backend)
    assert packing.treatment(TILES[kind]) == "dequantised to float32"
    model = load_model(backend, tmp_path / "saved", max_model_len=64, block_size=16, packing=packing)
    weights = open_model(tmp_path / "saved", read_spec(tmp_path / "saved"), packing)
    assert all(isinstance(weights.products([name])[0], HostTensor) for name in ("0.q.weight", "head.weight"))
    paged = PagedModel(model, num_blocks=8, max_slots=2, max_context=64)
    paged.admit(0)
    found = paged.logits([0], [np.arange(40, dtype=np.int32)])[0]
    packed = load_model(CpuBackend(packed=True), tmp_path / "saved", max_model_len=64, block_size=16)
    kept = PagedModel(packed, num_blocks=8, max_slots=2, max_context=64)
    kept.admit(0)
    expected = kept.logits([0], [np.arange(40, dtype=np.int32)])[0]
    assert np.square(found - expected).mean() < 0.01 * expected.var()


def test_weights_are_used_in_place(tmp_path: Path) -> None:
    """The codes of a saved checkpoint are aligned to 64 bytes in its file, whatever the header's length."""
    for layers in (1, 2, 3):
        write_checkpoint(tmp_path / f"source{layers}", num_hidden_layers=layers)
        quantize_checkpoint(tmp_path / f"source{layers}", tmp_path / f"saved{layers}", "int8")
        data = (tmp_path / f"saved{layers}" / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        begins = [entry["data_offsets"][0] for name, entry in header.items() if name.endswith(".qweight")]
        assert len(begins) == 7 * layers + 1
        assert all((8 + length + begin) % 64 == 0 for begin in begins)


def test_a_failed_quantise_leaves_no_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", dtype="float32")
    quantize_checkpoint(tmp_path / "source", tmp_path / "saved", "int8")
    with pytest.raises(ParameterError, match=r"output=.*exists"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "saved", "int8")
    with pytest.raises(ModelError, match="int8 already"):
        quantize_checkpoint(tmp_path / "saved", tmp_path / "again", "int4")
    file = tmp_path / "source" / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.1.self_attn.o_proj.weight"
    end = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][1]
    data[end - 4 : end] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    with pytest.raises(ModelError, match=f"{name}.*not finite"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "broken", "int8")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "saved"}


def edited(path: Path, **changes: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "aqlm"}, "quant_method='aqlm'; accepted: auto-round, awq"),
        ({}, None),
        ({"format": "int8"}, "quant_method is absent"),
        ({"quant_method": "vllmlite", "group_size": 64, "format": "int8"}, "group_size=64; accepted: 32"),
        (
            {"quant_method": "vllmlite", "group_size": 32, "format": "int2"},
            "format='int2'; accepted: int8, int4",
        ),
        ("int8", "an object"),
    ],
)
def test_the_quantisation_section_of_a_config_is_read(
    section: Any, words: str | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path)
    edited(tmp_path, quantization_config=section)
    if words is None:
        assert read_spec(tmp_path).quantization is None
        return
    with pytest.raises(ModelError, match=words):
        read_spec(tmp_path)


def test_a_checkpoint_must_hold_what_its_config_says(tmp_path: Path) -> None:
    """All parts of a quantised weight, or the weight as floats."""
    write_checkpoint(tmp_path / "floats")
    quantize_checkpoint(tmp_path / "floats", tmp_path / "saved", "int8")
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    edited(tmp_path / "floats", quantization_config=section)
    load_model(CpuBackend(), tmp_path / "floats", max_model_len=64, block_size=16)
    tensors = read_safetensors(tmp_path / "saved" / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.scales"]
    (tmp_path / "saved" / "model.safetensors").unlink()
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "saved" / "model.safetensors", tensors.values(), layout)
    with pytest.raises(ModelError, match=r"missing.*q_proj.scales"):
        load_model(CpuBackend(), tmp_path / "saved", max_model_len=64, block_size=16)


def test_dummy_weights_are_quantised_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    llm = engine(model=str(tmp_path), load_format="dummy", quantization="int4", skip_tokenizer_init=True)
    (output,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 24


def test_dummy_weights_of_a_packed_checkpoint_are_packed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    backend = CpuBackend()
    backend.schemes = frozenset({"w4a16"})
    weights = open_model(tmp_path, read_spec(tmp_path), Packing(backend), "dummy")
    names = [name for name, source in weights.sources.items() if source.product and name != HEAD]
    for part in weights.products(names):
        assert isinstance(part, PackedWeight) and part.scheme == GroupedScheme(4, 32, False)
        values = part.scheme.dequantize(part)
        assert np.isfinite(values).all() and 0.01 < values.std() < 0.04


def test_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["quantize", "--output", str(tmp_path)]) == 2
    assert "--quantization" in capsys.readouterr().err
    assert main(["quantize", "--quantization", "int8", "--output", str(tmp_path), "--threads", "0"]) == 2
    assert main(["quantize", "--quantization", "int8", "--output", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
