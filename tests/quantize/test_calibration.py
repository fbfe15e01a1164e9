"""GPTQ and AWQ: smaller errors than rounding to nearest, folding that changes no result, and resumed runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from model_runs import first_logits, float32_backend
from quantize_families import FAMILIES, checkpoint

import vllmlite.quantize.checkpoint as writing
from vllmlite.errors import ParameterError
from vllmlite.models import open_model, read_spec
from vllmlite.quantize import quantize_checkpoint
from vllmlite.quantize.awq import fold_factors, folds
from vllmlite.quantize.calibration import Calibration, Moments
from vllmlite.quantize.gptq import DAMPING, Inputs, gptq
from vllmlite.quantize.rounding import Grid, channel_error, nearest
from vllmlite.weights.host import float_tensor, float_values
from vllmlite.weights.packing import Packing
from vllmlite.weights.schemes.awq import AwqScheme
from vllmlite.weights.schemes.gptq import GptqScheme

TOKENS = np.tile(np.arange(40, dtype=np.int32), 15)
SYMMETRIC = Grid(4, 32, True, GptqScheme(4, 32, True, 1))
ASYMMETRIC = Grid(4, 32, False, AwqScheme(32))


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace calibration text by tokens, because the tiny checkpoints have no tokenizer."""
    monkeypatch.setattr(writing, "calibration_tokens", lambda *_: TOKENS)


def correlated(rows: int, columns: int) -> Any:
    """Return correlated inputs, as those of models are; a few channels are large."""
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(rows, 16)) @ rng.normal(size=(16, columns)) + 0.3 * rng.normal(
        size=(rows, columns)
    )
    return (mixed * np.where(np.arange(columns) % 17 == 0, 8, 1)).astype(np.float32)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC, Grid(4, 256, True, GptqScheme(4, None, True, 1))])
def test_gptq_has_a_smaller_error_than_rounding_to_nearest(grid: Grid, act_order: bool) -> None:
    weight = np.random.default_rng(2).normal(size=(48, 256)).astype(np.float32)
    inputs = correlated(1000, 256)
    gram = inputs.T @ inputs
    found = gptq(weight, grid, Inputs.of(gram, act_order))
    errors = [channel_error(weight, one.values(), gram) for one in (found, nearest(weight, grid))]
    assert errors[0] < 0.5 * errors[1]
    assert found.codes.max() <= 15


@pytest.mark.parametrize("size", [5, 128, 300])
def test_the_factor_is_that_of_the_inverse(size: int) -> None:
    inputs = correlated(1000, size)
    gram = inputs.T @ inputs
    factor = Inputs.of(gram).factor.astype(np.float64)
    damped = gram + DAMPING * np.diagonal(gram).mean() * np.eye(size)
    assert not np.tril(factor, -1).any() and (np.diagonal(factor) > 0).all()
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(size), atol=1e-4)


