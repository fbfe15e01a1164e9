"""Turn the engine's outputs into the users' outputs: text, stop strings, log-probabilities, and several completions for
a request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllmlite.engine.beams import Hypothesis
from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.runner_protocol import TokenLogprobs
from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.tokenizers.detokenizer import Detokenizer
from vllmlite.tokenizers.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class _Completion:
    """One sequence of an unfinished request."""

    group: _Group
    output: CompletionOutput
    detokenizer: Detokenizer | None
    first_id: int = 0
    """Number of ids before the newest engine output, where the next delta starts."""
    first_character: int = 0
    """Number of characters that were released before the newest engine output."""
    begun: EngineOutput | None = None
    """The newest engine output, set when :meth:`OutputProcessor._add_output` starts to add it."""
    added: EngineOutput | None = None
    """The newest engine output that was added completely."""
    stop: str | None = None
    """The stop string that the newest engine output completed."""


@dataclass(slots=True, eq=False)
class _Group:
    """A user's request, with its prompt, parameters and completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: dict[str, _Completion] = field(default_factory=dict)
    """The completions by their request ids in the engine."""
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None
    is_delta: bool = False
    """Whether each output contains only what is new since the previous one."""
    is_final_only: bool = False
    """Whether the user wants only the last output."""

    def __post_init__(self) -> None:
        """Derive the flags, which are read for every token."""
        self.is_delta = self.params.output_kind is RequestOutputKind.DELTA
        self.is_final_only = self.params.output_kind is RequestOutputKind.FINAL_ONLY

    def has_finished(self) -> bool:
        """Return whether every completion has ended."""
        for completion in self.completions.values():  # noqa: SIM110  (a generator costs more than the loop)
            if completion.output.finish_reason is None:
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Pooling:
    """An unfinished embedding request."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: PoolingParams


@dataclass(slots=True)
class ProcessedStep:
    """The result of processing the outputs of an engine's step."""

    ready: list[RequestOutput]
    """Outputs for the users."""
    stopped: list[tuple[str, str]]
    """(Engine request id, stop string) of sequences that the engine must end because they reached a stop string."""
    ended: list[str]
    """Ids of engine requests that have ended, pooling requests included."""
    finished: list[_Group]


