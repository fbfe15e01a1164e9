"""A request of the engine: its tokens, blocks, limits, and how it ended."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypedDict

from vllmlite.engine.drafts import Acceptance
from vllmlite.outputs import RequestMetrics
from vllmlite.sampling_params import SamplingParams


class Grammar(Protocol):
    """A grammar and the position of one sequence's output in it."""

    def masks(self, drafts: Sequence[int] = ()) -> list[bytes | None]:
        """Bitmasks of the ids that may come next, and of those that may come after each of ``drafts``, as long as these
        are allowed and do not complete the output. The position does not change.

        Id ``i`` is bit ``i % 32`` of little-endian word ``i // 32``; None allows all ids."""
        ...

    def accept(self, token_id: int) -> bool:
        """Advance by the next id; returns whether the output is complete."""
        ...

    def restart(self) -> None:
        """Go back to the start of the output."""
        ...

    def fork(self) -> Grammar:
        """Return another grammar at the same position."""
        ...


def allows(mask: bytes | None, token_id: int) -> bool:
    """Return whether a mask of :meth:`Grammar.masks` allows an id."""
    return mask is None or bool(mask[token_id >> 3] >> (token_id & 7) & 1)


class Status(Enum):
    """State of a request. Only RUNNING ones hold a slot and blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """An adapter: its name, what it is read from, and the digest of the contents that were found there."""

    name: str
    source: Hashable
    digest: str


class Beams(Protocol):
    """What the scheduler uses of a :class:`~vllmlite.engine.beams.BeamSearch`, whose module imports the scheduler."""

    request: Request
    members: list[Request]
    active: list[Request]
    width: int

    @property
    def end_of_row(self) -> int:
        """Number of tokens up to which the next rows may compute."""
        ...

    def num_blocks(self, num_tokens: int, block_size: int) -> int:
        """Return the most blocks that beams of ``num_tokens`` need."""
        ...

    def awaits_copy(self, member: Request) -> bool:
        """Whether a sequence is to get the copy of a partial block."""
        ...

    def occupy(self, slots: list[int], schedule: Any) -> None:
        """Take slots for the further beams of a request that has been admitted."""
        ...

    def schedule(self, scheduler: Any, budget: int, schedule: Any, rows: list[Request]) -> int:
        """Append the next rows; return the number of their tokens."""
        ...

    def vacate(self, block_size: int) -> None:
        """Drop all sequences but the request."""
        ...

    def restart(self) -> None:
        """Go back to waiting, with nothing in the cache."""
        ...


class RequestOptions(TypedDict, total=False):
    """The keyword arguments of :meth:`Engine.add_request`."""

    bad_words: Sequence[Sequence[int]]
    grammar: Grammar | None
    priority: int
    cache_salt: str | None
    arrival_time: float | None
    pooling_type: str | None
    adapter: Any


@dataclass(slots=True, eq=False)
class Request:
    """One sequence: a prompt and its output.

    ``num_tokens`` counts every token known to exist: prompt, output, and ids sampled by a step that has not been
    collected (``num_in_flight``). ``num_computed_tokens`` counts those whose keys and values are in the cache once
    the launched steps are done. The scheduler's one rule is to let computed catch up with known.

    A row with ``k`` drafts counts as ``k + 1`` tokens in flight until it is collected; then the rejected ones are taken
    back from both counts.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_total_tokens: int
    """Prompt and output together never exceed this."""
    stop_ids: frozenset[int]
    """Ids that end the output: the model's end-of-text ids (unless ignored) and ``params.stop_token_ids``."""
    eos_ids: frozenset[int]
    root: bytes
    """Parent digest of the first block."""
    metrics: RequestMetrics
    bad_words: Sequence[Sequence[int]] = ()
    """Token sequences; the last id of one is banned while the output ends with the ids before it."""
    priority: int = 0
    grammar: Grammar | None = None
    """Restricts which id may come next."""
    pooling_type: str | None = None
    """How to pool the prompt's hidden states into an embedding; None: the request generates tokens. A request for an
    embedding gets no tokens, but counts as having one more until the embedding is collected."""
    adapter: AdapterKey | None = None
    """The LoRA adapter that changes the model's weights for this request."""
    order: int = 0
    """Arrival number. Requests are served in the order of ``(priority, order)`` and preempted in the reverse order."""

    status: Status = Status.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_in_flight: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache at the first admission."""
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of the full blocks whose tokens are known."""
    num_cached_blocks: int = 0
    """How many of ``blocks`` have been offered to the prefix cache."""
    next_full_at: int = sys.maxsize
    """How many tokens must be known and computed for the next block to be full; ``maxsize`` without prefix caching."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    drafts: list[int] = field(default_factory=list)
    """Guesses of the ids after the last known token, for the next row of a running request."""
    masks: list[bytes | None] = field(default_factory=list)
    """The grammar's masks for the row that is being scheduled, if it has drafts."""
    asks_at: int = 0
    """Number of tokens from which the request is asked whether it wants drafts."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    awaits_drafts: bool = False
    """Whether the row in flight has drafts, or drafts are to be proposed after it."""
    awaits_blocks: bool = False
    """Whether blocks of the prefix are being read from disk."""
    waits_until: float = 0.0
    """When to go on without them."""
    reads_text: bool = False
    """Whether the next row depends on the ids of the output on the host, by a mask or in a pipeline of several stages,
    so that it must wait for the one in flight."""
    beams: Beams | None = None
    """The search that the request, or one of its further sequences, belongs to."""
    has_bans: bool = False
    """Whether :meth:`banned_ids` can return any."""
    has_extras: bool = False
    """Whether its rows may need bans, a mask, prompt log-probabilities or pooling."""

    def __post_init__(self) -> None:
        """Derive counters and flags."""
        self.num_tokens = len(self.prompt_token_ids)
        self.reads_text = self.grammar is not None or any(len(word) > 1 for word in self.bad_words)
        self.has_bans = bool(self.bad_words) or self.params.min_tokens > 0
        self.has_extras = (
            self.has_bans
            or self.grammar is not None
            or self.pooling_type is not None
            or self.params.prompt_logprobs is not None
        )

    @property
    def is_waiting(self) -> bool:
        """Whether the request has neither a slot nor ended."""
        return self.status is Status.WAITING

    @property
    def members(self) -> Sequence[Request]:
        """The sequences that hold slots and blocks: the request itself, and those of its further beams."""
        return (self,) if self.beams is None else self.beams.members

    @property
    def first(self) -> Request:
        """The request itself, if this is one of its further beams."""
        return self if self.beams is None else self.beams.request

    @property
    def end_of_prefix(self) -> int:
        """Known tokens that may be found in a cache at its admission, and one more."""
        return self.num_tokens if self.beams is None else self.beams.end_of_row

    @property
    def width(self) -> int:
        """Number of slots that it takes."""
        return 1 if self.beams is None else self.beams.width

    @property
    def needs_every_state(self) -> bool:
        """Whether every position of the prompt has to be computed, so that no prefix can come from the cache."""
        return self.params.prompt_logprobs is not None or self.pooling_type == "MEAN"

    @property
    def num_missing_tokens(self) -> int:
        """Known tokens that are not computed yet."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def may_run(self) -> bool:
        """Whether the request can be in another step before the steps in flight are collected."""
        if self.num_in_flight and (self.reads_text or self.awaits_drafts or self.beams is not None):
            return False
        return self.num_tokens < self.max_total_tokens and not self.awaits_blocks

    @property
    def key(self) -> tuple[int, int]:
        """Order of service: smaller first."""
        return (self.priority, self.order)

    @property
    def num_known_ids(self) -> int:
        """Tokens whose ids the host has."""
        return self.num_tokens - self.num_in_flight

    def known_ids(self, start: int, stop: int) -> list[int]:
        """Ids of positions ``start`` up to ``stop`` (at most :attr:`num_known_ids`)."""
        prompt = len(self.prompt_token_ids)
        if stop <= prompt:
            return self.prompt_token_ids[start:stop]
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - prompt]

    def banned_ids(self, drafts: Sequence[int] = ()) -> list[int]:
        """Ids that the next token after ``drafts`` may not be: ends before ``min_tokens``, and completions of bad
        words."""
        banned: list[int] = []
        if self.num_tokens + len(drafts) - len(self.prompt_token_ids) < self.params.min_tokens:
            banned.extend(self.stop_ids | self.eos_ids)
        longest = max(map(len, self.bad_words), default=1)
        output = [*self.output_token_ids[-longest:], *drafts]
        for word in self.bad_words:
            prefix = list(word[:-1])
            if not prefix or output[-len(prefix) :] == prefix:
                banned.append(word[-1])
        return banned

    def restart(self) -> None:
        """Go back to waiting, with nothing computed and nothing in flight; prompt and output stay."""
        self.status = Status.WAITING
        self.slot = -1
        self.blocks = []
        self.block_hashes = []
        self.num_cached_blocks = 0
        self.next_full_at = sys.maxsize
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.drop_drafts()
        self.awaits_drafts = False
        self.awaits_blocks = False
        if self.beams is not None:
            self.beams.restart()  # which sets the output: that of the best beam
        self.num_tokens = len(self.prompt_token_ids) + len(self.output_token_ids)
        self.metrics.num_generation_tokens = len(self.output_token_ids)
        if self.beams is None and self.grammar is not None:
            self.grammar.restart()
            for token_id in self.output_token_ids:
                self.grammar.accept(token_id)

    def drop_drafts(self) -> None:
        """Forget the drafts for the next row."""
        self.drafts, self.masks, self.asks_at = [], [], 0

    def finish(self, reason: str, stop_reason: int | str | None, now: float) -> None:
        """Record how the request ended."""
        self.status = Status.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.metrics.finished_time = now