@pytest.mark.usefixtures("tokens")
def test_products_with_the_same_inputs_share_a_factor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v do, and gate and up."""
    source, count, make = checkpoint(tmp_path / "source", "dense"), 0, Inputs.of

    def counted(*given: Any) -> Inputs:
        nonlocal count
        count += 1
        return make(*given)

    monkeypatch.setattr(Inputs, "of", counted)
    quantize_checkpoint(source, tmp_path / "made", "gptq", method="gptq", group_size=32)
    assert count == 4 * read_spec(source).num_layers


def test_gptq_rounds_weights_of_inputs_that_are_always_zero_to_nearest() -> None:
    weight = np.random.default_rng(2).normal(size=(16, 64)).astype(np.float32)
    inputs = correlated(100, 64)
    inputs[:, 32:] = 0
    found = gptq(weight, SYMMETRIC, Inputs.of(inputs.T @ inputs))
    assert np.abs(found.values() - weight)[:, 32:].max() < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_does_not_change_the_result_of_a_layer(family: str, tmp_path: Path) -> None:
    """Norm weights are stored in bfloat16; the other weights compensate for their rounding."""
    source = checkpoint(tmp_path / "source", family)
    spec, backend = read_spec(source), float32_backend()
    weights = open_model(source, spec, Packing(backend))
    calibration = Calibration(spec, backend, len(TOKENS))
    tensors = {
        name: float_tensor(float_values(weights.floats(name)), "float32")
        for name in weights.sources
        if name.startswith("0.")
    }
    hidden = np.random.default_rng(3).normal(size=(40, spec.hidden_size)).astype(np.float32)
    hidden[:, ::13] *= 10
    moments = calibration.measure(0, tensors, hidden)
    expected = calibration.through(0, tensors, hidden)
    grids = {name: ASYMMETRIC for name, one in weights.sources.items() if one.product}
    dtypes = dict.fromkeys(tensors, "bfloat16")
    changed = fold_factors(tensors, dtypes, moments, folds(spec, 0, tensors), grids, spec.norm.unit_offset)
    norms = {name for name in changed if name.endswith("norm.weight")}
    assert changed and bool(norms) == (family != "post norms")
    for name in norms:
        values = float_values(tensors[name])
        assert np.array_equal(float_values(float_tensor(values, "bfloat16")), values), name
    found = calibration.through(0, tensors, hidden)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_layers_run_one_by_one_are_the_model(tmp_path: Path) -> None:
    for family in ("dense", "mixture", "post norms", "parallel", "norms less one"):
        source = checkpoint(tmp_path / family, family)
        spec, backend = read_spec(source), float32_backend()
        weights = open_model(source, spec, Packing(backend))
        tensors = {name: weights.floats(name) for name in weights.sources}
        ids = np.arange(40, dtype=np.int32)
        calibration = Calibration(spec, backend, len(ids))
        hidden = calibration.embedded({n: t for n, t in tensors.items() if not n[0].isdigit()}, ids)
        for layer in range(spec.num_layers):
            own = {n: t for n, t in tensors.items() if n.startswith(f"{layer}.")}
            moments = calibration.measure(layer, own, hidden)
            assert {f"{layer}.q.weight", f"{layer}.o.weight"} <= moments.keys()
            assert moments[f"{layer}.q.weight"].rows == 40
            hidden = calibration.through(layer, own, hidden)
        if spec.final_norm:
            mean = hidden.mean(-1, keepdims=True) if spec.norm.kind == "layer" else 0.0
            scale = np.sqrt(np.square(hidden - mean).mean(-1, keepdims=True) + spec.norm.eps)
            offset = 1.0 if spec.norm.unit_offset else 0.0
            hidden = (hidden - mean) / scale * (float_values(tensors["final_norm.weight"]) + offset)
            if "final_norm.bias" in tensors:
                hidden = hidden + float_values(tensors["final_norm.bias"])
        head = float_values(tensors.get("head.weight", tensors["embedding.weight"]))
        expected = first_logits(backend, source)
        np.testing.assert_allclose(hidden @ head.T, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("gptq", "dense"),
        pytest.param("gptq", "mixture", marks=pytest.mark.slow),
        pytest.param("gptq", "fused", marks=pytest.mark.slow),
        pytest.param("awq", "mixture", marks=pytest.mark.slow),
        ("awq", "fused"),
    ],
)
def test_calibrated_checkpoints_are_closer_to_the_floats(method: str, family: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", family)
    form = "awq" if method == "awq" else "gptq"
    errors = []
    expected = first_logits(float32_backend(), source)
    for name in (method, "rtn"):
        report = quantize_checkpoint(source, tmp_path / name, form, method=name, group_size=32)
        assert report.rounded_to_nearest == []
        errors.append(np.square(first_logits(float32_backend(), tmp_path / name) - expected).mean())
    assert errors[0] < errors[1]


@pytest.mark.slow
@pytest.mark.usefixtures("tokens")
def test_experts_without_tokens_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "source", "mixture")

    def unreached(self: Calibration, layer: int, *args: Any) -> dict[str, Moments]:
        moments = measure(self, layer, *args)
        for part in ("gate", "up", "down"):
            name = f"{layer}.experts.2.{part}.weight"
            moments[name] = Moments.of_size(len(moments[name].gram))
        return moments

    measure = Calibration.measure
    monkeypatch.setattr(Calibration, "measure", unreached)

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    for method in ("gptq", "awq"):
        options: dict[str, Any] = {"method": method, "group_size": 32}
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / method, method, show=interrupt, **options)
        report = quantize_checkpoint(source, tmp_path / method, method, **options)
        assert report.resumed_at == 2
        assert report.rounded_to_nearest == [
            f"model.layers.{layer}.block_sparse_moe.experts.2.{part}.weight"
            for layer in range(3)
            for part in ("w1", "w3", "w2")
        ]


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(
    ("method", "layer"),
    [
        pytest.param("gptq", 0, marks=pytest.mark.slow),
        ("gptq", 2),
        pytest.param("awq", 1, marks=pytest.mark.slow),
        ("rtn", 3),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(method: str, layer: int, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "dense")
    options: dict[str, Any] = {"method": method, "group_size": 32}
    quantize_checkpoint(source, tmp_path / "whole", "gptq", **options)

    def interrupt(done: int, total: int) -> None:
        if done == layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "made", "gptq", show=interrupt, **options)
    with pytest.raises(ParameterError, match=r"output=.*other options.*remove it"):
        quantize_checkpoint(
            source, tmp_path / "made", "gptq", act_order=method == "gptq", group_size=64, method=method
        )
    steps: list[int] = []
    report = quantize_checkpoint(
        source, tmp_path / "made", "gptq", show=lambda done, total: steps.append(done), **options
    )
    assert report.resumed_at == layer and steps[0] == layer and steps[-1] == 4
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "made"}


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"word " * 40, "few.txt", "holds [0-9]+ tokens; accepted: at least 512"),
        (b"\xff", "bytes.txt", "cannot be read: is not UTF-8"),
        (None, "none.txt", "cannot be read: No such file"),
        (b'{"text": "one"}\n{"body": "two"}\n', "lines.jsonl", "line 2: accepted: JSON text"),
    ],
)
def test_calibration_text_is_checked(content: bytes | None, name: str, message: str, tmp_path: Path) -> None:
    from vllmlite.hub import BUILT_IN

    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ParameterError, match=f"calibration=.*{message}"):
        quantize_checkpoint(BUILT_IN, tmp_path / "made", "gptq", method="gptq", calibration=tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_of_other_floats_is_kept_in_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", dtype="bfloat16", intermediate_size=128)
    quantize_checkpoint(tmp_path / "source", tmp_path / "made", "gptq", group_size=32)
    spec = read_spec(tmp_path / "made")
    weights = open_model(tmp_path / "made", spec, Packing(float32_backend()))
    assert weights.stored.tensor("model.norm.weight").dtype == "bfloat16"  # type: ignore[union-attr]