class OutputProcessor:
    """Turns the outputs of the engine's sequences into outputs of the users' requests.

    Pass each step's outputs, at most one of each sequence, to :meth:`process`, then its result to :meth:`settle`.
    Either may be called again with the same argument if it was interrupted."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Start without requests. Without a ``tokenizer``, outputs have ids and no text."""
        self.errors: dict[str, str] = {}
        """Id of a request that ended with ``error`` → the reason. The caller removes entries that it has reported."""
        self._tokenizer = tokenizer
        self._groups: dict[str, _Group] = {}
        self._completions: dict[str, _Completion] = {}
        """Sequences that have not ended, by the engine's request id."""
        self._poolings: dict[str, _Pooling] = {}

    def add_pooling(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: PoolingParams
    ) -> None:
        """Add an embedding request. ``params`` must give every field that has an effect on a vector."""
        self._poolings[request_id] = _Pooling(prompt, prompt_token_ids, params)

    def add(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> dict[str, SamplingParams]:
        """Add a request; returns the engine requests that it consists of: id → parameters of one sequence.

        Raises :class:`ParameterError` if one of their ids is in use."""
        group = _Group(request_id, prompt, prompt_token_ids, params)
        if params.prompt_logprobs is not None and len(prompt_token_ids) == 1:
            group.prompt_logprobs = [None]  # the engine has nothing to say of a first token
        children = (
            {request_id: params}
            if params.n == 1 or params.beams is not None
            else _children(request_id, params)
        )
        for index, child in enumerate(children):
            if self.knows(child):
                raise ParameterError("request_id", child, "is in use by a request that has not finished")
            group.completions[child] = _Completion(
                group, self._empty_output(index, params), self._detokenizer(group)
            )
        self._groups[request_id] = group
        self._completions.update(group.completions)
        return children

    def knows(self, request_id: str) -> bool:
        """Return whether a request or a sequence of one has the id ``request_id`` and is unfinished."""
        return any(request_id in known for known in (self._groups, self._completions, self._poolings))

    @property
    def request_ids(self) -> list[str]:
        """Ids of the requests that have not finished."""
        return [*self._groups, *self._poolings]

    @property
    def num_requests(self) -> int:
        """Number of unfinished requests."""
        return len(self._groups) + len(self._poolings)

    def children(self, request_id: str) -> list[str]:
        """Return the ids of the unfinished engine requests of a request; empty if the request is unknown."""
        if request_id in self._poolings:
            return [request_id]
        group = self._groups.get(request_id)
        if group is None:
            return []
        return [child for child, one in group.completions.items() if self._completions.get(child) is one]

    def forget(self, request_id: str) -> None:
        """Drop a request and the error that it ended with."""
        self.errors.pop(request_id, None)
        for child in self.children(request_id):
            self._completions.pop(child, None)
        self._poolings.pop(request_id, None)
        self._groups.pop(request_id, None)

    def process(self, outputs: Iterable[EngineOutput]) -> ProcessedStep:
        """Add a step's outputs to their requests and make the users' outputs."""
        step = ProcessedStep([], [], [], [])
        of_several: dict[str, list[_Completion]] = {}
        for output in outputs:
            request_id = output.request_id
            completion = self._completions.get(request_id)
            if completion is None:
                pooling = self._poolings.get(request_id)
                if pooling is not None:
                    step.ready.append(self._embedding(pooling, output))
                    step.ended.append(request_id)
                continue
            if output.beams is not None:
                self._report_beams(completion.group, output, output.beams, step)
                continue
            if completion.added is not output:
                self._add_output(completion, output)
            if completion.stop is not None and output.finish_reason is None:
                step.stopped.append((request_id, completion.stop))
            if completion.output.finish_reason is not None:
                step.ended.append(request_id)
            group = completion.group
            if len(group.completions) == 1:
                self._report(group, [completion], step)
            else:
                of_several.setdefault(group.request_id, []).append(completion)
        for request_id, completions in of_several.items():
            self._report(self._groups[request_id], completions, step)
        return step

    def settle(self, step: ProcessedStep) -> None:
        """Drop the sequences and requests that ended in a step."""
        for request_id in step.ended:
            self._completions.pop(request_id, None)
            self._poolings.pop(request_id, None)
        for group in step.finished:
            self._groups.pop(group.request_id, None)
            if group.error is not None:
                self.errors[group.request_id] = group.error

    def _report(self, group: _Group, completions: Sequence[_Completion], step: ProcessedStep) -> None:
        """Add the output of a request, whose ``completions`` have changed, to ``step``, unless the user does not want
        it yet."""
        finished = group.has_finished()
        if finished:
            step.finished.append(group)
        elif group.is_final_only:
            return
        if not group.is_delta:
            completions = list(group.completions.values())
        outputs = [_delta(one) if group.is_delta else _whole(one) for one in completions]
        step.ready.append(
            RequestOutput(
                group.request_id,
                group.prompt,
                group.prompt_token_ids,
                outputs,
                finished,
                group.prompt_logprobs,
                group.num_cached_tokens,
                group.metrics,
            )
        )

    def _report_beams(
        self, group: _Group, output: EngineOutput, beams: Sequence[Hypothesis], step: ProcessedStep
    ) -> None:
        """Add the only output of a request with beams to ``step``."""
        self._note_prompt(group, output)
        step.ended.append(group.request_id)
        step.finished.append(group)
        step.ready.append(
            RequestOutput(
                group.request_id,
                group.prompt,
                group.prompt_token_ids,
                [self._hypothesis(group, index, beam) for index, beam in enumerate(beams[: group.params.n])],
                True,
                group.prompt_logprobs,
                group.num_cached_tokens,
                group.metrics,
            )
        )

    def _hypothesis(self, group: _Group, index: int, found: Hypothesis) -> CompletionOutput:
        text, detokenizer, shown = "", self._detokenizer(group), found.token_ids
        if detokenizer is not None:
            hides_end = not group.params.include_stop_str_in_output
            if found.finish_reason == "stop" and not found.ends_in_text and hides_end:
                shown = shown[:-1]
            detokenizer.extend(shown)
            detokenizer.finish()
            text = detokenizer.text
        return CompletionOutput(
            index,
            text,
            found.token_ids,
            found.cumulative_logprob,
            finish_reason=found.finish_reason,
            stop_reason=found.stop_reason,
        )

    def _note_prompt(self, group: _Group, output: EngineOutput) -> None:
        group.num_cached_tokens = output.num_cached_tokens
        group.metrics = output.metrics
        if output.prompt_logprobs is not None:
            k = group.params.prompt_logprobs or 0
            group.prompt_logprobs = [None, *(self._logprobs(entry, k) for entry in output.prompt_logprobs)]

    def _embedding(self, pooling: _Pooling, output: EngineOutput) -> RequestOutput:
        """Return the output of an embedding request, whose vector is shortened and scaled; it has no vector if a step
        failed."""
        vector: list[float] | None = None
        if output.pooled is None:
            self.errors[output.request_id] = output.error or "no vector came of it"
        else:
            vector = output.pooled[: pooling.params.dimensions]
            length = math.hypot(*vector)
            if pooling.params.normalize and length > 0:
                vector = [element / length for element in vector]
        return RequestOutput(
            request_id=output.request_id,
            prompt=pooling.prompt,
            prompt_token_ids=pooling.prompt_token_ids,
            outputs=[],
            finished=True,
            num_cached_tokens=output.num_cached_tokens,
            metrics=output.metrics,
            embedding=vector,
        )

    def _empty_output(self, index: int, params: SamplingParams) -> CompletionOutput:
        wanted = params.num_logprobs is not None
        return CompletionOutput(
            index,
            "",
            [],
            cumulative_logprob=0.0 if wanted else None,
            logprobs=[] if wanted else None,
            text_offsets=[] if wanted else None,
        )

    def _undo(self, completion: _Completion) -> None:
        """Undo an interrupted :meth:`_add_output`."""
        state, kept = completion.output, completion.first_id
        del state.token_ids[kept:]
        if state.logprobs is not None and state.text_offsets is not None:
            del state.logprobs[kept:], state.text_offsets[kept:]
            chosen = zip(state.logprobs, state.token_ids, strict=True)
            state.cumulative_logprob = sum((entry[token_id].logprob for entry, token_id in chosen), 0.0)
        state.finish_reason = state.stop_reason = None
        completion.detokenizer = self._detokenizer(completion.group)
        if completion.detokenizer is not None:
            completion.detokenizer.extend(state.token_ids)

    def _detokenizer(self, group: _Group) -> Detokenizer | None:
        params = group.params
        if self._tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(
            self._tokenizer,
            group.prompt_token_ids,
            stop=params.stop or (),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )

    def _add_output(self, completion: _Completion, output: EngineOutput) -> None:
        """Add an engine output to its sequence. If an interrupted call has added a part of the same output, that is
        undone first."""
        if completion.begun is output:
            self._undo(completion)
        group, state, detokenizer = completion.group, completion.output, completion.detokenizer
        completion.first_id = len(state.token_ids)
        if detokenizer is not None:
            completion.first_character = detokenizer.num_released
        completion.begun = output
        self._note_prompt(group, output)
        token_ids, reason, stop_reason = output.new_token_ids, output.finish_reason, output.stop_reason
        offsets = None if output.logprobs is None else state.text_offsets
        stop: str | None = None
        if detokenizer is None:
            if offsets is not None:
                offsets += [0] * len(token_ids)
        else:
            shown = token_ids
            if reason == "stop" and not output.ends_in_text and not group.params.include_stop_str_in_output:
                shown = token_ids[:-1]
            count, stop = detokenizer.extend(shown, offsets)
            if stop is not None:
                token_ids = token_ids[:count]  # drop what the engine sampled behind the stop string
            else:
                if offsets is not None:
                    offsets += [detokenizer.position] * (len(token_ids) - count)
                if reason is not None:
                    stop = detokenizer.finish()
        if output.logprobs is not None and state.logprobs is not None:
            k, entries = group.params.num_logprobs or 0, output.logprobs[: len(token_ids)]
            state.logprobs += [self._logprobs(entry, k) for entry in entries]
            before = state.cumulative_logprob or 0.0
            state.cumulative_logprob = sum((entry.logprob for entry in entries), before)
        state.token_ids += token_ids
        if stop is not None:
            reason, stop_reason = "stop", stop
        if reason is not None:
            state.finish_reason, state.stop_reason = reason, stop_reason
            group.error = output.error or group.error
        completion.stop = stop
        completion.added = output

    def _logprobs(self, entry: TokenLogprobs, k: int) -> dict[int, Logprob]:
        """Return the log-probabilities of a token by id: the chosen token first, then the ``k`` most likely ones (all,
        for -1), then those that the request names."""
        count = len(entry.top_ids) if k == -1 else k
        found = {entry.token_id: Logprob(entry.logprob, entry.rank, self._token_text(entry.token_id))}
        for rank, (token_id, logprob) in enumerate(
            zip(entry.top_ids[:count], entry.top, strict=False), start=1
        ):
            found.setdefault(token_id, Logprob(logprob, rank, self._token_text(token_id)))
        for other in entry.named:
            found.setdefault(
                other.token_id, Logprob(other.logprob, other.rank, self._token_text(other.token_id))
            )
        return found

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


def _children(request_id: str, params: SamplingParams) -> dict[str, SamplingParams]:
    """Return the engine requests of a request for several completions, each with its own seed: id → parameters."""
    return {
        f"{index}_{request_id}": params.clone(
            n=1,
            seed=None if params.seed is None else (params.seed + index) % 2**64,
            prompt_logprobs=None if index else params.prompt_logprobs,
        )
        for index in range(params.n)
    }


def _whole(completion: _Completion) -> CompletionOutput:
    """Return all text and tokens of a completion so far."""
    state, detokenizer = completion.output, completion.detokenizer
    return CompletionOutput(
        state.index,
        "" if detokenizer is None else detokenizer.text[: detokenizer.num_released],
        list(state.token_ids),
        state.cumulative_logprob,
        None if state.logprobs is None else list(state.logprobs),
        state.finish_reason,
        state.stop_reason,
        None if state.text_offsets is None else list(state.text_offsets),
    )


def _delta(completion: _Completion) -> CompletionOutput:
    """Return the part of a completion that the newest engine output has added."""
    state, detokenizer, first = completion.output, completion.detokenizer, completion.first_id
    text = ""
    if detokenizer is not None:
        text = detokenizer.text[completion.first_character : detokenizer.num_released]
    return CompletionOutput(
        state.index,
        text,
        state.token_ids[first:],
        state.cumulative_logprob,
        None if state.logprobs is None else state.logprobs[first:],
        state.finish_reason,
        state.stop_reason,
        None if state.text_offsets is None else state.text_offsets[first:],
    )
