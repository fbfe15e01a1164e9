"""The weights of a decoder that adapters can change, on the decoder's backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from vllmlite.backends.base import Backend, ExpertTables, LinearWeight, LowRankTable
from vllmlite.errors import ParameterError
from vllmlite.models.adapters import ability, places
from vllmlite.models.spec import DecoderSpec
from vllmlite.weights.adapter import EMBEDDING, HEAD, Adapter, AdapterLimits


@dataclass(slots=True)
class Linear:
    """A weight on the backend, and its changes by adapters."""

    weight: LinearWeight
    """None for the weights of experts, which the backend packs together."""
    names: Sequence[str]
    """Names of the weights that ``weight`` consists of, in this order."""
    changes: LowRankTable = None
    """The changes that adapters make to the weight; None if there are no adapters, or if they cannot change it."""
    changed_by: set[int] = field(default_factory=set)
    """Indices of the adapters that change it."""


@dataclass(slots=True)
class ExpertLinears:
    """The weights of a mixture of experts."""

    gate_up: list[Linear] = field(default_factory=list)
    down: list[Linear] = field(default_factory=list)
    tables: ExpertTables = None
    """Their changes; None if there are no adapters, or if they cannot change them."""


class ChangeableWeights:
    """All weights of a decoder that adapters can change."""

    def __init__(self, spec: DecoderSpec, backend: Backend) -> None:
        self._spec, self._backend = spec, backend
        self._shapes: dict[str, tuple[int, int]] = {}
        """Name of a weight → its shape, once adapters are allowed."""
        self._linears: list[Linear] = []
        self._mixtures: list[ExpertLinears] = []

    def add(self, weight: LinearWeight, *names: str) -> Linear:
        """Add ``weight``, which consists of the weights ``names``."""
        linear = Linear(weight, names)
        self._linears.append(linear)
        return linear

    def add_experts(self, prefixes: Sequence[str]) -> ExpertLinears:
        """Add the weights of experts, whose names begin with ``prefixes``."""
        mixture = ExpertLinears()
        for prefix in prefixes:
            mixture.gate_up.append(self.add(None, f"{prefix}gate", f"{prefix}up"))
            mixture.down.append(self.add(None, f"{prefix}down"))
        self._mixtures.append(mixture)
        return mixture

    def allocate(self, limits: AdapterLimits) -> None:
        """Allocate tables for the changes by adapters within ``limits``, as far as the backend supports them."""
        backend, abilities = self._backend, {None, *self._backend.adapter_abilities}
        self._shapes = places(self._spec)
        for linear in self._linears:
            first = linear.names[0]
            if ability(first) not in abilities:
                continue
            most = limits
            if first in (EMBEDDING, HEAD):  # whole ones have the rank of the hidden states
                most = replace(limits, max_rank=max(limits.max_rank, self._spec.output_size))
            rows = [self._shapes[name][0] for name in linear.names]
            linear.changes = backend.alloc_low_rank(rows, self._shapes[first][1], most)
        for mixture in self._mixtures:
            gate_up, down = ([linear.changes for linear in each] for each in (mixture.gate_up, mixture.down))
            if gate_up[0] is not None:
                mixture.tables = backend.expert_tables(gate_up, down)

    def set_parts(self, index: int, adapter: Adapter | None) -> Iterator[int]:
        """Put ``adapter`` at ``index``, or remove the one there if it is None, one weight after the other; yields the
        bytes of each. Raises ParameterError if it does not fit."""
        weights, shapes = {} if adapter is None else adapter.weights, self._shapes
        for name, change in weights.items():
            if name not in shapes:
                raise ParameterError("adapter", name, "is not a weight that adapters can change")
            if (change.b.shape[0], change.a.shape[1]) != shapes[name] or change.b.shape[1] != change.rank:
                raise ParameterError(
                    "adapter",
                    name,
                    f"has a {list(change.a.shape)} and b {list(change.b.shape)}; the weight is {list(shapes[name])}",
                )
        for linear in self._linears:
            parts = [weights.get(name) for name in linear.names]
            changed = any(part is not None for part in parts)
            if not changed and index not in linear.changed_by:
                continue
            if linear.changes is None:
                raise ParameterError(
                    "adapter", linear.names[0], f"the {self._backend.name} backend cannot change it"
                )
            self._backend.set_low_rank(linear.changes, index, parts)
            (linear.changed_by.add if changed else linear.changed_by.discard)(index)
            yield sum(part.num_bytes for part in parts if part is not None)
