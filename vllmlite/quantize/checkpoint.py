"""Write a quantised copy of a checkpoint, layer by layer; a run that is interrupted can be continued."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.select import BackendRequest, select_backend
from vllmlite.errors import ModelError, ParameterError, VllmliteError
from vllmlite.models import open_model, read_spec
from vllmlite.quantize.awq import fold_factors, folds
from vllmlite.quantize.calibration import WINDOW, Calibration, Moments
from vllmlite.quantize.directory import DirectoryOutput
from vllmlite.quantize.formats import Settings
from vllmlite.quantize.gguf import GgufOutput
from vllmlite.quantize.output import Output
from vllmlite.quantize.progress import Progress
from vllmlite.quantize.text import calibration_tokens
from vllmlite.weights.host import Floats, HostTensor, float_tensor, float_values
from vllmlite.weights.packing import Packing
from vllmlite.weights.parts import TABLE

NUM_TOKENS = 32768
"""Default number of tokens of calibration text."""


@dataclass(slots=True)
class Report:
    """The result of :func:`quantize_checkpoint`."""

    target: Path
    """The new directory, or GGUF file."""
    resumed_at: int = 0
    """Number of layers that an earlier, interrupted run had already quantised."""
    rounded_to_nearest: list[str] = field(default_factory=list)
    """Names of the weights that no calibration token reached, which were therefore rounded to nearest."""


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
    """Quantise the weight matrices of the checkpoint in directory ``source``, and write it to the new directory
    ``target``; formats of GGUF write the new file ``target``. Other tensors are not changed.

    ``format`` is one of ``FORMATS``, ``method`` one of ``METHODS``; None takes the format's default. ``calibration`` is
    a text file for the methods gptq and awq, of which ``num_tokens`` tokens are used; None: text that the built-in
    model generates. ``threads``: CPU threads; None: as many as the process may use. ``show`` is called with the number
    of steps that are done and the number of all steps.

    Files are written to ``.NAME.partial`` beside ``target`` first. They stay there if the run is interrupted or the
    disk is full; the same call then continues after the last finished layer, and writes the same bytes. Raises
    ModelError for a wrong ``source``, ParameterError for other arguments, BackendError if no backend can compute."""
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
        raise ParameterError("output", str(target), f"exists already: name a new {settings.kind}")
    if settings.gguf != (target.suffix == ".gguf"):
        raise ParameterError("output", str(target), f"accepted with {format}: the name of a {settings.kind}")
    backend, _ = select_backend(BackendRequest(device="cpu", dtype="float32", threads=threads))
    weights = open_model(source, spec, Packing(backend))
    kind = GgufOutput if settings.gguf else DirectoryOutput
    output = kind(source, spec, weights, settings, backend)
    work = target.parent / f".{target.name}.partial"
    given = [settings, None if calibration is None else str(calibration.resolve()), num_tokens]
    progress = Progress.open(work, source, given)
    report = Report(target, progress.layers, list(progress.rounded_to_nearest))
    try:
        with closing(output):
            output.open(work)
            tokens = None
            if method != "rtn":
                tokens = progress.tokens(lambda: calibration_tokens(source, calibration, num_tokens))
            _Writer(output, progress, report).run(tokens, show or (lambda done, total: None))
        progress.finish(output.finish(work), target)
    except VllmliteError:
        progress.discard()
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(
            f"{target.parent}: the disk is full: repeat the command once there is space, to continue, or remove {work}"
        ) from error
    return report


class _Writer:
    """Quantises and writes a checkpoint in steps: each layer, then the tensors that belong to no layer."""

    def __init__(self, output: Output, progress: Progress, report: Report) -> None:
        self.output, self.progress, self.report = output, progress, report
        self.spec, self.weights = output.spec, output.weights

    def run(self, tokens: NDArray[np.int32] | None, show: Callable[[int, int], object]) -> None:
        """Run all remaining steps. ``tokens`` is the calibration text, if there is one; ``show`` is called with the
        number of finished steps and of all steps."""
        spec, written = self.spec, self.output.written
        outside = [name for name in self.output.sources if not name[0].isdigit()]
        calibration = hidden = None
        if tokens is not None:
            if spec.embedding_size is not None:
                raise ModelError("embeddings that are projected to another size: accepted with method rtn")
            calibration = Calibration(spec, self.output.backend, len(tokens))
            hidden = self.progress.hidden()
            if hidden is None:
                held = {name: self._float(name) for name in outside if name in self.weights.sources}
                hidden = calibration.embedded(held, tokens)
        for step in range(self.progress.layers, spec.num_layers):
            show(step, spec.num_layers + 1)
            prefix = f"{step}."
            names = [name for name in self.output.sources if name.startswith(prefix)]
            hidden = self._layer(step, names, calibration, hidden)
            written.flush()
            self.progress.done(step + 1, hidden, self.report.rounded_to_nearest)
        show(spec.num_layers, spec.num_layers + 1)
        for names in self.output.keys(outside).values():
            self.output.write({name: self._float(name) for name in names}, {}, set())
        written.flush()
        show(spec.num_layers + 1, spec.num_layers + 1)

    def _layer(
        self, layer: int, names: Sequence[str], calibration: Calibration | None, hidden: Floats | None
    ) -> Floats | None:
        output, spec = self.output, self.spec
        tensors = {name: self._float(name) for name in names}
        if calibration is None or hidden is None:
            output.write(tensors, {}, set())
            return None
        moments = calibration.measure(layer, tensors, hidden)
        self._name_unreached(moments)
        changed: set[str] = set()
        if output.settings.method == "awq":
            keys = {name: output.sources[name].key for name in names}
            dtypes = {name: output.dtypes[key] for name, key in keys.items() if key in output.dtypes}
            places = folds(spec, layer, tensors)
            changed = fold_factors(
                tensors, dtypes, moments, places, output.grids(names), spec.norm.unit_offset
            )
        return calibration.through(layer, output.write(tensors, moments, changed), hidden)

    def _name_unreached(self, moments: Mapping[str, Moments]) -> None:
        for name, one in moments.items():
            source = self.output.sources[name]
            if not np.isfinite(one.gram).all():
                raise ModelError(f"tensor {source.key!r}: its inputs are not finite on the calibration text")
            if not one.rows and source.product:
                self.report.rounded_to_nearest.append(self.weights.sources[name].key)

    def _float(self, name: str) -> HostTensor:
        own = name if name in self.weights.sources else TABLE
        return float_tensor(float_values(self.weights.floats(own)), "float32")
