"""What the driver and the ranks of one host tell each other.

Steps and their results go through rings in shared memory, everything else over a socket pair for each rank, all of it
pickled: these processes trust each other as parts of one program, which the driver has started. Nothing is ever
unpickled that comes from another host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.models.plan import Plan
from vllmlite.runner.cache_tiers import HostPlaces
from vllmlite.weights.adapter import LowRank


@dataclass(frozen=True, slots=True)
class Setup:
    """The driver's first message to a rank."""

    config: EngineConfig
    plan: Plan
    cpus: list[int]
    """The CPUs that the rank may use; empty: all of the driver's."""
    log_level: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A rank begins another part of its start."""

    name: str


@dataclass(frozen=True, slots=True)
class BackendFacts:
    """The properties of the ranks' backends that an engine needs to know."""

    name: str
    device: str
    dtype: str
    asynchronous: bool
    adapter_abilities: frozenset[str]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The properties of the ranks' models that an engine needs to know; see ``models.interface.Model``."""

    vocab_size: int
    kv_spec: Any


@dataclass(frozen=True, slots=True)
class Ready:
    """A rank's runner is built; see ``runner.build.BuiltRunner``."""

    backend: BackendFacts
    model: ModelFacts
    num_blocks: int
    max_model_len: int
    backend_choice: str
    step_times: list[tuple[int, float]]
    draft_times: list[tuple[int, float]]
    host: HostPlaces | None


@dataclass(frozen=True, slots=True)
class Failed:
    """A step failed on a rank; all others must fail at it as well, or they no longer agree."""

    step: int
    error: str


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """Some weights of an adapter; the parts of one adapter follow each other, maybe with steps between them."""

    index: int
    """Where the ranks put the adapter; see ``ModelRunner.load_adapter_parts``."""
    digest: str
    weights: Mapping[str, LowRank]
    """The changes of whole weights, by their names in the whole model."""
    is_first: bool
    is_last: bool
    """Whether the ranks have all of the adapter now, and reply once it is loaded."""


Command: TypeAlias = tuple[int, Schedule | AdapterPart | None]
"""The driver's message in the ring: launch the schedule as step ``[0]``; with None, collect that step.

Only ranks whose backend is asynchronous are told to collect; others complete each step at once."""
Reply: TypeAlias = tuple[int, StepResult | Exception]
"""The reporting rank's message in the ring: a collected step, or why it failed."""
