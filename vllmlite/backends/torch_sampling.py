"""Sampling of the torch reference: the state per slot, and choosing ids from logits.

Sampling parameters stay on the host; :func:`plan` turns those of a step's rows into a few arrays that are uploaded with
the batch. The device only keeps block tables, last ids and, once a slot has penalties, token counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from vllmlite.backends.batch import ForwardBatch, SlotParams, SlotSpec
from vllmlite.backends.sampling import Continuations, Logprobs
from vllmlite.backends.torch_attention import Put

_HEAD = 1024  # up to this many largest logits use topk; more sort all
_CHUNK = 2**22  # logits per pass of log-probabilities


class TorchSlots:
    """The device state of ``spec.max_slots`` sequences."""

    def __init__(self, spec: SlotSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.block_table = torch.zeros((spec.max_slots, spec.max_blocks), dtype=torch.int32, device=device)
        self.last_id = torch.zeros(spec.max_slots, dtype=torch.int32, device=device)
        self.params = [SlotParams()] * spec.max_slots
        self.counts: torch.Tensor | None = None
        """int32 [max_slots, V]: how often each id was generated; allocated for the first slot with penalties."""
        self.prompt: torch.Tensor | None = None
        """bool [max_slots, V]: whether the prompt contains the id."""

    def set(self, slot: int, params: SlotParams) -> None:
        """Assign ``slot`` to a new sequence."""
        self.params[slot] = params
        if not penalised(params):
            return
        if self.counts is None or self.prompt is None:
            shape = (self.spec.max_slots, self.spec.vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        generated = np.bincount(np.asarray(params.output_ids, np.int64), minlength=self.spec.vocab_size)
        prompt = np.zeros(self.spec.vocab_size, np.bool_)
        prompt[np.asarray(params.prompt_ids, np.int64)] = True
        self.counts[slot] = torch.from_numpy(generated).to(self.device, torch.int32)
        self.prompt[slot] = torch.from_numpy(prompt).to(self.device)

    def check_blocks(
        self, slot_ids: NDArray[np.int32], columns: NDArray[np.int32], blocks: NDArray[np.int32]
    ) -> None:
        """Raise IndexError for an entry outside the block table, or a block outside the pool."""
        limits = (
            ("slot", slot_ids, self.spec.max_slots),
            ("block table column", columns, self.spec.max_blocks),
            ("block", blocks, self.spec.num_blocks),
        )
        for what, values, limit in limits:
            wrong = values[(values < 0) | (values >= limit)]
            if len(wrong):
                raise IndexError(f"{what} {wrong[0]} is not within 0 and {limit - 1}")


def penalised(params: SlotParams) -> bool:
    """Return whether any penalty is set."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


@dataclass(slots=True)
class SamplePlan:
    """Device data for the sampling of one step; None where no row needs it. Rows are indices into N."""

    edits: bool = False
    """Whether logits are changed before sampling."""
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Rows, ids, and the values added to their logits."""
    penalties: PenaltyPlan | None = None
    random: RandomPlan | None = None
    drafts: DraftPlan | None = None


@dataclass(slots=True)
class PenaltyPlan:
    """The rows with penalties."""

    rows: torch.Tensor
    slots: torch.Tensor
    strength: torch.Tensor
    """float32 [3, rows, 1]: repetition, frequency and presence penalties."""
    drafted: tuple[torch.Tensor, torch.Tensor] | None
    """Pairs of an index into ``rows`` and a token of the batch that was drafted before that row."""


@dataclass(slots=True)
class DraftPlan:
    """Grouping of the sampled positions by slot, if a slot has several."""

    starts: torch.Tensor
    """int64 [N]: the first row of each row's slot."""
    firsts: torch.Tensor
    """int64 [S]: the first row of each slot."""
    slot_of_row: torch.Tensor
    """int64 [N]: indices into ``firsts``."""


@dataclass(slots=True)
class RandomPlan:
    """The rows that sample randomly."""

    rows: torch.Tensor | None
    """Indices of the rows; None if all rows sample randomly."""
    numbers: torch.Tensor
    """float64 [4, rows, 1]: temperature, log of min_p, top_p, random number."""
    top_k: torch.Tensor | None
    """int64 [rows, 1], 0 where off; None if off in all rows."""
    most: int
    """Largest top_k, or 0 if at least one row has none."""
    top_p: bool


