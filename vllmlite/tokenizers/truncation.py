"""Truncation of prompts to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllmlite.errors import ParameterError

SIDES = ("left", "right")


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep at most ``keep`` tokens; ``side`` is the end at which tokens are dropped."""

    keep: int
    side: str = "left"

    def of(self, ids: Sequence[int], before: int = 0, after: int = 0) -> list[int]:
        """Return ``ids`` truncated, keeping the first ``before`` and last ``after`` ids, which the tokenizer added.

        If that would leave no other id, they are not spared."""
        if len(ids) <= self.keep:
            return list(ids)
        if before + after >= self.keep:
            before = after = 0
        begin, end = before, len(ids) - after
        middle = self.keep - before - after
        if self.side == "left":
            begin = end - middle
        else:
            end = begin + middle
        return [*ids[:before], *ids[begin:end], *ids[len(ids) - after :]]


def check_truncation(tokens: int | None, side: str | None) -> None:
    """Raise :class:`ParameterError` for invalid ``truncate_prompt_tokens`` or ``truncation_side``."""
    if tokens is not None and (type(tokens) is not int or (tokens < 1 and tokens != -1)):
        raise ParameterError("truncate_prompt_tokens", tokens, "must be at least 1, or -1")
    if side is not None and side not in SIDES:
        raise ParameterError("truncation_side", side, f"must be {' or '.join(SIDES)}")
