"""The weights of a model that LoRA adapters can change."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources
from vllmlite.weights.adapter import EMBEDDING, EXPERTS, HEAD, AdapterLimits, LowRank
from vllmlite.weights.host import ITEM_SIZE, HostTensor
from vllmlite.weights.parts import Source, Span

ROUTER = ".router"


def places(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Return the shape ``[out, in]`` of each weight that adapters can change.

    The names are those of :func:`~vllmlite.models.tensors.sources` without ``.weight``, such as ``3.q`` or
    ``3.experts.0.down``. The sources say which module of the checkpoint, and which rows of it, each weight comes from.
    The embedding is a weight ``[hidden, V]``; the output layer is a weight of its own even if both are tied."""
    found = {
        name.removesuffix(".weight"): (source.shape[0], source.shape[1])
        for name, source in sources(spec).items()
        if source.product or name.endswith(f"{ROUTER}.weight")
    }
    if spec.stage.is_first:
        found[EMBEDDING] = spec.output_size, spec.vocab_size
    if spec.stage.is_last:
        found.setdefault(HEAD, (spec.vocab_size, spec.output_size))
    return found


def ability(place: str) -> str | None:
    """Return the ability, one of ``ABILITIES``, that a backend needs to change the weight ``place``; None for linear
    layers, which need none."""
    if place in (EMBEDDING, HEAD):
        return place
    return EXPERTS if ".experts." in place or place.endswith(ROUTER) else None


def most_bytes(spec: DecoderSpec, limits: AdapterLimits, dtype: str, abilities: Set[str]) -> int:
    """Return the bytes of the maximum number of resident adapters, of the largest rank and in all places except
    experts, on a backend with ``abilities``. Few adapters change experts, which take a hundred times as much."""
    able = {None, *abilities} - {EXPERTS}
    sizes = [sum(shape) for name, shape in places(spec).items() if ability(name) in able]
    return sum(sizes) * limits.max_rank * ITEM_SIZE[dtype] * limits.max_adapters


@dataclass(frozen=True, slots=True)
class PlacePart:
    """The part of a weight of the whole model that one rank computes."""

    name: str
    """Name of the weight in the rank's model."""
    rows: tuple[Span, ...] | None
    """Spans of rows of the whole weight that the rank has; None: all rows."""
    columns: Span | None
    """Span of columns of the whole weight that the rank has; None: all columns."""

    def of(self, change: LowRank) -> LowRank:
        """Return the change of this part: the rank's rows of ``b`` and its columns of ``a``. If the ranks add up their
        results, only the first rank has the bias, so only its gain corrects it."""
        a, b, gain = change.a, change.b, change.gain
        if self.columns is not None:
            a = _taken(a, None, self.columns)
            if gain is not None and self.columns[0] > 0:
                gain = np.stack([gain[0], np.zeros_like(gain[1])])
        if self.rows is not None:
            b = _taken(b, self.rows, None)
            gain = None if gain is None else np.concatenate([gain[:, slice(*span)] for span in self.rows], 1)
        return LowRank(a, b, change.scale, gain)


def place_parts(spec: DecoderSpec) -> Mapping[str, PlacePart]:
    """Return, for each weight of the whole model, by its name there, the part that the rank of ``spec`` computes.
    Layers that belong to other stages of the pipeline are left out."""
    own, whole = sources(spec), sources(spec.whole or spec)
    parts = {}
    for name in places(spec):
        number, _, rest = name.partition(".")
        whole_name = f"{int(number) + spec.stage.first}.{rest}" if number.isdigit() else name
        source = own.get(f"{name}.weight")
        if name in (EMBEDDING, HEAD):
            parts[name] = PlacePart(name, source.rows if source is not None and name == HEAD else None, None)
            continue
        assert source is not None
        of = whole[f"{whole_name}.weight"]
        columns = None
        if source.columns is not None and source.columns != of.columns:
            begin = of.columns[0] if of.columns is not None else 0
            columns = source.columns[0] - begin, source.columns[1] - begin
        parts[whole_name] = PlacePart(name, _within(source, of), columns)
    return parts


def _within(source: Source, whole: Source) -> tuple[Span, ...] | None:
    """Return the rows of ``source`` as rows of the weight that ``whole`` describes; None: all of them."""
    if source.rows == whole.rows:
        return None
    spans, found = whole.rows or ((0, whole.shape[0]),), []
    for first, last in source.rows or ():
        before = 0
        for begin, end in spans:
            low, high = max(first, begin), min(last, end)
            if low < high:
                found.append(
                    (before + -(-(low - begin) // whole.step), before + -(-(high - begin) // whole.step))
                )
            before += -(-(end - begin) // whole.step)
    return tuple(found)


def _taken(tensor: HostTensor, rows: tuple[Span, ...] | None, columns: Span | None) -> HostTensor:
    """Return a copy of some rows and columns of a matrix."""
    height = tensor.shape[0] if rows is None else sum(last - first for first, last in rows)
    width = tensor.shape[1] if columns is None else columns[1] - columns[0]
    taken = Source("", tensor.shape, (height, width), rows, columns).take(tensor)
    assert isinstance(taken, HostTensor)
    return taken
