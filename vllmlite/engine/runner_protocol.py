"""The engine's interface to a runner, which turns a schedule into a :class:`StepResult`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllmlite.engine.beams import Continuation
from vllmlite.engine.schedule import Schedule


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probability and rank of a token, and the most likely ids of its position, descending."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top: list[float]
    named: list[TokenLogprobs] = field(default_factory=list)
    """Log-probabilities of the ids that the request names; these have no ``top_ids``."""


@dataclass(slots=True)
class StepResult:
    """Results of a step: entry i belongs to the i-th row that sampled."""

    token_ids: list[list[int]]
    """For each row, the accepted drafts and the id sampled after them."""
    logprobs: list[list[TokenLogprobs]] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Row → entries of the prompt tokens that follow the row's tokens, in order."""
    pooled: dict[int, list[float]] = field(default_factory=dict)
    """Row that ends a prompt → the prompt's embedding."""
    beams: list[list[Continuation]] = field(default_factory=list)
    """For each of the schedule's ``beams``, the best continuations, the best first."""
    drafts: dict[int, list[int]] = field(default_factory=dict)
    """Row for which the schedule wants drafts → guesses of the next ids, if there are any."""


class Runner(Protocol):
    """Runs schedules on a model. Steps are launched and collected in the same order."""

    def launch(self, schedule: Schedule) -> Any:
        """Start a step; the handle goes to :meth:`collect`."""
        ...

    def collect(self, handle: Any) -> StepResult:
        """Wait for a step and return its results."""
        ...

    def drain(self) -> None:
        """Wait until no launched step, collected or not, copies blocks to or from the cache tiers any more."""
        ...

    def load_adapter_parts(self, index: int, adapter: Any) -> Iterator[int]:
        """Put an adapter on the device in slot ``index``, which no step uses, in parts; yields the bytes of each.

        Raises VllmliteError if it cannot be used."""
        ...