def plan(batch: ForwardBatch, slots: TorchSlots, put: Put) -> SamplePlan:
    """Return the plan of a host ``batch``; ``put`` copies arrays to the device."""
    params = [slots.params[slot] for slot in batch.sample_slots.tolist()]
    made = SamplePlan(edits=batch.mask_rows is not None)
    starts = _starts(batch)
    if (starts != np.arange(len(starts))).any():
        firsts, slot_of_row = np.unique(starts, return_inverse=True)
        made.drafts = DraftPlan(*put(starts, firsts, slot_of_row))
    entries = [(row, *entry) for row, one in enumerate(params) for entry in one.logit_bias]
    if entries:
        columns = [np.array(column) for column in zip(*entries, strict=True)]
        rows, ids, values = put(*columns[:2], columns[2].astype(np.float32))
        made.bias = (rows, ids, values)
    penalties = [row for row, one in enumerate(params) if penalised(one)]
    if penalties:
        made.penalties = _plan_penalties(params, penalties, starts, batch, put)
    which = [row for row, one in enumerate(params) if one.temperature > 0]
    if which:
        made.random = _plan_random([params[row] for row in which], which, batch, put)
    made.edits |= bool(entries or penalties)
    return made


def _starts(batch: ForwardBatch) -> NDArray[np.int64]:
    """Return the first row of each row's slot."""
    slots = np.asarray(batch.sample_slots)
    is_first = np.ones(len(slots), np.bool_)
    is_first[1:] = slots[1:] != slots[:-1]
    return np.maximum.accumulate(np.where(is_first, np.arange(len(slots)), 0))


def _plan_penalties(
    params: list[SlotParams], which: list[int], starts: NDArray[np.int64], batch: ForwardBatch, put: Put
) -> PenaltyPlan:
    kinds = ("repetition", "frequency", "presence")
    strength = [[getattr(params[row], f"{kind}_penalty") for row in which] for kind in kinds]
    drafted = [
        (place, token)
        for place, row in enumerate(which)
        for token in range(batch.logits_rows[starts[row]] + 1, batch.logits_rows[row] + 1)
    ]
    pairs = np.array(drafted, np.int64).reshape(-1, 2)
    rows, slot_ids, values, places, tokens = put(
        np.array(which),
        batch.sample_slots[which].astype(np.int64),
        np.array(strength, np.float32)[:, :, None],
        *pairs.T,
    )
    return PenaltyPlan(rows, slot_ids, values, (places, tokens) if drafted else None)


def _plan_random(params: list[SlotParams], which: list[int], batch: ForwardBatch, put: Put) -> RandomPlan:
    draws = uniforms(
        np.array([one.seed for one in params], np.uint64), np.asarray(batch.sample_positions)[which]
    )
    numbers = np.ones((4, len(which), 1))
    numbers[0, :, 0] = [one.temperature for one in params]
    with np.errstate(divide="ignore"):
        numbers[1, :, 0] = np.log([one.min_p for one in params])
    numbers[3, :, 0] = draws
    top_k = np.zeros((len(which), 1), np.int64)
    numbers[2, :, 0] = [one.top_p for one in params]
    top_k[:, 0] = [one.top_k for one in params]
    placed = put(np.array(which), numbers, top_k)
    return RandomPlan(
        rows=None if len(which) == len(batch.sample_slots) else placed[0],
        numbers=placed[1],
        top_k=placed[2] if top_k.any() else None,
        most=int(top_k.max()) if top_k.all() else 0,
        top_p=bool((numbers[2] < 1).any()),
    )


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return :func:`~vllmlite.backends.sampling.uniform` of each pair, bit for bit."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    counter = (positions.astype(np.uint64) + np.uint64(1)) * golden
    return (_mix64(_mix64(seeds + golden) + counter) >> np.uint64(40)).astype(np.float64) * 2.0**-24


