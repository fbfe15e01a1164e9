"""From token ids back to users' requests: text, stop strings, log-probabilities, the ``n`` completions of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllmlite.engine.engine import EngineOutput
from vllmlite.engine.runner_protocol import TokenLogprobs
from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.tokenizers.detokenizer import Detokenizer
from vllmlite.tokenizers.tokenizer import Tokenizer


@dataclass(slots=True)
class _Completion:
    """One sequence of a request while it grows."""

    output: CompletionOutput
    detokenizer: Detokenizer | None
    num_sent_ids: int = 0
    """Ids that went out with earlier deltas."""
    num_sent_characters: int = 0
    num_ids_before: int = 0
    """Ids before the output that is being taken in."""
    taking: EngineOutput | None = None
    """The last output that was begun to be taken in."""
    taken: EngineOutput | None = None
    """The last output that was taken in whole; another one than ``taking`` while that is under way."""
    stop: str | None = None
    """The stop string that it completed."""


@dataclass(slots=True)
class _Group:
    """A user's request: its prompt, its completions, what it was promised."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: dict[str, _Completion] = field(default_factory=dict)
    """By the engine's request id."""
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Pooling:
    """An embedding request."""

    prompt: str | None
    prompt_token_ids: list[int]
    params: PoolingParams


@dataclass(slots=True)
class ProcessedStep:
    """What the outputs of an engine's step mean to the users."""

    ready: list[RequestOutput]
    """What to hand to them."""
    stopped: list[tuple[str, str]]
    """(Engine request id, stop string) of sequences that the engine has to end: their text reached a stop string."""
    sent: list[tuple[_Completion, int, int]]
    """Completions with a delta in ``ready``, and how many of their ids and characters are then out."""
    ended: list[str]
    """Engine request ids, and pooling requests, of which nothing more will come."""
    finished: list[_Group]


