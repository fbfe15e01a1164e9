"""Rejection sampling: verification of drafts that were drawn at random (Leviathan et al. 2023, Chen et al. 2023).

A draft x that was drawn from the distribution q is accepted with the probability min(1, p(x) / q(x)), where p is the
distribution of the id at its position by the model and the request's parameters. A rejected draft is replaced by an id
that is drawn from the positive part of p - q, and the drafts after it are dropped. After the last draft an id is drawn
from p. Every id then follows p, and a draft is accepted with the highest probability that allows this.

Random numbers are those of (seed, position), with different seeds for drawing drafts and for accepting them. Which of
them are used for an id depends on the drafts before it, so the text of a seed depends on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import ForwardBatch, SlotParams, Slots, Tensor
from vllmlite.backends.sampling import Sampled, uniform
from vllmlite.config.speculative import FIELD, PROBABILISTIC
from vllmlite.errors import ParameterError

_DRAWING, _ACCEPTANCE = 0xA0761D6478BD642F, 0xE7037ED1A0B428DB
"""Constants that are added to a request's seed, for the random numbers of drawing drafts and of accepting them."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A draft, and the distribution from which it was drawn."""

    position: int
    token_id: int
    probability: float
    """Probability of ``token_id``."""
    ids: NDArray[np.int32] | None
    """The id of each of ``probabilities``; None: entry i belongs to id i."""
    probabilities: NDArray[np.float32]

    def subtracted_from(self, target: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the positive part of ``target`` minus this distribution; 0 for the draft itself."""
        rest = target.astype(np.float64)
        size = min(len(rest), len(self.probabilities))
        if self.ids is None:
            rest[:size] -= self.probabilities[:size]
        else:
            np.subtract.at(rest, self.ids, self.probabilities)
        rest[self.token_id : self.token_id + 1] = 0.0
        return np.maximum(rest, 0.0)


class RejectionSampler:
    """Verifies drafts by rejection sampling: keeps the parameters of the sequences in the slots, and the distributions
    of their drafts."""

    def __init__(self, backend: Backend) -> None:
        """Verify on ``backend``. Raises ParameterError if it does not give distributions."""
        if not backend.gives_probabilities:
            raise ParameterError(
                f"{FIELD}.draft_sample_method",
                PROBABILISTIC,
                f"needs backend cpu or torch; this is {backend.name}",
            )
        self._backend = backend
        self._params: dict[int, SlotParams] = {}
        self._drawn: dict[int, list[Drawn]] = {}

    def admit(self, slot: int, params: SlotParams) -> None:
        """Begin a sequence with ``params`` in ``slot``."""
        self._params[slot] = params
        self._drawn.pop(slot, None)

    def draft_params(self, slot: int) -> SlotParams:
        """Return the sampling parameters with which drafts for ``slot`` are drawn: those of its sequence that do not
        depend on the text, with a seed of their own."""
        params = self._params[slot]
        return SlotParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=(params.seed + _DRAWING) % 2**64,
        )

    def begin(self, slots: Sequence[int]) -> None:
        """Forget the drafts that were proposed for ``slots`` before."""
        self._drawn.update((slot, []) for slot in slots)

    def add(
        self,
        slot: int,
        position: int,
        token_id: int,
        place: int,
        probabilities: NDArray[np.float32],
        ids: NDArray[np.int32] | None = None,
    ) -> None:
        """Record that ``token_id``, which is entry ``place`` of ``probabilities``, was drafted for ``position`` in
        ``slot``. ``ids`` are the ids of the entries; None: entry i belongs to id i."""
        self._drawn[slot].append(Drawn(position, token_id, float(probabilities[place]), ids, probabilities))

    def concerns(self, batch: ForwardBatch) -> bool:
        """Return whether drafts were drawn for a slot from which ``batch`` samples. They need not be in the batch: a
        draft that a grammar forbids, for example, is left out, and counts as rejected."""
        return not self._drawn.keys().isdisjoint(batch.sample_slots.tolist())

    def sample(self, logits: Tensor, slots: Slots, batch: ForwardBatch, uploaded: Tensor) -> Sampled:
        """Choose ids as ``Backend.sample`` does, but verify drafts by rejection sampling, after waiting for the logits.
        ``batch`` is the host's batch of ``uploaded``.

        The replacement of a rejected draft is a different id, so that ``Backend.accept`` recognises the rejection. Ids
        after a rejected draft are 0."""
        found = self._backend.to_host(self._backend.probabilities(logits, slots, uploaded))
        ids = np.zeros(len(found), np.int32)
        sample_slots, tokens = batch.sample_slots.tolist(), batch.token_ids[batch.logits_rows].tolist()
        positions = batch.sample_positions.tolist()
        row = 0
        while row < len(ids):
            slot = sample_slots[row]
            end = row + 1
            while end < len(ids) and sample_slots[end] == slot:
                end += 1
            chosen = self._verified(slot, tokens[row + 1 : end], positions[row], found[row:end])
            ids[row : row + len(chosen)] = chosen
            row = end
        k = batch.num_logprobs
        placed = self._backend.tensor(ids)
        return Sampled(placed, self._backend.logprobs(logits, placed, k) if k >= 0 else None)

    def _verified(self, slot: int, drafts: list[int], position: int, found: NDArray[np.float32]) -> list[int]:
        """Return the accepted ones of ``drafts``, and the id after them. ``found`` are the model's distributions at the
        positions from ``position``: one for each draft, and one more.

        A draft that was drawn for the last position, but is not in the step, is verified as well: why it was left out
        may depend on its id, and then an id drawn from p would not make up for it."""
        seed, drawn = self._params[slot].seed, {each.position: each for each in self._drawn.pop(slot, [])}
        for count, target in enumerate(found):
            at = position + count
            draft = drafts[count] if count < len(drafts) else None
            one = drawn.get(at)
            if draft is not None and (one is None or one.token_id != draft):
                one = Drawn(at, draft, 1.0, np.array([draft], np.int32), np.ones(1, np.float32))
            if one is None:
                return [*drafts, _draw(target.astype(np.float64), uniform(seed, at))]
            chance = target[one.token_id] if one.token_id < len(target) else 0.0
            if uniform((seed + _ACCEPTANCE) % 2**64, at) * one.probability >= chance:
                rest = one.subtracted_from(target)
                if not rest.any():  # p and q are equal but for rounding
                    rest = target.astype(np.float64)
                    rest[one.token_id : one.token_id + 1] = 0.0
                return [*drafts[:count], _draw(rest, uniform(seed, at))]
            if draft is None:
                return [*drafts, one.token_id]
        raise AssertionError("there is a distribution for each draft, and one more")


def _draw(weights: NDArray[np.float64], number: float) -> int:
    """Return the first index at which the sum of ``weights`` exceeds ``number`` times their total."""
    sums = weights.cumsum()
    return int(min(sums.searchsorted(number * sums[-1], side="right"), len(sums) - 1))