def _mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def edit(logits: torch.Tensor, slots: TorchSlots, batch: ForwardBatch) -> None:
    """Apply bias, bitmask and penalties in place."""
    made: SamplePlan = batch.backend.sampling
    if made.bias is not None:
        rows, ids, values = made.bias
        logits.index_put_((rows, ids), values, accumulate=True)
    if batch.mask_rows is not None and batch.bitmask is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (batch.bitmask[:, :, None] >> bits & 1).bool().flatten(1)[:, : logits.shape[1]]
        rows = batch.mask_rows.long()
        logits[rows] = logits[rows].masked_fill_(~allowed, -torch.inf)
    if made.penalties is not None and slots.counts is not None and slots.prompt is not None:
        rows, slot_ids = made.penalties.rows, made.penalties.slots
        repetition, frequency, presence = made.penalties.strength
        some, counts = logits[rows], slots.counts[slot_ids]
        if made.penalties.drafted is not None:
            places, tokens = made.penalties.drafted
            ids = batch.token_ids[tokens].long()
            counts.index_put_((places, ids), torch.ones_like(ids, dtype=torch.int32), accumulate=True)
        seen = slots.prompt[slot_ids] | (counts > 0)
        some = torch.where(seen, torch.where(some > 0, some / repetition, some * repetition), some)
        logits[rows] = some - frequency * counts - presence * (counts > 0)


def without_nan(logits: torch.Tensor) -> torch.Tensor:
    """Return ``logits`` with NaN replaced by -inf."""
    return logits.nan_to_num(-torch.inf, torch.inf, -torch.inf)


