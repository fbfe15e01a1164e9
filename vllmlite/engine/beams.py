"""Beam search: which hypotheses of a request go on, and how their sequences share the cache.

A request with beams is one unit of the scheduler, with one row for its prompt and then one for each of its beams, all
of the same length. A step computes the last token of every beam; the backend chooses the best continuations of all
(:meth:`Backend.choose_beams`), and those that do not end are the next beams. The search is that of transformers: a
hypothesis that ends is kept if it is among the ``width`` best continuations, and among the ``width`` best that ended.

Each beam has a slot and a list of blocks. The first continuation of a beam takes over both. Each further one gets the
slot of a beam without continuation, references to the full blocks, and a copy of the last, partial block.

The next tokens depend on the choice, so a request with beams waits for its step, as one with drafts does. If it is
preempted, its hypotheses stay. Later its prompt is computed once, and then the outputs of all beams, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllmlite.beam_params import BeamOptions
from vllmlite.engine.bounds import most_blocks
from vllmlite.engine.request import Grammar, Request, Status
from vllmlite.engine.schedule import Schedule, ScheduledBeams
from vllmlite.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Continuation:
    """A possible next id of a beam, given by the beam's index. ``score`` is the sum of the log-probabilities of the
    beam's output and this id."""

    beam: int
    token_id: int
    score: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished output of beam search."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    """``cumulative_logprob`` divided by the length to the power of the length penalty."""
    finish_reason: str
    stop_reason: int | None = None
    ends_in_text: bool = False
    """Whether the last token is part of the text although the output ended with ``stop``: it completed a grammar."""


@dataclass(frozen=True, slots=True)
class Beam:
    """An unfinished output of beam search."""

    token_ids: list[int]
    score: float
    grammar: Grammar | None


@dataclass(frozen=True, slots=True)
class BeamState:
    """All beams and finished hypotheses of a request, the best first."""

    beams: list[Beam]
    finished: list[Hypothesis]
    parents: list[int]
    """For each beam, the index of the beam that it continues in the state before."""
    is_done: bool = False


class BeamSearch:
    """The beam search of one request: its beams, and the sequences that compute them."""

    def __init__(self, request: Request, options: BeamOptions) -> None:
        """Start a search for ``request``, which is its first sequence."""
        self.request = request
        self.width = options.width
        num_ends = len(request.stop_ids) + (request.grammar is not None)
        self.num_candidates = max(2, 1 + num_ends) * options.width
        self.state = BeamState([Beam([], 0.0, request.grammar)], [], [0])
        self.members = [request]
        """The sequences that hold slots, the request first; only the request itself while it is waiting."""
        self.active: list[Request] = []
        """The sequence of each beam; empty until the prompt has been computed."""
        self._options = options
        self._grammar = request.grammar
        self._adapter = 0
        """Index of the LoRA adapter, while the request holds slots."""
        self._changed: dict[int, tuple[int, int | None]] = {}
        """Slot → first column of its block table that has changed, and the block whose contents the block there gets,
        if any."""

    @property
    def end_of_row(self) -> int:
        """Number of tokens at which the next row has to end: that of the prompt until it is computed, since beams have
        rows of their own."""
        request = self.request
        return request.num_tokens if self.active else len(request.prompt_token_ids)

    def num_blocks(self, num_tokens: int, block_size: int) -> int:
        """Return the most blocks that beams of ``num_tokens`` need."""
        return most_blocks(self.width, len(self.request.prompt_token_ids), num_tokens, block_size)

    def following(self, continuations: Sequence[Continuation]) -> BeamState:
        """Return the state after a step in which ``continuations`` were chosen, the best first."""
        request, state, width = self.request, self.state, self.width
        length = len(state.beams[0].token_ids) + 1
        longest = request.max_total_tokens - len(request.prompt_token_ids)
        normaliser = float(length) ** self._options.length_penalty
        beams: list[Beam] = []
        parents: list[int] = []
        ended: list[Hypothesis] = []
        for rank, found in enumerate(continuations):
            if len(beams) == width:
                break
            parent, token_id = state.beams[found.beam], found.token_id
            grammar = None if parent.grammar is None else parent.grammar.fork()
            completes = grammar is not None and grammar.accept(token_id)
            reason, stop_reason = None, None
            if token_id in request.stop_ids:
                reason = "stop"
                if token_id not in request.eos_ids or request.params.ignore_eos:
                    stop_reason = token_id
            elif completes:
                reason = "stop"
            elif length >= longest:
                reason = "length"
            token_ids = [*parent.token_ids, token_id]
            if reason is None:
                beams.append(Beam(token_ids, found.score, grammar))
                parents.append(found.beam)
            elif rank < width:
                score, in_text = found.score / normaliser, completes and token_id not in request.stop_ids
                ended.append(Hypothesis(token_ids, found.score, score, reason, stop_reason, in_text))
        finished = sorted([*state.finished, *ended], key=lambda one: one.score, reverse=True)[:width]
        is_done = not beams or self._is_decided(beams[0].score, finished, length, longest)
        if is_done and not finished:  # nothing is allowed after any beam
            finished = [
                Hypothesis(beam.token_ids, beam.score, beam.score, "stop", None, True) for beam in state.beams
            ]
        return BeamState(beams, finished, parents, is_done)

    def _is_decided(self, best: float, finished: list[Hypothesis], length: int, longest: int) -> bool:
        """Return whether the search ends, by ``early_stopping``. ``best`` is the sum of log-probabilities of the best
        beam, ``length`` the present length of the beams, and ``longest`` the length that they can reach."""
        if len(finished) < self.width:
            return False
        early, penalty = self._options.early_stopping, self._options.length_penalty
        if early is True:
            return True
        reached = longest if early == "never" and penalty > 0 else length
        return bool(best / float(reached) ** penalty <= finished[-1].score)

    def advance(self, scheduler: Scheduler, state: BeamState) -> None:
        """Replace the current state by ``state``, and give its beams sequences."""
        self.state = state
        request = self.request
        if request.status is Status.RUNNING:
            self._place(scheduler, state.parents)
        else:
            request.output_token_ids = state.beams[0].token_ids
            request.num_in_flight = 0

    def occupy(self, slots: list[int], schedule: Schedule) -> None:
        """Take slots for the beams after the first from the end of ``slots``. The request has been admitted with a slot
        of its own."""
        own = schedule.admissions[-1]
        self._adapter = own.adapter
        for _ in range(self.width - 1):
            member = replace(self.request, slot=slots.pop(), blocks=[], block_hashes=[])
            self.members.append(member)
            schedule.admissions.append(replace(own, slot=member.slot))

    def vacate(self, block_size: int) -> None:
        """Drop the sequences of all beams but the request itself. Their slots and blocks have been released before."""
        self.members, self.active = [self.request], []
        self._changed = {}
        # The request's own sequence may become another one: only hashes of the prompt stay true.
        del self.request.block_hashes[len(self.request.prompt_token_ids) // block_size :]

    def restart(self) -> None:
        """Reset to a waiting request with nothing in the cache; the hypotheses stay."""
        self.members, self.active = [self.request], []
        self._changed = {}
        beams = []
        for beam in self.state.beams:
            grammar = None if self._grammar is None else self._grammar.fork()
            if grammar is not None:
                for token_id in beam.token_ids:
                    grammar.accept(token_id)
            beams.append(replace(beam, grammar=grammar))
        self.state = replace(self.state, beams=beams)
        self.request.output_token_ids = beams[0].token_ids
        self.request.grammar = beams[0].grammar

    def awaits_copy(self, member: Request) -> bool:
        """Return whether the next step copies a partial block for this sequence."""
        return self._changed.get(member.slot, (0, None))[1] is not None

    def schedule(self, scheduler: Scheduler, budget: int, schedule: Schedule, rows: list[Request]) -> int:
        """Append rows for the next tokens of all beams, or of the prompt. Returns the number of their tokens; 0 if the
        budget does not suffice, or if the request was preempted because blocks ran out."""
        request = self.request
        start, prompt = request.num_computed_tokens, len(request.prompt_token_ids)
        if not self.active and start == prompt:
            self._place(scheduler, [0] * len(self.state.beams))
        members = self.active or [request]
        count = min(self.end_of_row - start, budget // len(members))
        if count <= 0:
            return 0
        missing = [scheduler.cache.missing_blocks(member, count) for member in members]
        if not scheduler.make_room(sum(missing), request):
            return 0
        samples = start + count >= request.num_tokens
        if samples:
            scores = [beam.score for beam in self.state.beams]
            temperature = request.params.temperature or 1.0
            schedule.beams.append(
                ScheduledBeams(len(rows), schedule.num_sampled, scores, temperature, self.num_candidates)
            )
        for member, wanted in zip(members, missing, strict=True):
            if samples and self.active and _is_penalised(member):
                # The counts of penalties are set anew for each token.
                schedule.admissions.append(scheduler.admission(member, self._adapter))
                self._changed[member.slot] = (0, self._changed.get(member.slot, (0, None))[1])
            column, source = self._changed.pop(member.slot, (len(member.blocks), None))
            scheduler.cache.write_blocks(member, column, schedule)
            blocks = scheduler.pool.allocate(wanted)
            if source is not None:
                schedule.copied_blocks.append((source, blocks[0]))
            scheduler.cache.append_blocks(member, blocks, schedule)
            if self.active:
                schedule.ids[len(rows)] = member.known_ids(start, start + count)
            scheduler.append_row(member, count, schedule)
            rows.append(member)
        return count * len(members)

    def _place(self, scheduler: Scheduler, parents: list[int]) -> None:
        """Give each beam a sequence; beam i continues that of the former beam ``parents[i]``."""
        sources = self.active or [self.request]
        active: list[Request | None] = [None] * len(parents)
        for index, parent in enumerate(parents):
            if sources[parent] not in active:
                active[index] = sources[parent]
        free = [member for member in self.members if member not in active]
        if self.request in free and None not in active:
            # There are fewer beams now. The request itself must be one: it exchanges its sequence with the first.
            other = active[0]
            assert other is not None
            _exchange(self.request, other)
            active[0] = self.request
            free[free.index(self.request)] = other
        for index, parent in enumerate(parents):
            if active[index] is None:
                active[index] = free.pop(0)
                self._fork(scheduler, sources[parent], active[index])
        for member in free:
            scheduler.pool.release(member.blocks)
            member.blocks, member.num_cached_blocks = [], 0
        self.active = [member for member in active if member is not None]
        for member, beam in zip(self.active, self.state.beams, strict=True):
            member.output_token_ids, member.grammar = beam.token_ids, beam.grammar
            member.num_in_flight = 0
            member.num_tokens = len(member.prompt_token_ids) + len(beam.token_ids)

    def _fork(self, scheduler: Scheduler, source: Request, target: Request | None) -> None:
        """Make ``target`` share the blocks with the computed tokens of ``source``."""
        assert target is not None
        size = scheduler.limits.block_size
        computed = source.num_computed_tokens
        full = computed // size
        shared, held = source.blocks[:full], target.blocks
        same = next((i for i, pair in enumerate(zip(shared, held, strict=False)) if pair[0] != pair[1]), None)
        if same is None:
            same = min(len(shared), len(held))
        scheduler.pool.share(shared[same:])
        scheduler.pool.release(held[same:])
        target.blocks = shared
        target.block_hashes = source.block_hashes[:full]
        target.num_cached_blocks = min(source.num_cached_blocks, full)
        target.next_full_at = source.next_full_at
        target.num_computed_tokens = computed
        self._changed[target.slot] = (same, source.blocks[full] if computed % size else None)


def _is_penalised(request: Request) -> bool:
    params = request.params
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)


def _exchange(one: Request, other: Request) -> None:
    """Exchange the slots and the blocks of two sequences."""
    for name in (
        "slot",
        "blocks",
        "block_hashes",
        "num_cached_blocks",
        "next_full_at",
        "num_computed_tokens",
    ):
        mine, its = getattr(one, name), getattr(other, name)
        setattr(one, name, its)
        setattr(other, name, mine)
