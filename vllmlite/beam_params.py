"""Parameters of beam search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from vllmlite.errors import ParameterError

MAX_WIDTH = 128


@dataclass(frozen=True, slots=True)
class BeamOptions:
    """Options of beam search. Raises :class:`ParameterError` for invalid values."""

    width: int
    """Number of beams (1 to 128)."""
    length_penalty: float = 1.0
    """Hypotheses that have ended are compared by the sum of their log-probabilities, divided by the number of generated
    tokens to the power of this: above 0 prefers long ones, below 0 short ones."""
    early_stopping: bool | Literal["never"] = False
    """Once as many hypotheses as there are beams have ended, True ends the search; False ends it if the best beam, at
    its present length, is no better than the worst of them; "never" if no beam can become better, up to the longest
    length, for a length penalty above 0."""

    def __post_init__(self) -> None:
        """Check all fields."""
        if type(self.width) is not int or not 1 <= self.width <= MAX_WIDTH:
            raise ParameterError("beam_width", self.width, f"must be an integer from 1 to {MAX_WIDTH}")
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, Real) or not math.isfinite(penalty):
            raise ParameterError("length_penalty", penalty, "must be a finite number")
        if abs(penalty) > 32:
            raise ParameterError("length_penalty", penalty, "must be from -32 to 32")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ParameterError("early_stopping", self.early_stopping, 'must be True, False or "never"')


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Parameters of :meth:`LLM.beam_search`, under vLLM's names."""

    beam_width: int
    """Number of beams, and of sequences that are returned."""
    max_tokens: int
    """Maximum number of tokens to generate."""
    ignore_eos: bool = False
    """Continue past the model's end-of-text tokens."""
    temperature: float = 0.0
    """Divides the logits; 0: they are used as they are."""
    length_penalty: float = 1.0
    """A sequence's score is its log-probability divided by the number of its generated tokens to this power."""
    early_stopping: bool | Literal["never"] = False
    """When to stop, once ``beam_width`` sequences have finished: True: at once; False: if the best beam, at its present
    length, is no better than the worst of them; "never": if no beam can become better."""
    include_stop_str_in_output: bool = False
    """Keep the token that ended a sequence."""
