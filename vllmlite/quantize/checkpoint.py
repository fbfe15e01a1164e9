"""Writes a quantised copy of a checkpoint, layer by layer; a run that is interrupted can be continued."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend
from vllmlite.backends.select import BackendRequest, select_backend
from vllmlite.errors import ModelError, ParameterError, VllmliteError
from vllmlite.hub.snapshot import CONFIG_FILES, INDEX
from vllmlite.models import open_model, read_spec
from vllmlite.models.hf_config import HfConfig
from vllmlite.models.quantization_config import parse_quantization
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources, stored_schemes
from vllmlite.quantize.awq import fold_factors, folds
from vllmlite.quantize.calibration import WINDOW, Calibration, Moments
from vllmlite.quantize.formats import FLOAT8_BLOCK, Settings
from vllmlite.quantize.gptq import gptq
from vllmlite.quantize.progress import Progress
from vllmlite.quantize.rounding import Grid, nearest
from vllmlite.quantize.text import calibration_tokens
from vllmlite.weights.checkpoint import part_name
from vllmlite.weights.host import (
    Floats,
    HostTensor,
    HostWeight,
    PackedWeight,
    Scheme,
    float_tensor,
    float_values,
)
from vllmlite.weights.json_object import read_object
from vllmlite.weights.packers import FLOAT8_MAX, packed, packed_float8, written_parts
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import HEAD, TABLE, ModelWeights, Source
from vllmlite.weights.safetensors import Layout
from vllmlite.weights.schemes.float8 import Float8Scheme
from vllmlite.weights.writer import Checkpoint, safetensors_checkpoint

NUM_TOKENS = 32768
"""Tokens of calibration text."""

Tensors = dict[str, HostTensor]


@dataclass(slots=True)
class Report:
    """What became of a checkpoint."""

    directory: Path
    resumed_at: int = 0
    """Layers that an interrupted run had done."""
    rounded_to_nearest: list[str] = field(default_factory=list)
    """Weights that no calibration token reached."""


def quantize_checkpoint(
    source: Path,
    target: Path,
    format: str,
    *,
    method: str = "rtn",
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    act_order: bool = False,
    quantize_head: bool = False,
    calibration: Path | None = None,
    num_tokens: int = NUM_TOKENS,
    threads: int | None = None,
    show: Callable[[int, int], object] | None = None,
) -> Report:
    """Write the checkpoint in directory ``source`` to the new directory ``target``, the weights of its products
    quantised, everything else as it is.

    ``format`` is one of ``FORMATS``, ``method`` one of ``METHODS``; None takes the format's default. ``calibration``: a
    text file for the methods gptq and awq; None: text that the built-in model writes. ``num_tokens`` of it are used.
    ``threads``: of the CPU; None: as many as the process may use. ``show``: is called with the number of steps that are
    done and of all.

    What is written goes to ``target``'s neighbour ``.NAME.partial`` first. It stays there if the run is interrupted or
    the disk is full; the same call then goes on after the last layer that was done, and writes the same bytes.
    ModelError says what is wrong with ``source``, ParameterError with another argument, BackendError that nothing can
    compute."""
    settings = Settings(format, method, bits, group_size, symmetric, act_order, quantize_head)
    if source.is_file():
        raise ModelError(f"{source}: is a GGUF file; accepted: a directory with a checkpoint")
    if method == "rtn" and calibration is not None:
        raise ParameterError("calibration", str(calibration), "accepted with method gptq or awq")
    if not WINDOW <= num_tokens <= 1 << 24:
        raise ParameterError("num_tokens", num_tokens, f"accepted: {WINDOW} to {1 << 24}")
    spec = read_spec(source)
    if spec.quantization is not None:
        raise ModelError(f"{source}: its weights are {spec.quantization.method} already")
    if target.exists():
        raise ParameterError("output", str(target), "exists already: name a new directory")
    backend, _ = select_backend(BackendRequest(device="cpu", dtype="float32", threads=threads))
    weights = open_model(source, spec, Packing(backend))
    plan = _Plan.of(source, spec, weights, settings)
    work = target.parent / f".{target.name}.partial"
    given = [settings, None if calibration is None else str(calibration.resolve()), num_tokens]
    progress = Progress.open(work, source, given)
    report = Report(target, progress.layers, list(progress.rounded_to_nearest))
    try:
        with _Writer(plan, backend, weights, work, progress, report) as writer:
            tokens = None
            if method != "rtn":
                tokens = progress.tokens(lambda: calibration_tokens(source, calibration, num_tokens))
            writer.run(tokens, show or (lambda done, total: None))
        _copy_configuration(source, work, plan)
        progress.finish(target)
    except VllmliteError:
        progress.discard()
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(
            f"{target.parent}: the disk is full; the same command goes on once there is room; otherwise remove {work}"
        ) from error
    return report


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the new checkpoint holds."""

    settings: Settings
    spec: DecoderSpec
    sources: Mapping[str, Source]
    """Of the new checkpoint, by the model's names."""
    schemes: Mapping[str, Scheme]
    """Of its quantised tensors, by its keys."""
    floats: Mapping[str, tuple[str, tuple[int, ...]]]
    """Dtype and shape of its other tensors, by its keys."""
    config: Mapping[str, Any]
    """What its ``config.json`` has beside the source's."""

    @classmethod
    def of(cls, source: Path, spec: DecoderSpec, weights: ModelWeights, settings: Settings) -> _Plan:
        """Plan the checkpoint. Raises ModelError for tensors that the format cannot store."""
        gates = [
            one.key.removesuffix(".weight")
            for name, one in sources(spec).items()
            if name.endswith(("router.weight", "shared_gate.weight"))
        ]
        if not settings.head and spec.keys.head != "lm_head":
            gates.append(spec.keys.head)
        config: dict[str, Any] = {"quantization_config": settings.config(gates)}
        quantization = parse_quantization(HfConfig(config["quantization_config"], "quantization_config"))
        made = replace(spec, quantization=quantization)
        if settings.head and spec.tie_word_embeddings:
            config["tie_word_embeddings"] = False
            made = replace(made, tie_word_embeddings=False)
        held = sources(made)
        if HEAD in weights.sources and HEAD not in held:
            held[HEAD] = weights.sources[HEAD]
        shapes, found = {one.key: one.stored for one in held.values()}, stored_schemes(made)
        schemes = {key: found[key] for key in shapes if key in found}
        for one in held.values():
            if one.key in schemes:
                _check_shape(source, one, schemes[one.key], settings)
        floats = {}
        for key in shapes.keys() - schemes.keys():
            stored = weights.stored.tensor(key)
            assert isinstance(stored, HostTensor)
            floats[key] = stored.dtype, shapes[key]
        ordered = {key: floats[key] for key in shapes if key in floats}
        return cls(settings, spec, held, schemes, ordered, config)

    def layout(self) -> Layout:
        """Dtype and shape of every tensor that is written."""
        shapes = {one.key: one.stored for one in self.sources.values()}
        parts = {
            part_name(key, suffix): (part.dtype, part.shape)
            for key, scheme in self.schemes.items()
            for suffix, part in written_parts(scheme, shapes[key]).items()
        }
        return {**parts, **self.floats}

    def keys(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The keys of the new checkpoint that hold the tensors ``names``, and which of these each holds."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.sources[name].key, []).append(name)
        return found


class _Writer:
    """Quantises and writes one step after the other: what belongs to no layer, and each layer."""

    def __init__(
        self,
        plan: _Plan,
        backend: Backend,
        weights: ModelWeights,
        work: Path,
        progress: Progress,
        report: Report,
    ) -> None:
        self.plan, self.backend, self.weights = plan, backend, weights
        self.progress, self.report = progress, report
        self.out: Checkpoint = safetensors_checkpoint(work, plan.layout())

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.out.close()

    def run(self, tokens: NDArray[np.int32] | None, show: Callable[[int, int], object]) -> None:
        """Do every step that is left. ``tokens``: of the calibration text, if there is one."""
        spec = self.plan.spec
        outside = [name for name in self.plan.sources if not name[0].isdigit()]
        calibration = hidden = None
        if tokens is not None:
            if spec.embedding_size is not None:
                raise ModelError("embeddings that are projected to another size: accepted with method rtn")
            calibration = Calibration(spec, self.backend, len(tokens))
            hidden = self.progress.hidden()
            if hidden is None:
                held = {name: self._float(name) for name in outside if name in self.weights.sources}
                hidden = calibration.embedded(held, tokens)
        for step in range(self.progress.layers, spec.num_layers):
            show(step, spec.num_layers + 1)
            prefix = f"{step}."
            names = [name for name in self.plan.sources if name.startswith(prefix)]
            hidden = self._layer(step, names, calibration, hidden)
            self.out.flush()
            self.progress.done(step + 1, hidden, self.report.rounded_to_nearest)
        show(spec.num_layers, spec.num_layers + 1)
        self._write({name: self._float(name) for name in outside}, {}, set())
        self.out.flush()
        show(spec.num_layers + 1, spec.num_layers + 1)

    def _layer(
        self, layer: int, names: Sequence[str], calibration: Calibration | None, hidden: Floats | None
    ) -> Floats | None:
        tensors = {name: self._float(name) for name in names}
        if calibration is None or hidden is None:
            self._write(tensors, {}, set())
            return None
        moments = calibration.measure(layer, tensors, hidden)
        self._name_unreached(moments)
        changed: set[str] = set()
        if self.plan.settings.method == "awq":
            grids = {
                name: self._grid(self.plan.sources[name], self.plan.schemes[self.plan.sources[name].key])
                for name in names
                if self.plan.sources[name].product
            }
            dtypes = {
                name: self.plan.floats[self.plan.sources[name].key][0]
                for name in names
                if self.plan.sources[name].key in self.plan.floats
            }
            places = folds(self.plan.spec, layer, tensors)
            changed = fold_factors(tensors, dtypes, moments, places, grids, self.plan.spec.norm.unit_offset)
        return calibration.through(layer, self._write(tensors, moments, changed), hidden)

    def _name_unreached(self, moments: Mapping[str, Moments]) -> None:
        for name, one in moments.items():
            if not np.isfinite(one.gram).all():
                raise ModelError(
                    f"tensor {self.plan.sources[name].key!r}: its inputs are not finite on the calibration text"
                )
            if not one.rows and self.plan.sources[name].product:
                self.report.rounded_to_nearest.append(self.plan.sources[name].key)

    def _float(self, name: str) -> HostTensor:
        own = name if name in self.weights.sources else TABLE
        return float_tensor(float_values(self.weights.floats(own)), "float32")

    def _write(
        self, tensors: Mapping[str, HostTensor], moments: Mapping[str, Moments], changed: set[str]
    ) -> Tensors:
        """Write the keys that hold ``tensors``, and return these as they are written. ``changed``: names of those that
        are not as they are stored."""
        written: Tensors = {}
        for key, names in self.plan.keys(list(tensors)).items():
            own = [(self.plan.sources[name], tensors[name]) for name in names]
            if key not in self.plan.schemes:
                stored = self.weights.stored.tensor(key)
                assert isinstance(stored, HostTensor)
                if changed.intersection(names):
                    stored = float_tensor(_assembled(own), stored.dtype)
                self.out.write(key, stored)
                meant: HostWeight = stored
            else:
                try:
                    weight = self._quantized(own[0][0], _assembled(own), moments.get(names[0]))
                except ModelError as error:
                    raise ModelError(f"tensor {key!r}: {error}") from error
                for suffix, part in weight.parts.items():
                    self.out.write(part_name(key, suffix), part)
                if not moments:
                    continue
                meant = float_tensor(weight.scheme.dequantize(weight), "float32")
            for name in names:
                taken = self.plan.sources[name].take(meant)
                assert isinstance(taken, HostTensor)
                written[name] = float_tensor(float_values(taken), "float32")
        return written

    def _quantized(self, source: Source, weight: Floats, moments: Moments | None) -> PackedWeight:
        settings, scheme = self.plan.settings, self.plan.schemes[source.key]
        if not np.isfinite(weight).all():
            raise ModelError("values that are not finite cannot be quantised")
        if settings.own:
            return self.backend.quantize(float_tensor(weight, "float32"), settings.format)
        if isinstance(scheme, Float8Scheme):
            return packed_float8(weight, _block_scales(weight), scheme)
        grid = self._grid(source, scheme)
        if moments is None or not moments.rows:
            return packed(nearest(weight, grid), scheme)
        if settings.method == "gptq":
            return packed(gptq(weight, grid, moments.gram, act_order=settings.act_order), scheme)
        return packed(nearest(weight, grid, moments.gram), scheme)

    def _grid(self, source: Source, scheme: Scheme) -> Grid:
        settings = self.plan.settings
        assert (
            settings.bits is not None and settings.group_size is not None and settings.symmetric is not None
        )
        size = source.stored[1] if settings.group_size == -1 else settings.group_size
        return Grid(settings.bits, size, settings.symmetric, scheme)


def _assembled(parts: Sequence[tuple[Source, HostTensor]]) -> Floats:
    """The stored tensor, float32, of which the model's tensors are ``parts``."""
    first, tensor = parts[0]
    if first.rows is None:
        return float_values(tensor)
    whole = np.empty(first.stored, np.float32)
    for source, tensor in parts:
        values, begin = float_values(tensor), 0
        for span in source.rows or ():
            count = span[1] - span[0]
            whole[slice(*span)] = values[begin : begin + count]
            begin += count
    return whole


def _block_scales(weight: Floats) -> Floats:
    """The scale of each block of 128 rows and columns."""
    rows, columns = weight.shape
    size = FLOAT8_BLOCK
    padded = np.pad(np.abs(weight), ((0, -rows % size), (0, -columns % size)))
    largest = padded.reshape(padded.shape[0] // size, size, -1, size).max((1, 3))
    return np.where(largest > 0, largest / FLOAT8_MAX, 1).astype(np.float32)


def _check_shape(path: Path, source: Source, scheme: Scheme, settings: Settings) -> None:
    """Raise an error that names the tensor if ``scheme`` cannot store it, or cannot be sliced into the fused parts."""
    key, shape, size = source.key, source.stored, settings.group_size or -1
    if not settings.own and not isinstance(scheme, Float8Scheme) and size > 0 and shape[1] % size:
        fitting = [str(one) for one in (128, 64, 32) if shape[1] % one == 0]
        raise ParameterError(
            "group_size",
            size,
            f"accepted for {key}, whose rows have {shape[1]} elements: {', '.join([*fitting, '-1'])}",
        )
    try:
        written_parts(scheme, shape)
    except ModelError as error:
        raise ModelError(f"{path}: tensor {key!r}: {error}") from error
    bounds = [bound for span in source.rows or () for bound in span]
    if any(bound % scheme.row_unit and bound != shape[0] for bound in bounds):
        raise ModelError(
            f"{path}: tensor {key!r}: its fused parts begin at rows {bounds[::2]}; accepted in {settings.format}: "
            f"multiples of {scheme.row_unit}"
        )


def _copy_configuration(source: Path, target: Path, plan: _Plan) -> None:
    for pattern in CONFIG_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name != INDEX:
                shutil.copyfile(file, target / file.name)
    config = read_object(source / "config.json") | dict(plan.config)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
