"""From token ids back to users' requests: text, stop strings, log-probabilities, the ``n`` completions of one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllmlite.detokenizer import Detokenizer
from vllmlite.engine.engine import EngineOutput, TokenLogprobs
from vllmlite.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.tokenizer import Tokenizer


@dataclass(slots=True)
class _Completion:
    """One sequence of a request while it grows."""

    output: CompletionOutput
    detokenizer: Detokenizer | None
    num_sent_ids: int = 0
    """Ids that went out with earlier deltas."""


@dataclass(slots=True)
class _Group:
    """A user's request: its prompt, its completions, what it was promised."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: dict[str, _Completion] = field(default_factory=dict)
    """By the engine's request id."""
    num_unfinished: int = 0
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


class OutputProcessor:
    """Keeps what the engine does not: prompts as text, detokenisers, and which sequences belong together."""

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
        """Expect a request; returns the engine's requests that make it up: id → parameters of one sequence."""
        group = _Group(request_id, prompt, prompt_token_ids, params, num_unfinished=params.n)
        if params.prompt_logprobs is not None and len(prompt_token_ids) == 1:
            group.prompt_logprobs = [None]  # the engine has nothing to say of a first token
        children: dict[str, SamplingParams] = {}
        for index in range(params.n):
            if params.n == 1:
                child, child_params = request_id, params
            else:
                child = f"{index}_{request_id}"
                seed = None if params.seed is None else params.seed + index
                child_params = params.clone(
                    n=1, seed=seed, prompt_logprobs=None if index else params.prompt_logprobs
                )
            children[child] = child_params
            group.completions[child] = _Completion(
                self._empty_output(index, params), self._detokenizer(group)
            )
            self._group_of[child] = group
        self._groups[request_id] = group
        return children

    def knows(self, request_id: str) -> bool:
        """Whether ``request_id`` is expected and unfinished."""
        return request_id in self._groups or request_id in self._poolings

    def forget(self, request_id: str) -> list[str]:
        """Drop a request; returns the engine's requests that made it up."""
        if self._poolings.pop(request_id, None) is not None:
            return [request_id]
        group = self._groups.pop(request_id, None)
        if group is None:
            return []
        for child in group.completions:
            self._group_of.pop(child, None)
        return list(group.completions)

    def process(self, outputs: Iterable[EngineOutput]) -> tuple[list[RequestOutput], list[tuple[str, str]]]:
        """Take in a step's outputs.

        Returns what to hand the users, and (engine request id, stop string) of sequences that the engine has to
        end because their text reached a stop string."""
        touched: dict[str, list[str]] = {}
        stopped: list[tuple[str, str]] = []
        ready: list[RequestOutput] = []
        for output in outputs:
            group = self._group_of.get(output.request_id)
            if group is None:
                if output.request_id in self._poolings:
                    ready.append(self._embedding(self._poolings.pop(output.request_id), output))
                continue
            stop = self._take_in(group, group.completions[output.request_id], output)
            if stop is not None and output.finish_reason is None:
                stopped.append((output.request_id, stop))
            if len(group.completions) == 1:
                self._hand_over(group, [output.request_id], ready)
            else:
                touched.setdefault(group.request_id, []).append(output.request_id)
        for request_id, children in touched.items():
            self._hand_over(self._groups[request_id], children, ready)
        return ready, stopped

    def _hand_over(self, group: _Group, children: list[str], ready: list[RequestOutput]) -> None:
        """Tell of the ``children`` that a step gave something, where that is wanted, and forget those that ended."""
        finished = group.num_unfinished == 0
        if finished or group.params.output_kind is not RequestOutputKind.FINAL_ONLY:
            ready.append(self._request_output(group, children, finished))
        for child in children:
            if group.completions[child].output.finish_reason is not None:
                del self._group_of[child]
        if finished:
            del self._groups[group.request_id]
            if group.error is not None:
                self.errors[group.request_id] = group.error

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
        wanted = params.logprobs is not None
        return CompletionOutput(
            index,
            "",
            [],
            cumulative_logprob=0.0 if wanted else None,
            logprobs=[] if wanted else None,
            text_offsets=[] if wanted else None,
        )

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

    def _take_in(self, group: _Group, completion: _Completion, output: EngineOutput) -> str | None:
        state, detokenizer = completion.output, completion.detokenizer
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
            state.logprobs.append(self._logprobs(output.logprobs, group.params.logprobs or 0))
            state.cumulative_logprob += output.logprobs.logprob
        reason, stop_reason = output.finish_reason, output.stop_reason
        if reason is not None and detokenizer is not None and stop is None:
            stop = detokenizer.finish()
        if stop is not None:
            reason, stop_reason = "stop", stop
        if reason is not None:
            state.finish_reason, state.stop_reason = reason, stop_reason
            group.num_unfinished -= 1
            group.error = output.error or group.error
        return stop

    def _logprobs(self, entry: TokenLogprobs, k: int) -> dict[int, Logprob]:
        """The chosen token first, then the ``k`` most likely (all, for -1)."""
        count = len(entry.top_ids) if k == -1 else k
        found = {entry.token_id: Logprob(entry.logprob, entry.rank, self._token_text(entry.token_id))}
        for rank, (token_id, logprob) in enumerate(
            zip(entry.top_ids[:count], entry.top, strict=False), start=1
        ):
            found.setdefault(token_id, Logprob(logprob, rank, self._token_text(token_id)))
        return found

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def _request_output(self, group: _Group, children: list[str], finished: bool) -> RequestOutput:
        delta = group.params.output_kind is RequestOutputKind.DELTA
        if delta:
            outputs = [_delta(group.completions[child]) for child in children]
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


def _delta(completion: _Completion) -> CompletionOutput:
    state, first = completion.output, completion.num_sent_ids
    completion.num_sent_ids = len(state.token_ids)
    return CompletionOutput(
        index=state.index,
        text="" if completion.detokenizer is None else completion.detokenizer.delta(),
        token_ids=state.token_ids[first:],
        cumulative_logprob=state.cumulative_logprob,
        logprobs=None if state.logprobs is None else state.logprobs[first:],
        text_offsets=None if state.text_offsets is None else state.text_offsets[first:],
        finish_reason=state.finish_reason,
        stop_reason=state.stop_reason,
    )