def choose(logits: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """Return the sampled int32 ids [N] for edited ``logits``."""
    made: SamplePlan = batch.backend.sampling
    ids = logits.argmax(-1)
    if made.random is not None:
        rows = slice(None) if made.random.rows is None else made.random.rows
        some = logits[rows]
        # A row whose largest logit is infinite takes the argmax instead of a random draw.
        ids[rows] = torch.where(some.amax(-1).isfinite(), draw(some, made.random), ids[rows])
    return ids.int()


def accept(ids: torch.Tensor, slots: TorchSlots, batch: ForwardBatch) -> torch.Tensor:
    """Compare the sampled ``ids [N]`` with the drafts of ``batch``, and record the accepted ids in the slots. Returns
    int32 ``[N]``: 1 for accepted. A slot's first id is accepted, and a further one if the id before it was accepted and
    equals the draft."""
    made: SamplePlan = batch.backend.sampling
    accepted, sample_slots, last = torch.ones_like(ids), batch.sample_slots.long(), ids
    if made.drafts is not None:
        starts, firsts, slot_of_row = made.drafts.starts, made.drafts.firsts, made.drafts.slot_of_row
        rows = torch.arange(len(ids), device=ids.device)
        wrong = (rows != starts) & (ids.roll(1) != batch.token_ids[batch.logits_rows.long()])
        wrongs = wrong.cumsum(0)
        accepted = (wrongs == wrongs[starts]).int()
        counts = torch.zeros_like(firsts).index_add_(0, slot_of_row, accepted.long())
        last, sample_slots = ids[firsts + counts - 1], sample_slots[firsts]
    slots.last_id[sample_slots] = last
    if made.penalties is not None and slots.counts is not None:
        rows = made.penalties.rows
        slots.counts.index_put_((made.penalties.slots, ids[rows].long()), accepted[rows], accumulate=True)
    return accepted


def probabilities(logits: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """Return the float32 distributions [N, V] from which :func:`choose` takes ids."""
    made: SamplePlan = batch.backend.sampling
    best = logits.argmax(-1, keepdim=True)
    found = torch.zeros_like(logits).scatter_(1, best, 1)
    if made.random is not None:
        rows = slice(None) if made.random.rows is None else made.random.rows
        some = logits[rows]
        weights = filtered(some, made.random)
        drawn = (weights / weights.sum(-1, keepdim=True)).float()
        found[rows] = torch.where(some.amax(-1, keepdim=True).isfinite(), drawn, found[rows])
    return found


def draw(logits: torch.Tensor, random: RandomPlan) -> torch.Tensor:
    """Return int64 ids [rows]: step 5 of ``Backend.sample``."""
    cumulative = filtered(logits, random).cumsum(-1)
    ids = torch.searchsorted(cumulative, random.numbers[3] * cumulative[:, -1:], right=True)
    return ids[:, 0].clamp_(max=logits.shape[1] - 1)


def filtered(logits: torch.Tensor, random: RandomPlan) -> torch.Tensor:
    """Return unnormalised probabilities, float64: 0 for ids that min_p, top_k or top_p drop.

    Each filter is expressed as a least logit, so that equal logits are kept or dropped together; top_p is a fraction of
    what min_p and top_k keep."""
    temperature, least_log, top_p, _ = random.numbers
    # Subtract the largest logit first, so that no temperature overflows and the largest probability is exp(0).
    x = (logits - logits.amax(-1, keepdim=True)).div_(temperature.float())
    least = least_log.float()
    ordered = None
    if random.top_k is not None:
        ordered = _largest(x, random.most)
        kth = ordered.gather(1, random.top_k.clamp(1, ordered.shape[1]) - 1)
        least = torch.maximum(least, torch.where(random.top_k > 0, kth, -torch.inf))
    weights = _weights(x, least)
    if random.top_p:
        least = torch.maximum(least, _nucleus(x, weights, least, top_p, ordered))
        weights = _weights(x, least)
    return weights


def _weights(x: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return unnormalised probabilities of the logits from ``least`` up, in float64 for exact sums."""
    return x.exp().masked_fill_(x < least, 0).double()


def _largest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ``count`` largest logits of each row, descending; all for ``count`` 0 or if ``count`` is large."""
    if 0 < count <= _HEAD and count < x.shape[1]:
        return x.topk(count, dim=-1).values
    if x.device.type == "cpu":
        # numpy sorts values with vector instructions, some thirty times faster than torch, which also sorts indices.
        return torch.from_numpy(np.sort(x.numpy(), axis=-1)).flip(-1)
    return x.sort(dim=-1, descending=True).values


def _nucleus(
    x: torch.Tensor,
    weights: torch.Tensor,
    least: torch.Tensor,
    top_p: torch.Tensor,
    ordered: torch.Tensor | None,
) -> torch.Tensor:
    """Return the least logit of the smallest set whose weight reaches ``top_p`` of the total (Holtzman et al. 2020)."""
    aim = weights.sum(-1, keepdim=True) * top_p
    if ordered is None:
        ordered = _largest(x, 0)
    # Logits equal to the cut-off but beyond ``ordered`` equal its last entry, which then is the answer.
    descending = _weights(ordered, least)
    before = descending.cumsum(-1) - descending
    inside = (before < aim) & (ordered >= least)
    cut = ordered.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
    return torch.where(top_p < 1, cut, -torch.inf)


def logprobs(logits: torch.Tensor, ids: torch.Tensor, k: int) -> Logprobs:
    """Return log-probabilities of ``ids [N]`` and of the ``k`` most likely ids; see ``Backend.logprobs``."""
    k = min(k, logits.shape[1])
    step = max(1, _CHUNK // logits.shape[1])
    parts = [_logprobs(logits[at : at + step], ids[at : at + step], k) for at in range(0, len(ids), step)]
    if not parts:
        parts = [_logprobs(logits, ids, k)]
    return Logprobs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the softmax of each row; 0 for +inf."""
    return _logprob(logits, logits.logsumexp(-1, keepdim=True))


def _logprob(logit: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.where(logit.isinf(), torch.where(logit > 0, 0, logit), logit - total)


def _keys(numbers: torch.Tensor) -> torch.Tensor:
    """Return integers that order the elements of each row by (number, descending index), for exact ranks and ties."""
    bits = (numbers + 0.0).view(torch.int32)  # adding zero turns -0 into 0
    keys = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32
    return keys.sub_(torch.arange(numbers.shape[-1], device=numbers.device))


def best_continuations(scores: torch.Tensor, groups: list[int], k: int) -> Continuations:
    """Return the ``k`` best of ``scores [M, V]`` in each group of rows; see ``Backend.choose_beams``."""
    vocab_size = scores.shape[1]
    shape = (len(groups) - 1, k)
    found = Continuations(
        torch.full(shape, -1, dtype=torch.int32, device=scores.device),
        torch.full(shape, -1, dtype=torch.int32, device=scores.device),
        torch.full(shape, -torch.inf, device=scores.device),
    )
    for group, (first, last) in enumerate(pairwise(groups)):
        own = scores[first:last].flatten()
        best = _keys(own).topk(min(k, len(own))).indices
        exists = own[best] > -torch.inf
        count = len(best)
        found.rows[group, :count] = torch.where(exists, best // vocab_size, -1).int()
        found.ids[group, :count] = torch.where(exists, best % vocab_size, -1).int()
        found.scores[group, :count] = own[best]
    return found


def _logprobs(logits: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    index = ids.long()[:, None]
    total = logits.logsumexp(-1, keepdim=True)
    keys = _keys(logits)
    rank = (keys > keys.gather(1, index)).sum(-1) + 1
    top_ids = keys.topk(k, dim=-1).indices
    chosen = _logprob(logits.gather(1, index), total)[:, 0]
    return chosen, rank.int(), top_ids.int(), _logprob(logits.gather(1, top_ids), total)
