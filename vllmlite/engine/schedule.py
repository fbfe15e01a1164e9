"""Schedule: one step as plain values, which a scheduler makes and a runner carries out, maybe in another process."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllmlite.engine.drafts import holds_back
from vllmlite.engine.tiers import Copies
from vllmlite.sampling_params import SamplingParams


@dataclass(slots=True)
class Admission:
    """A sequence takes a slot. Has all that a runner needs to know of it while it holds the slot."""

    slot: int
    token_ids: list[int]
    """Prompt, and the output so far where the sequence was preempted."""
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    pooling_type: str | None = None
    adapter: int = 0
    """Index of the sequence's resident adapter (:meth:`ModelRunner.load_adapter`); 0: none."""


@dataclass(frozen=True, slots=True)
class ScheduledBeams:
    """Rows of a schedule among whose continuations the best are chosen: the beams of one request."""

    row: int
    """The first of its rows, which are adjacent."""
    sampled: int
    """Their first sampled position."""
    scores: list[float]
    temperature: float
    num_candidates: int
    """How many continuations are wanted."""


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
    """Row → number of drafts that are to be proposed for the sequence after the step; rows without any are left out."""
    block_slots: list[int] = field(default_factory=list)
    """With the next two: block ``block_ids[i]`` is appended as column ``block_columns[i]`` of a slot's block table."""
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
    """Block → block that gets its contents before the step computes."""
    pools: list[int] = field(default_factory=list)
    """Rows whose hidden states make up a vector, which is whole with the row that ends the prompt."""
    prompt_logprobs: list[int] = field(default_factory=list)
    """Rows whose prompt tokens' log-probabilities are wanted."""
    copies: Copies | None = None
    """Block copies that come before the step's other work; None without cache tiers."""
    num_tokens: int = 0
    num_sampled: int = 0
    """Sum of ``samples``."""

    def holds_back(self) -> bool:
        """Whether the next step should wait for this one, for the sake of rows with drafts."""
        return bool(self.drafts or self.wanted) and holds_back(
            len(self.drafts.keys() | self.wanted.keys()), len(self.slots)
        )

    @property
    def is_empty(self) -> bool:
        """Whether the runner has nothing to do. A step without rows may have admissions and copies."""
        return not (self.slots or self.admissions or self.block_ids or self.copies)