class OutputProcessor:
    """Keeps what the engine does not: prompts as text, detokenisers, and which sequences belong together.

    A step's outputs go through :meth:`process`, then :meth:`settle`. Each can be repeated with the same argument if it
    was interrupted, and then does what remains."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a ``tokenizer``, outputs carry ids alone."""
        self.errors: dict[str, str] = {}
        """Request id → why it ended with ``error``; taken out by whoever reports it."""
        self._tokenizer = tokenizer
        self._groups: dict[str, _Group] = {}
        self._group_of: dict[str, _Group] = {}
        self._poolings: dict[str, _Pooling] = {}

    def add_pooling(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: PoolingParams
    ) -> None:
        """Expect an embedding request; every field of ``params`` that has an effect on a vector is given."""
        self._poolings[request_id] = _Pooling(prompt, prompt_token_ids, params)

    def add(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> dict[str, SamplingParams]:
        """Expect a request; returns the engine's requests that make it up: id → parameters of one sequence.

        Raises :class:`ParameterError` if one of their ids is in use."""
        group = _Group(request_id, prompt, prompt_token_ids, params)
        if params.prompt_logprobs is not None and len(prompt_token_ids) == 1:
            group.prompt_logprobs = [None]  # the engine has nothing to say of a first token
        children = {request_id: params} if params.n == 1 else _children(request_id, params)
        for index, child in enumerate(children):
            if self.knows(child):
                raise ParameterError("request_id", child, "is in use by a request that has not finished")
            group.completions[child] = _Completion(
                self._empty_output(index, params), self._detokenizer(group)
            )
        self._groups[request_id] = group
        self._group_of.update(dict.fromkeys(children, group))
        return children

    def knows(self, request_id: str) -> bool:
        """Whether a request or a sequence of one has the id ``request_id`` and is unfinished."""
        return any(request_id in known for known in (self._groups, self._group_of, self._poolings))

    @property
    def num_requests(self) -> int:
        """Requests that are expected and unfinished."""
        return len(self._groups) + len(self._poolings)

    def children(self, request_id: str) -> list[str]:
        """The engine's requests that make up a request and have not ended; none if it is not expected."""
        if request_id in self._poolings:
            return [request_id]
        group = self._groups.get(request_id)
        if group is None:
            return []
        return [child for child in group.completions if self._group_of.get(child) is group]

    def forget(self, request_id: str) -> None:
        """Drop a request, and the error that it ended with."""
        self.errors.pop(request_id, None)
        for child in self.children(request_id):
            self._group_of.pop(child, None)
        self._poolings.pop(request_id, None)
        self._groups.pop(request_id, None)

    def process(self, outputs: Iterable[EngineOutput]) -> ProcessedStep:
        """Take in a step's outputs and find out what they mean to the users."""
        step = ProcessedStep([], [], [], [], [])
        touched: dict[str, list[str]] = {}
        for output in outputs:
            group = self._group_of.get(output.request_id)
            if group is None:
                pooling = self._poolings.get(output.request_id)
                if pooling is not None:
                    step.ready.append(self._embedding(pooling, output))
                    step.ended.append(output.request_id)
                continue
            completion = group.completions[output.request_id]
            if completion.taken is not output:
                self._take_in(group, completion, output)
            if completion.stop is not None and output.finish_reason is None:
                step.stopped.append((output.request_id, completion.stop))
            if len(group.completions) == 1:
                ended = completion.output.finish_reason is not None
                children = [output.request_id]
                self._hand_over(group, children, children if ended else (), ended, step)
            else:
                touched.setdefault(group.request_id, []).append(output.request_id)
        for request_id, children in touched.items():
            group = self._groups[request_id]
            unfinished = {
                child for child, one in group.completions.items() if one.output.finish_reason is None
            }
            of_step = [child for child in children if child not in unfinished]
            self._hand_over(group, children, of_step, not unfinished, step)
        return step

    def settle(self, step: ProcessedStep) -> None:
        """Note what has been handed over, and forget what has ended."""
        for completion, num_ids, num_characters in step.sent:
            completion.num_sent_ids, completion.num_sent_characters = num_ids, num_characters
        for request_id in step.ended:
            self._group_of.pop(request_id, None)
            self._poolings.pop(request_id, None)
        for group in step.finished:
            self._groups.pop(group.request_id, None)
            if group.error is not None:
                self.errors[group.request_id] = group.error

    def _hand_over(
        self,
        group: _Group,
        children: Sequence[str],
        ended: Sequence[str],
        finished: bool,
        step: ProcessedStep,
    ) -> None:
        """Report on the ``children`` that a step gave something, where that is wanted. ``ended``: those of them that
        have ended; ``finished``: all of the group have."""
        if finished or group.params.output_kind is not RequestOutputKind.FINAL_ONLY:
            step.ready.append(self._request_output(group, children, finished, step))
        if ended:
            step.ended += ended
        if finished:
            step.finished.append(group)

    def _embedding(self, pooling: _Pooling, output: EngineOutput) -> RequestOutput:
        """The vector, cut and scaled; none where a step failed."""
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

    def _undo(self, group: _Group, completion: _Completion) -> None:
        """Take back what an interrupted :meth:`_take_in` did."""
        state, kept = completion.output, completion.num_ids_before
        del state.token_ids[kept:]
        if state.logprobs is not None and state.text_offsets is not None:
            del state.logprobs[kept:], state.text_offsets[kept:]
            chosen = zip(state.logprobs, state.token_ids, strict=True)
            state.cumulative_logprob = sum((entry[token_id].logprob for entry, token_id in chosen), 0.0)
        state.finish_reason = state.stop_reason = None
        completion.detokenizer = self._detokenizer(group)
        if completion.detokenizer is not None:
            for token_id in state.token_ids:
                completion.detokenizer.extend([token_id])

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

    def _take_in(self, group: _Group, completion: _Completion, output: EngineOutput) -> None:
        if completion.taking is output:
            self._undo(group, completion)
        state, detokenizer = completion.output, completion.detokenizer
        completion.num_ids_before = len(state.token_ids)
        completion.taking = output
        group.num_cached_tokens = output.num_cached_tokens
        group.metrics = output.metrics
        if output.prompt_logprobs is not None:
            k = group.params.prompt_logprobs or 0
            group.prompt_logprobs = [None, *(self._logprobs(entry, k) for entry in output.prompt_logprobs)]
        stop: str | None = None
        ended_by_token = (
            output.finish_reason == "stop"
            and not output.ends_in_text
            and not group.params.include_stop_str_in_output
        )
        token_ids = output.new_token_ids
        position = 0 if detokenizer is None else detokenizer.position
        if detokenizer is not None:
            taken, stop = detokenizer.extend(token_ids[:-1] if ended_by_token else token_ids)
            if stop is not None:
                token_ids = token_ids[:taken]  # what the engine did before it knew does not count
        state.token_ids += token_ids
        if (
            output.logprobs is not None
            and state.logprobs is not None
            and state.text_offsets is not None
            and state.cumulative_logprob is not None
        ):
            state.text_offsets.append(position)
            state.logprobs.append(self._logprobs(output.logprobs, group.params.num_logprobs or 0))
            state.cumulative_logprob += output.logprobs.logprob
        reason, stop_reason = output.finish_reason, output.stop_reason
        if reason is not None and detokenizer is not None and stop is None:
            stop = detokenizer.finish()
        if stop is not None:
            reason, stop_reason = "stop", stop
        if reason is not None:
            state.finish_reason, state.stop_reason = reason, stop_reason
            group.error = output.error or group.error
        completion.stop = stop
        completion.taken = output

    def _logprobs(self, entry: TokenLogprobs, k: int) -> dict[int, Logprob]:
        """The chosen token first, then the ``k`` most likely (all, for -1), then those that the request names."""
        count = len(entry.top_ids) if k == -1 else k
        found = {entry.token_id: Logprob(entry.logprob, entry.rank, self._token_text(entry.token_id))}
        for rank, (token_id, logprob) in enumerate(
            zip(entry.top_ids[:count], entry.top, strict=False), start=1
        ):
            found.setdefault(token_id, Logprob(logprob, rank, self._token_text(token_id)))
        for token_id, logprob, rank in entry.named:
            found.setdefault(token_id, Logprob(logprob, rank, self._token_text(token_id)))
        return found

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def _request_output(
        self, group: _Group, children: Sequence[str], finished: bool, step: ProcessedStep
    ) -> RequestOutput:
        if group.params.output_kind is RequestOutputKind.DELTA:
            outputs = []
            for child in children:
                outputs.append(_delta(group.completions[child], step))
        else:
            outputs = [_whole(completion) for completion in group.completions.values()]
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=outputs,
            finished=finished,
            prompt_logprobs=group.prompt_logprobs,
            num_cached_tokens=group.num_cached_tokens,
            metrics=group.metrics,
        )


