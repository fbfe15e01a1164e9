"""What the nodes of an engine (the processes that run its ranks on several hosts) tell each other.

These messages are encoded by :mod:`vllmlite.ranks.encoding`, as nothing that comes from another host is unpickled, and
go through a ``Link`` of ``vllmlite._cpu``, which authenticates them. Node 0, the hub, is at one end of every link."""

from __future__ import annotations

from dataclasses import dataclass

from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.ranks.encoding import Encoding
from vllmlite.ranks.messages import Failed, Phase, Ready


@dataclass(frozen=True, slots=True)
class RankPhase:
    """A rank begins another part of its start."""

    rank: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class RankReady:
    """A rank's runner is built."""

    rank: int
    ready: Ready


@dataclass(frozen=True, slots=True)
class RankFailed:
    """A step failed on a rank."""

    rank: int
    failed: Failed


@dataclass(frozen=True, slots=True)
class RankRefused:
    """A rank cannot be built: ``error`` is the name of a class of :mod:`vllmlite.errors`."""

    rank: int
    error: str
    text: str


@dataclass(frozen=True, slots=True)
class StepCommand:
    """The hub has a step launched; without a schedule, collected. See :data:`vllmlite.ranks.messages.Command`."""

    step: int
    schedule: Schedule | None


@dataclass(frozen=True, slots=True)
class StepReply:
    """A step's result, or how it failed."""

    step: int
    result: StepResult | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepDigest:
    """Rank 0 launches a step whose schedule has this digest; the others must launch an equal one."""

    step: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class End:
    """All ranks are to end. ``is_failure``: something has gone wrong, rather than the engine having been shut down."""

    reason: str
    is_failure: bool


@dataclass(frozen=True, slots=True)
class Left:
    """The program of a rank has ended or closed its engine, and takes part in no further step."""

    rank: int


ENCODING = Encoding(
    RankPhase, RankReady, RankFailed, RankRefused, StepCommand, StepReply, StepDigest, End, Left,
    without=frozenset(
        f"SamplingParams.{name}" for name in ("stop", "bad_words", "structured_outputs", "beams")
    ),
)  # fmt: skip
"""Fields that matter to the engine only are not sent."""
