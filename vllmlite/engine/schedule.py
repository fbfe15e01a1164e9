"""Schedule: one step as plain values, which a scheduler makes and a runner carries out, maybe in another process."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllmlite.engine.drafts import holds_back
from vllmlite.engine.tiers import Copies
from vllmlite.sampling_params import SamplingParams


@dataclass(slots=True)
class Admission:
    """A sequence that gets a slot, with everything that a runner needs to know of it while it holds the slot."""

    slot: int
    token_ids: list[int]
    """The prompt; after a preemption also the output so far."""
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    pooling_type: str | None = None
    adapter: int = 0
    """Index of the sequence's resident adapter (:meth:`ModelRunner.load_adapter`); 0: none."""


@dataclass(frozen=True, slots=True)
class ScheduledBeams:
    """The rows of one request's beams, from whose continuations the best are chosen."""

    row: int
    """The first of its rows, which are adjacent."""
    sampled: int
    """Their first sampled position."""
    scores: list[float]
    temperature: float
    num_candidates: int
    """Number of continuations to choose."""


@dataclass(slots=True)
class Schedule:
    """One step, as plain values in columns: entry r of ``slots``, ``starts``, ``counts`` and ``samples`` is row r."""

    admissions: list[Admission] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Position of the row's first token."""
    counts: list[int] = field(default_factory=list)
    """Tokens of the row."""
    samples: list[int] = field(default_factory=list)
    """Sampled positions of the row, which are its last ones: the last known token and the row's drafts; or 0."""
    drafts: dict[int, list[int]] = field(default_factory=dict)
    """Row → its drafts, which are its last tokens."""
    wanted: dict[int, int] = field(default_factory=dict)
    """Row → number of drafts to propose for its sequence after the step. Rows without drafts are left out."""
    block_slots: list[int] = field(default_factory=list)
    """With ``block_columns`` and ``block_ids``: block ``block_ids[i]`` becomes column ``block_columns[i]`` of the block
    table of slot ``block_slots[i]``."""
    block_columns: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    banned: dict[int, list[int]] = field(default_factory=dict)
    """Sampled position → ids that may not be sampled there. Positions are counted over all rows."""
    masks: dict[int, bytes] = field(default_factory=dict)
    """Sampled position → bits of the ids that the grammar allows, little-endian words of 32."""
    ids: dict[int, list[int]] = field(default_factory=dict)
    """Row of a beam, or of a sequence that decodes in a pipeline of several stages → the ids of its tokens."""
    beams: list[ScheduledBeams] = field(default_factory=list)
    copied_blocks: list[tuple[int, int]] = field(default_factory=list)
    """Pairs of blocks; the contents of the first are copied to the second before the step computes."""
    pools: list[int] = field(default_factory=list)
    """Rows whose hidden states are pooled; the vector of a prompt is complete with the row that ends it."""
    prompt_logprobs: list[int] = field(default_factory=list)
    """Rows whose prompt tokens' log-probabilities are wanted."""
    copies: Copies | None = None
    """Block copies that come before the step's other work; None without cache tiers."""
    num_tokens: int = 0
    num_sampled: int = 0
    """Sum of ``samples``."""

    def holds_back(self) -> bool:
        """Return whether the next step should wait for the results of this one, because rows have drafts."""
        return bool(self.drafts or self.wanted) and holds_back(
            len(self.drafts.keys() | self.wanted.keys()), len(self.slots)
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing for the runner to do. A step without rows may still have admissions and copies."""
        return not (self.slots or self.admissions or self.block_ids or self.copies)