def _children(request_id: str, params: SamplingParams) -> dict[str, SamplingParams]:
    """The sequences of a request for several, each with a seed of its own: engine request id → parameters."""
    return {
        f"{index}_{request_id}": params.clone(
            n=1,
            seed=None if params.seed is None else (params.seed + index) % 2**64,
            prompt_logprobs=None if index else params.prompt_logprobs,
        )
        for index in range(params.n)
    }


def _whole(completion: _Completion) -> CompletionOutput:
    state = completion.output
    return CompletionOutput(
        index=state.index,
        text="" if completion.detokenizer is None else completion.detokenizer.released_text,
        token_ids=list(state.token_ids),
        cumulative_logprob=state.cumulative_logprob,
        logprobs=None if state.logprobs is None else list(state.logprobs),
        text_offsets=None if state.text_offsets is None else list(state.text_offsets),
        finish_reason=state.finish_reason,
        stop_reason=state.stop_reason,
    )


def _delta(completion: _Completion, step: ProcessedStep) -> CompletionOutput:
    """What is new since the last delta, noted in ``step``."""
    state, first = completion.output, completion.num_sent_ids
    text = "" if completion.detokenizer is None else completion.detokenizer.released_text
    step.sent.append((completion, len(state.token_ids), max(len(text), completion.num_sent_characters)))
    return CompletionOutput(
        index=state.index,
        text=text[completion.num_sent_characters :],
        token_ids=state.token_ids[first:],
        cumulative_logprob=state.cumulative_logprob,
        logprobs=None if state.logprobs is None else state.logprobs[first:],
        text_offsets=None if state.text_offsets is None else state.text_offsets[first:],
        finish_reason=state.finish_reason,
        stop_reason=state.stop_reason,
    )
