"""Messages between the driver and the ranks of one host; those between hosts are in ``host_messages.py``.

Steps and their results go through rings in shared memory, everything else over a socket pair for each rank, all of it
pickled: these processes trust each other as parts of one program, which the driver has started. Nothing that comes from
another host is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from vllmlite.backends.kv_cache import KVSpec
from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.models.plan import Plan
from vllmlite.runner.cache_tiers import HostPlaces
from vllmlite.weights.adapter import LowRank

LOAD_SECONDS = 3600.0
"""Maximum seconds until a rank has loaded its part of the model."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The driver's first message to a rank."""

    config: EngineConfig
    plan: Plan
    cpus: list[int]
    """The CPUs that the rank may use; empty: all of the driver's."""
    log_level: int
    num_local: int
    """Number of ranks on this host."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Message of a rank that begins another part of its start."""

    name: str


@dataclass(frozen=True, slots=True)
class BackendFacts:
    """The properties of the ranks' backends that an engine needs to know."""

    name: str
    device: str
    dtype: str
    asynchronous: bool
    adapter_abilities: frozenset[str]
    instructions: str = ""
    """The instruction set of a CPU's kernels."""

    def __str__(self) -> str:
        """Return what the results of ops depend on."""
        return " ".join(filter(None, (self.name, self.instructions, self.dtype)))


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The properties of the ranks' models that an engine needs to know; see ``models.interface.Model``."""

    vocab_size: int
    kv_spec: KVSpec


@dataclass(frozen=True, slots=True)
class Ready:
    """Message of a rank whose runner is built; for the fields see ``runner.build.BuiltRunner``."""

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
    """Message of a rank on which a step failed. It must fail on all others too, or the ranks no longer have equal
    states."""

    step: int
    error: str


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """Message with some weights of an adapter. The parts of one adapter come in order, and steps may come between
    them."""

    index: int
    """Index at which the ranks put the adapter; see ``ModelRunner.load_adapter_parts``."""
    digest: str
    weights: Mapping[str, LowRank]
    """The changes of whole weights, by their names in the whole model."""
    is_first: bool
    is_last: bool
    """Whether this is the last part of the adapter; the ranks reply once it is loaded."""


Command: TypeAlias = tuple[int, Schedule | AdapterPart | None]
"""The driver's message in the ring, whose first element is the number of a step: launch the schedule as this step, load
an adapter, or (None) collect this step. Only ranks whose backend is asynchronous are told to collect; others complete
each step at once."""
Reply: TypeAlias = tuple[int, StepResult | Exception]
"""The message of the reporting rank in the ring: the number of a step, and its result or its error."""
