"""Outputs of requests, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token, its rank in the vocabulary (1 = most likely), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    ``finish_reason`` is None while it runs, then ``stop``, ``length``, ``abort`` or ``error``; ``stop_reason`` is the
    stop string or stop token id that ended it, None for end of text. ``text_offsets``, present with ``logprobs``, are
    the start of each token in characters of the whole text.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text_offsets: list[int] | None = None

    def finished(self) -> bool:
        """Return whether this completion has ended."""
        return self.finish_reason is not None

    def extend(self, later: CompletionOutput) -> None:
        """Append the delta that follows this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        if self.text_offsets is not None and later.text_offsets is not None:
            self.text_offsets += later.text_offsets
        self.cumulative_logprob = later.cumulative_logprob
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request, in seconds of :func:`time.monotonic`, None until they occur; and token counts."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    previous_token_time: float | None = None
    last_token_time: float | None = None
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0

    def count_tokens(self, now: float, count: int) -> None:
        """Record ``count`` new tokens of one step at time ``now``, as if they had come at equal intervals since the
        previous token."""
        if self.first_token_time is None:
            self.first_token_time = now
        self.previous_token_time = self.last_token_time
        if count > 1 and self.last_token_time is not None:
            self.previous_token_time = now - (now - self.last_token_time) / count
        self.last_token_time = now
        self.num_generation_tokens += count

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token (TTFT); None before it."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """The state of a request: its prompt and one :class:`CompletionOutput` for each of its ``n`` completions.

    ``num_cached_tokens`` is the number of prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    embedding: list[float] | None = None
    """The vector of an embedding request, which has no completions; see :meth:`LLM.embed`."""

    def extend(self, later: RequestOutput) -> None:
        """Append the deltas that follow these."""
        mine = {completion.index: completion for completion in self.outputs}
        for completion in later.outputs:
            if completion.index in mine:
                mine[completion.index].extend(completion)
            else:
                self.outputs.append(completion)
        self.finished = later.finished
        self.prompt_logprobs = later.prompt_logprobs
        self.num_cached_tokens, self.metrics = later.num_cached_tokens, later.metrics


@dataclass(slots=True)
class EmbeddingOutput:
    """An embedding of a prompt."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """The length of the vector."""
        return len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The output of an embedding request: its prompt and one vector."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True
    num_cached_tokens: int = 0


TIER_EVENTS = ("saved", "loaded", "dropped", "read", "written", "failed")
"""Events of blocks in cache tiers that are counted."""


@dataclass(slots=True)
class EngineStats:
    """Counters of an engine since its start, and its current state."""

    sleep_level: int = 0
    """Level at which the engine sleeps; 0 while it is awake."""
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    peak_used_blocks: int = 0
    block_size: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_failed_steps: int = 0
    last_error: str | None = None
    """Message of the exception of the last failed step."""
    prefix_cache_queries: int = 0
    """Number of prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Number of prompt tokens found in the prefix cache."""
    external_prefix_cache_queries: int = 0
    """Number of prompt tokens looked up in the cache tiers, because the prefix cache did not have them."""
    external_prefix_cache_hits: int = 0
    """Number of prompt tokens found in the cache tiers."""
    tier_blocks_saved: int = 0
    """Blocks copied to host memory."""
    tier_blocks_loaded: int = 0
    """Blocks copied back from host memory."""
    tier_blocks_dropped: int = 0
    """Blocks evicted without a copy, because host memory had no place for them."""
    tier_blocks_read: int = 0
    """Blocks read from disk."""
    tier_blocks_written: int = 0
    """Blocks written to disk."""
    tier_blocks_failed: int = 0
    """Blocks that could not be read from or written to disk, or that were damaged there."""
    num_drafts: int = 0
    """Verifications: rows of a step that had draft tokens."""
    num_draft_tokens: int = 0
    """Draft tokens that were verified."""
    num_accepted_tokens: int = 0
    """Draft tokens that were accepted."""
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    """Draft tokens that were accepted, by their position in the draft."""
    draft_seconds: float = 0.0
    """Seconds spent on verifications, computed from the measured times of steps, which are divided among their rows."""
    plain_seconds: float = 0.0
    """Seconds that the tokens of these verifications would have taken without drafts."""
    max_adapters: int = 0
    """Maximum number of LoRA adapters on the device at a time."""
    running_adapters: tuple[str, ...] = ()
    """Names of the adapters of running requests."""
    waiting_adapters: tuple[str, ...] = ()
    """Names of the adapters of waiting requests."""
    backend: str = ""
    device: str = ""
    dtype: str = ""

    def drafts_since(self, before: EngineStats) -> DraftStats | None:
        """Return the statistics of draft tokens since ``before``; None if there were none."""
        verifications = self.num_drafts - before.num_drafts
        if not verifications:
            return None
        accepted = self.num_accepted_tokens - before.num_accepted_tokens
        taken = self.draft_seconds - before.draft_seconds
        return DraftStats(
            verifications,
            self.num_draft_tokens - before.num_draft_tokens,
            accepted,
            1 + accepted / verifications,
            (self.plain_seconds - before.plain_seconds) / taken if taken > 0 else 1.0,
        )


@dataclass(frozen=True, slots=True)
class DraftStats:
    """Statistics of draft tokens over a period."""

    verifications: int
    drafted: int
    accepted: int
    mean_length: float
    """Mean number of tokens that a verification yields, including the sampled one."""
    speedup: float
    """Ratio of the time that the tokens of verifications would have taken without drafts to the time that they took, by
    the measured times of steps."""
