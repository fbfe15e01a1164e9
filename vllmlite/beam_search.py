"""Beam search under vLLM's names: the outputs of :meth:`LLM.beam_search`, and the conversion of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllmlite.beam_params import BeamOptions, BeamSearchParams
from vllmlite.errors import ParameterError
from vllmlite.outputs import RequestOutput
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.tokenizers.tokenizer import Tokenizer

__all__ = ["BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence"]


@dataclass(slots=True)
class BeamSearchSequence:
    """A sequence that beam search found."""

    tokens: list[int]
    """The ids of the prompt and the generated ids, including the one that ended the sequence only with
    ``include_stop_str_in_output``."""
    cum_logprob: float
    """Sum of the log-probabilities of the generated ids."""
    text: str | None
    """The text of ``tokens``; None without a tokenizer."""
    finish_reason: str | None
    """``stop`` or ``length``."""
    stop_reason: int | str | None


@dataclass(slots=True)
class BeamSearchOutput:
    """The sequences that were found for a prompt, the best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


def sampling_params(params: BeamSearchParams) -> SamplingParams:
    """Return the :class:`SamplingParams` that run the search of ``params``. Raises :class:`ParameterError` for invalid
    values."""
    if not isinstance(params, BeamSearchParams):
        raise ParameterError("params", params, "must be BeamSearchParams")
    options = BeamOptions(params.beam_width, params.length_penalty, params.early_stopping)
    return SamplingParams(
        n=params.beam_width,
        temperature=params.temperature,
        max_tokens=params.max_tokens,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
        beams=options,
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=False,
    )


def beam_search_output(
    output: RequestOutput, params: BeamSearchParams, tokenizer: Tokenizer | None
) -> BeamSearchOutput:
    """Return the output of a request in the form of vLLM's ``beam_search``."""
    found = BeamSearchOutput()
    for completion in output.outputs:
        ids: Sequence[int] = completion.token_ids
        if completion.finish_reason == "stop" and not params.include_stop_str_in_output:
            ids = ids[:-1]
        tokens = [*output.prompt_token_ids, *ids]
        found.sequences.append(
            BeamSearchSequence(
                tokens,
                completion.cumulative_logprob or 0.0,
                None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=False),
                completion.finish_reason,
                completion.stop_reason,
            )
        )
    return found
