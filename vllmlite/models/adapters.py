"""The weights of a model that LoRA adapters can change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import sources
from vllmlite.weights.adapter import AdapterLimits, LowRank
from vllmlite.weights.host import ITEM_SIZE, HostTensor
from vllmlite.weights.parts import HEAD, Source, Span


def places(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Return the shape ``[out, in]`` of each weight that adapters can change.

    The names are those of :func:`~vllmlite.models.tensors.sources` without ``.weight``, such as ``3.q`` or ``3.down``.
    The sources say which module of the checkpoint, and which rows of it, each weight comes from."""
    return {
        name.removesuffix(".weight"): (source.shape[0], source.shape[1])
        for name, source in sources(spec).items()
        if source.product and name != HEAD and ".experts." not in name
    }


def most_bytes(spec: DecoderSpec, limits: AdapterLimits, dtype: str) -> int:
    """Return the bytes of as many adapters as may be resident, of the largest rank and in all places."""
    elements = sum(out + columns for out, columns in places(spec).values()) * limits.max_rank
    return elements * ITEM_SIZE[dtype] * limits.max_adapters


@dataclass(frozen=True, slots=True)
class PlacePart:
    """The part of a weight of the whole model that one rank computes."""

    name: str
    """Name of the weight in the rank's model."""
    rows: tuple[Span, ...] | None
    """Rows of the whole weight that the rank has; None: all."""
    columns: Span | None
    """Columns of the whole weight that the rank has; None: all."""

    def of(self, change: LowRank) -> LowRank:
        """Return the change of this part: the rank's rows of ``b`` and its columns of ``a``."""
        a, b = change.a, change.b
        if self.columns is not None:
            a = _taken(a, None, self.columns)
        if self.rows is not None:
            b = _taken(b, self.rows, None)
        return LowRank(a, b, change.scale)


def place_parts(spec: DecoderSpec) -> Mapping[str, PlacePart]:
    """Return the parts that the rank of ``spec`` computes of the weights of the whole model, by their names there.

    Layers that belong to other stages of the pipeline are left out."""
    own, whole = sources(spec), sources(spec.whole or spec)
    parts = {}
    for name in places(spec):
        number, _, rest = name.partition(".")
        whole_name = f"{int(number) + spec.stage.first}.{rest}" if number.isdigit() else name
        source, of = own[f"{name}.weight"], whole[f"{whole_name}.weight"]
        columns = None if source.columns == of.columns else source.columns
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
                found.append((before + low - begin, before + high - begin))
            before += end - begin
    return tuple(found)


def _taken(tensor: HostTensor, rows: tuple[Span, ...] | None, columns: Span | None) -> HostTensor:
    """Return a copy of some rows and columns of a matrix."""
    height = tensor.shape[0] if rows is None else sum(last - first for first, last in rows)
    width = tensor.shape[1] if columns is None else columns[1] - columns[0]
    taken = Source("", tensor.shape, (height, width), rows, columns).take(tensor)
    assert isinstance(taken, HostTensor)
    return taken
