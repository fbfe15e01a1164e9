"""Checks of requests against an engine's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllmlite.beam_params import BeamOptions
from vllmlite.engine.thinking import ReasoningMarks
from vllmlite.errors import ContextLengthError, ParameterError
from vllmlite.sampling_params import SamplingParams
from vllmlite.tokenizers.truncation import Truncation

MAX_ENDS = 1 << 14
"""Maximum of a request's number of beams times the number of ids that end its output: each step reads as many
continuations."""


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """Limits against which requests are checked. A plain value, so that the client of an engine in another process can
    refuse a request without asking the engine."""

    vocab_size: int
    eos_ids: frozenset[int]
    """Ids that end an output, unless the request has ``ignore_eos``."""
    max_model_len: int
    """Most tokens in a sequence, prompt and output together."""
    max_logprobs: int
    """Most log-probabilities for each token; -1: no limit."""
    reasoning: ReasoningMarks | None = None
    """The token ids that open and close the model's reasoning; None if they are not known."""
    max_beams: int = 0
    """Most beams of a request: each takes a row of a step. 0: beam search cannot run."""
    num_blocks: int = 0
    """Size of the block pool."""
    block_size: int = 1

    def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        bad_words: Sequence[Sequence[int]],
        *,
        generates: bool = True,
    ) -> list[int]:
        """Return the prompt, truncated if ``params`` ask for it. Raises :class:`ParameterError` if the request can
        never be served.

        ``generates``: whether the request needs room in the context for at least one new token."""
        params.check_vocabulary(self.vocab_size, self.max_logprobs)
        prompt = self._checked_prompt(list(prompt_token_ids), params, generates)
        self._check_something_is_allowed(params, bad_words)
        if params.thinking_token_budget is not None:
            self._check_thinking(params, bad_words)
        if params.beams is not None:
            self._check_beams(params.beams, len(prompt), params)
        return prompt

    def truncation(self, params: SamplingParams, *, generates: bool = True) -> Truncation | None:
        """Return how ``params`` truncate a prompt, or None if they do not.

        With ``truncate_prompt_tokens=-1``, the prompt keeps what ``max_tokens`` leaves of the context; raises
        :class:`ParameterError` if that is nothing."""
        keep = params.truncate_prompt_tokens
        if keep is None:
            return None
        if keep == -1:
            keep = self.max_model_len - ((params.max_tokens or 1) if generates else 0)
            if keep < 1:
                raise ParameterError(
                    "max_tokens",
                    params.max_tokens,
                    f"leaves no room for a prompt with truncate_prompt_tokens=-1: must be below {self.max_model_len}",
                )
        return Truncation(keep, params.truncation_side or "left")

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise :class:`ParameterError` unless all of ``ids`` are in the vocabulary."""
        for wrong in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= wrong < self.vocab_size:
                raise ParameterError(
                    "prompt_token_ids", wrong, f"must be ids from 0 to {self.vocab_size - 1}"
                )

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Return the ids that end the output of a request with ``params``."""
        listed = frozenset(params.stop_token_ids or ())
        return listed if params.ignore_eos else listed | self.eos_ids

    def _checked_prompt(self, prompt: list[int], params: SamplingParams, generates: bool) -> list[int]:
        truncation = self.truncation(params, generates=generates)
        if truncation is not None:
            prompt = truncation.of(prompt)
        longest = self.max_model_len
        if not prompt:
            raise ParameterError("prompt", "", "must hold at least one token")
        max_prompt = longest - 1 if generates else longest
        if len(prompt) > max_prompt:
            raise ContextLengthError("prompt", len(prompt), max_prompt, longest)
        self.check_ids(prompt)
        return prompt

    def _check_thinking(self, params: SamplingParams, bad_words: Sequence[Sequence[int]]) -> None:
        """Raise :class:`ParameterError` if ``thinking_token_budget`` could not be enforced."""
        budget = params.thinking_token_budget
        if self.reasoning is None:
            raise ParameterError(
                "thinking_token_budget",
                budget,
                "needs the marks of the model's reasoning: --reasoning-parser or reasoning_config",
            )
        closing = set(self.reasoning.closing)
        banned = {word[-1] for word in bad_words}
        if params.min_tokens > 0:
            banned |= self.stop_ids(params) | self.eos_ids
        allowed = closing if params.allowed_token_ids is None else set(params.allowed_token_ids)
        if closing & banned or not closing <= allowed:
            raise ParameterError(
                "thinking_token_budget",
                budget,
                "must be able to end the reasoning: allowed_token_ids, bad_words or min_tokens forbid its closing mark",
            )

    def _check_beams(self, beams: BeamOptions, prompt: int, params: SamplingParams) -> None:
        """Raise :class:`ParameterError` if beams of a prompt of ``prompt`` tokens could not run side by side."""
        if not self.max_beams:
            raise ParameterError(
                "beam_width",
                beams.width,
                "beam search cannot run beside speculation with a draft model or heads; beside n-grams it can",
            )
        if beams.width > self.max_beams:
            raise ParameterError(
                "beam_width",
                beams.width,
                f"must be at most {self.max_beams}: a step has max_num_seqs rows and max_num_batched_tokens tokens",
            )
        ends = len(self.stop_ids(params))
        if ends * beams.width > MAX_ENDS:
            raise ParameterError(
                "stop_token_ids",
                ends,
                f"ids may end an output: must be at most {MAX_ENDS // beams.width} with {beams.width} beams",
            )
        longest = min(self.max_model_len, prompt + (params.max_tokens or self.max_model_len))
        needed = most_blocks(beams.width, prompt, longest, self.block_size)
        if needed > self.num_blocks:
            raise ParameterError(
                "beam_width",
                beams.width,
                f"may need {needed} blocks of key/value cache for {longest} tokens, and there are {self.num_blocks}: "
                "lower it or max_tokens, or enlarge the cache",
            )

    def _check_something_is_allowed(self, params: SamplingParams, bad_words: Sequence[Sequence[int]]) -> None:
        """Raise :class:`ParameterError` if ``bad_words`` and ``min_tokens`` ban all of ``allowed_token_ids``."""
        if params.allowed_token_ids is None:
            return
        banned = {word[-1] for word in bad_words}
        if params.min_tokens > 0:
            banned |= self.stop_ids(params) | self.eos_ids
        if not set(params.allowed_token_ids) - banned:
            raise ParameterError(
                "allowed_token_ids",
                params.allowed_token_ids,
                "must leave an id that bad_words and min_tokens do not ban",
            )


def most_blocks(width: int, prompt: int, num_tokens: int, block_size: int) -> int:
    """Return the most blocks that ``width`` beams of ``num_tokens`` need, which share the full ones of their prompt."""
    each = -(-num_tokens // block_size)
    return each + (width - 1) * (each - prompt // block_size)
