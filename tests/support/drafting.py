"""Proposers that know a text, and a policy by which drafts always pay, for tests of speculative decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllmlite import LLM
from vllmlite.engine.drafts import StepCost
from vllmlite.runner.propose.proposer import Proposer


class KnownText(Proposer):
    """A proposer whose drafts depend on a slot's known ids alone, by :meth:`drafts`."""

    def __init__(self) -> None:
        self._slots: dict[int, list[int]] = {}

    def drafts(self, known: Sequence[int], count: int) -> list[int]:
        """Return at most ``count`` drafts after the ids that :meth:`admit` kept and those since."""
        raise NotImplementedError

    def admit(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        self._slots[slot] = list(token_ids)

    def launch(self, slots: Sequence[int]) -> list[list[int]]:
        return [self._slots[slot] for slot in slots]

    def collect(
        self, handle: list[list[int]], token_ids: Sequence[list[int]], wanted: Sequence[int]
    ) -> list[list[int]]:
        found = []
        for known, ids, count in zip(handle, token_ids, wanted, strict=True):
            known += ids
            found.append(self.drafts(known, count))
        return found


def let_drafts_pay(llm: LLM) -> None:
    """Have an engine take drafts as free, whatever the machine's times are."""
    scheduler = llm.llm_engine.engine.scheduler
    free = StepCost([(1, 1.0), (2, 1.0)])
    scheduler.drafting = replace(scheduler.drafting, cost=free, draft_cost=None, _costs={})
