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
    """A grammar together with the current position of one sequence's output in it."""

    def masks(self, drafts: Sequence[int] = ()) -> list[bytes | None]:
        """Return the bitmasks of the ids that may come next, and of those that may come after each of ``drafts``, until
        a draft is not allowed or completes the output. The position does not change.

        Id ``i`` is bit ``i % 32`` of little-endian word ``i // 32``; None allows all ids."""
        ...

    def accept(self, token_id: int) -> bool:
        """Advance by the next id; returns whether the output is complete."""
        ...

    def restart(self) -> None:
        """Go back to the start of the output."""
        ...

    def fork(self) -> Grammar:
        """Return a copy of the grammar at the same position, for another sequence."""
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
    """Key of a LoRA adapter: its name, the source that it is read from, and the digest of its contents."""

    name: str
    source: Hashable
    digest: str


class Beams(Protocol):
    """The part of a :class:`~vllmlite.engine.beams.BeamSearch` that the scheduler uses; that module imports the
    scheduler."""

    request: Request
    members: list[Request]
    active: list[Request]
    width: int

    @property
    def end_of_row(self) -> int:
        """Number of tokens at which the next row has to end."""
        ...

    def num_blocks(self, num_tokens: int, block_size: int) -> int:
        """Return the most blocks that beams of ``num_tokens`` need."""
        ...

    def awaits_copy(self, member: Request) -> bool:
        """Return whether the next step copies a partial block for this sequence."""
        ...

    def occupy(self, slots: list[int], schedule: Any) -> None:
        """Take slots for the beams after the first, of a request that has been admitted."""
        ...

    def schedule(self, scheduler: Any, budget: int, schedule: Any, rows: list[Request]) -> int:
        """Append the next rows; return the number of their tokens."""
        ...

    def vacate(self, block_size: int) -> None:
        """Drop the sequences of all beams but the request itself."""
        ...

    def restart(self) -> None:
        """Reset to a waiting request with nothing in the cache."""
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
    """Maximum number of tokens of prompt and output together."""
    stop_ids: frozenset[int]
    """Ids that end the output: the model's end-of-text ids (unless ignored) and ``params.stop_token_ids``."""
    eos_ids: frozenset[int]
    root: bytes
    """Parent hash of the first block (:func:`~vllmlite.engine.block_pool.root_digest`)."""
    metrics: RequestMetrics
    bad_words: Sequence[Sequence[int]] = ()
    """Token sequences that may not occur: the last id of each is banned after the ids before it."""
    priority: int = 0
    grammar: Grammar | None = None
    """Restricts which id may come next."""
    pooling_type: str | None = None
    """How the prompt's hidden states are pooled into an embedding; None: the request generates tokens.

    A request for an embedding gets no tokens, but counts one more token than its prompt until the embedding is
    collected."""
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
    """Number of blocks at the start of ``blocks`` that have been offered to the prefix cache."""
    next_full_at: int = sys.maxsize
    """Number of computed tokens at which the next block is full; ``maxsize`` without prefix caching."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    drafts: list[int] = field(default_factory=list)
    """Guesses of the ids after the last known token, for the next row of a running request."""
    masks: list[bytes | None] = field(default_factory=list)
    """The grammar's masks for the row that is being scheduled, if it has drafts."""
    asks_at: int = 0
    """Number of tokens from which on the policy is asked again whether the request should have drafts."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    awaits_drafts: bool = False
    """Whether the row in flight has drafts, or drafts are to be proposed after it."""
    awaits_blocks: bool = False
    """Whether blocks of the prefix are being read from disk."""
    waits_until: float = 0.0
    """Time, from :func:`time.monotonic`, at which the request stops waiting for blocks from disk."""
    reads_text: bool = False
    """Whether the next row depends on output ids that the host has to know (for a mask, or in a pipeline of several
    stages), so that it must wait for the row in flight."""
    beams: Beams | None = None
    """The beam search to which this sequence belongs, if any."""
    has_bans: bool = False
    """Whether :meth:`banned_ids` can return any."""
    has_extras: bool = False
    """Whether its rows may need bans, a mask, prompt log-probabilities or pooling."""

    def __post_init__(self) -> None:
        """Initialise the counters and flags that follow from the other fields."""
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
        """Whether the request has neither been admitted nor finished."""
        return self.status is Status.WAITING

    @property
    def members(self) -> Sequence[Request]:
        """The sequences that hold slots and blocks: the request itself, and those of its further beams."""
        return (self,) if self.beams is None else self.beams.members

    @property
    def first(self) -> Request:
        """The request to which this sequence belongs: itself, unless it is a further beam."""
        return self if self.beams is None else self.beams.request

    @property
    def end_of_prefix(self) -> int:
        """One more than the number of known tokens that may come from the cache when the request is admitted."""
        return self.num_tokens if self.beams is None else self.beams.end_of_row

    @property
    def width(self) -> int:
        """Number of slots that the request takes."""
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
        """Sort key of the order in which requests are served; the smallest is served first."""
        return (self.priority, self.order)

    @property
    def num_known_ids(self) -> int:
        """Number of tokens whose ids the host knows: all but those in flight."""
        return self.num_tokens - self.num_in_flight

    def known_ids(self, start: int, stop: int) -> list[int]:
        """Return the ids at positions ``start`` to ``stop`` - 1; ``stop`` is at most :attr:`num_known_ids`."""
        prompt = len(self.prompt_token_ids)
        if stop <= prompt:
            return self.prompt_token_ids[start:stop]
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - prompt]

    def banned_ids(self, drafts: Sequence[int] = ()) -> list[int]:
        """Return the ids that the token after ``drafts`` may not have: ids that end the output before ``min_tokens``,
        and ids that complete a bad word."""
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
        """Reset to a waiting request with nothing computed and nothing in flight. The prompt and the output stay."""
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
        """Forget the drafts of the next row."""
        self.drafts, self.masks, self.asks_at = [], [], 0

    def finish(self, reason: str, stop_reason: int | str | None, now: float) -> None:
        """Mark the request as finished, with its reason and time."""
        self.status = Status.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.metrics.finished_time = now
