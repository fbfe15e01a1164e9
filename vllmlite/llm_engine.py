"""LLMEngine: an engine with text prompts and text outputs, stepped by its caller; vLLM's names and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeAlias

from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.engine import Engine
from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.sleeping import check_sleep
from vllmlite.errors import ParameterError
from vllmlite.exclusive_calls import Turns, takes_turn
from vllmlite.inputs import PROMPT_KEYS, refuse, token_ids
from vllmlite.lora.request import LoRARequest
from vllmlite.output_processor import OutputProcessor, ProcessedStep
from vllmlite.outputs import EngineStats, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.runner.startup import Started, start
from vllmlite.sampling_params import SamplingParams
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.tokenizers.truncation import Truncation

if TYPE_CHECKING:
    from vllmlite.engine_process.client import EngineClient
    from vllmlite.engine_process.replicas import ReplicaClient
    from vllmlite.guided.grammars import Grammars

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or a mapping with ``prompt`` or ``prompt_token_ids`` and optionally ``cache_salt``."""


class LLMEngine:
    """Takes requests and returns :class:`~vllmlite.outputs.RequestOutput` objects, one step at a time.

    Thread-safe: threads take turns. Every call is atomic: an exception raised by a signal handler in the middle of it,
    such as KeyboardInterrupt, loses no output and leaves the engine in the state before or after the call. If the
    engine runs in its own thread or process, only adding requests is atomic: an interrupted step may lose outputs, and
    then :class:`~vllmlite.async_llm.AsyncLLM` shuts the engine down."""

    def __init__(
        self,
        config: EngineConfig,
        start: Callable[[EngineConfig], Started[Engine | EngineClient | ReplicaClient]] = start,
    ) -> None:
        """Load the model and allocate the cache. Raises ModelError, BackendError or ParameterError.

        ``start`` decides where the engine runs: in this thread, or in a thread or process of its own until
        :meth:`close`."""
        self.config = config
        started = start(config)
        self.engine_core = started.engine
        self._ranks = started.ranks
        self.tokenizer = started.tokenizer
        self.max_model_len = self.engine_core.bounds.max_model_len
        self.hidden_size = started.hidden_size
        self.default_sampling_params = started.default_sampling_params
        self.backend_choice = started.backend_choice
        self.observer: Callable[[list[EngineOutput]], None] | None = None
        """Function that is called with the outputs of each step, for metrics; None: there is none."""
        self.turns = Turns("LLMEngine")
        self._processor = OutputProcessor(self.tokenizer)
        self._step_outputs: list[EngineOutput] = []
        """The engine's outputs of the last step, until they are settled."""
        self._processed: tuple[int, ProcessedStep] | None = None
        """The thread that called :meth:`step`, and its processed outputs, until they are settled."""
        self._undelivered: dict[int, list[RequestOutput]] = {}
        """Outputs that the last :meth:`step` of each thread still has to return, by thread id."""
        self._adding: str | None = None
        """Id of the request that is being added."""
        self._unwanted: set[str] = set()
        """Ids of requests to abort."""
        self._loras: dict[int, LoRARequest] = {}
        """Number of each adapter that has been added or named by a request → the last adapter with this number."""

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig, **_absent: object) -> LLMEngine:
        """Construct an engine as in vLLM; further arguments such as ``usage_context`` have no effect."""
        return cls(engine_args)

    @property
    def engine(self) -> Engine:
        """The engine itself. Raises AttributeError if it runs in its own thread or process."""
        core = self.engine_core
        return core if isinstance(core, Engine) else core.engine

    def close(self) -> None:
        """Shut down the engine's thread or process, if it has one, and the processes of its ranks."""
        if not isinstance(self.engine_core, Engine):
            self.engine_core.close()
        if self._ranks is not None:
            self._ranks.close()

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises ParameterError with ``skip_tokenizer_init``."""
        if self.tokenizer is None:
            raise ParameterError("skip_tokenizer_init", True, "no tokenizer is loaded, but text needs one")
        return self.tokenizer

    @takes_turn
    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | PoolingParams,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        prompt_text: str | None = None,
    ) -> None:
        """Queue a generation request, or an embedding request if ``params`` are :class:`PoolingParams`.

        ``prompt_text`` is reported in outputs as the text of a prompt of ids. ``lora_request`` names a LoRA adapter,
        which is read at its first use; if the engine runs in this thread, an adapter that cannot be used raises
        ModelError here, else the request ends with an error. ``trace_headers`` has no effect; vLLM's other arguments
        must be None. Raises :class:`ParameterError`, and adds nothing, if the request can never run."""
        refuse({"tokenization_kwargs": tokenization_kwargs})
        self._drop()
        if not isinstance(request_id, str) or not request_id:
            raise ParameterError("request_id", request_id, "must be a non-empty string")
        if self._processor.knows(request_id):
            raise ParameterError("request_id", request_id, "is in use by an unfinished request")
        if not isinstance(params, (SamplingParams, PoolingParams)):
            raise ParameterError("params", params, "must be SamplingParams or PoolingParams")
        if priority and self.config.scheduling_policy != "priority":
            raise ParameterError("priority", priority, "needs scheduling_policy=priority")
        encoded = self.encode(prompt, self.truncation(params))
        encoded.setdefault("prompt", prompt_text)
        encoded["adapter"] = None if lora_request is None else self.checked_lora(lora_request)
        try:
            self._adding = request_id
            if isinstance(params, PoolingParams):
                self._add_pooling(request_id, encoded, params, arrival_time, priority)
            else:
                self._add_generation(request_id, encoded, params, arrival_time, priority)
            self._adding = None
        except BaseException:
            self._drop()
            raise

    def _add_generation(
        self,
        request_id: str,
        encoded: dict[str, Any],
        params: SamplingParams,
        arrival_time: float | None,
        priority: int,
    ) -> None:
        if self.tokenizer is None and params.stop:
            raise ParameterError("stop", params.stop, "stop strings need a tokenizer")
        prompt_ids = encoded["prompt_token_ids"]
        bad_words = self.get_tokenizer().bad_word_ids(params.bad_words) if params.bad_words else []
        structure = params.structured_outputs
        compiled = None if structure is None else self.grammars.compile(structure)
        children = self._processor.add(request_id, encoded.get("prompt"), prompt_ids, params)
        for child, child_params in children.items():
            self.engine_core.add_request(
                child,
                prompt_ids,
                child_params,
                bad_words=bad_words,
                grammar=None
                if compiled is None or structure is None
                else self.grammars.start(compiled, structure.after),
                priority=priority,
                cache_salt=encoded.get("cache_salt"),
                arrival_time=arrival_time,
                adapter=encoded["adapter"],
            )

    def _add_pooling(
        self,
        request_id: str,
        encoded: dict[str, Any],
        params: PoolingParams,
        arrival_time: float | None,
        priority: int,
    ) -> None:
        if params.dimensions is not None and params.dimensions > self.hidden_size:
            raise ParameterError(
                "dimensions", params.dimensions, f"must be at most the model's {self.hidden_size}"
            )
        kind = params.pooling_type or self.config.pooling_type
        normalize = self.config.pooling_normalize if params.normalize is None else params.normalize
        prompt_ids = encoded["prompt_token_ids"]
        complete = replace(params, pooling_type=kind, normalize=normalize)
        self._processor.add_pooling(request_id, encoded.get("prompt"), prompt_ids, complete)
        self.engine_core.add_request(
            request_id,
            prompt_ids,
            _truncating(params),
            priority=priority,
            cache_salt=encoded.get("cache_salt"),
            arrival_time=arrival_time,
            pooling_type=kind,
            adapter=encoded["adapter"],
        )

    def checked_lora(self, lora_request: object) -> LoRARequest:
        """Return ``lora_request`` and remember it. Raises ParameterError if requests cannot have an adapter."""
        if not isinstance(lora_request, LoRARequest):
            raise ParameterError("lora_request", lora_request, "must be a LoRARequest or None")
        if not self.config.enable_lora:
            raise ParameterError(
                "lora_request", lora_request.lora_name, "needs enable_lora=True (--enable-lora)"
            )
        self._loras[lora_request.lora_int_id] = lora_request
        if lora_request.load_inplace:
            self.engine_core.remove_adapter(lora_request)
        return lora_request

    @takes_turn
    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read and check an adapter before its first use, and return True. Raises ModelError or ParameterError if it
        cannot be used."""
        self.engine_core.add_adapter(self.checked_lora(lora_request))
        return True

    @takes_turn
    def remove_lora(self, lora_id: int) -> bool:
        """Forget the adapter with number ``lora_id``; return whether there was one. Unfinished requests go on."""
        lora_request = self._loras.pop(lora_id, None)
        if lora_request is not None:
            self.engine_core.remove_adapter(lora_request)
        return lora_request is not None

    def list_loras(self) -> set[int]:
        """Return the numbers of the adapters that have been added or named by requests."""
        return set(self._loras)

    @cached_property
    def grammars(self) -> Grammars:
        """The cache of compiled grammars for structured outputs."""
        from vllmlite.guided.grammars import Grammars

        core, bounds = self.engine_core, self.engine_core.bounds
        if not isinstance(core, Engine):
            core.expect_grammars()
        loads = isinstance(core, Engine)
        return Grammars(self.get_tokenizer(), bounds.vocab_size, sorted(bounds.eos_ids), loads=loads)

    def truncation(self, params: SamplingParams | PoolingParams) -> Truncation | None:
        """Return how ``params`` truncate a prompt, or None if they do not."""
        generates = isinstance(params, SamplingParams)
        return self.engine_core.bounds.truncation(_truncating(params), generates=generates)

    def encode(self, prompt: Prompt, truncation: Truncation | None = None) -> dict[str, Any]:
        """Return ``prompt`` as a mapping whose ``prompt_token_ids`` are a new list, truncated by ``truncation``.

        Raises :class:`ParameterError`."""
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        elif not isinstance(prompt, Mapping):
            prompt = {"prompt_token_ids": prompt}
        encoded = {name: prompt[name] for name in PROMPT_KEYS if name in prompt}
        refuse({name: value for name, value in prompt.items() if name not in PROMPT_KEYS})
        salt = encoded.get("cache_salt")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise ParameterError("cache_salt", salt, "must be a non-empty string")
        text, ids = encoded.get("prompt"), encoded.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise ParameterError("prompt", text, "must be text")
        if ids is None:
            if text is None:
                raise ParameterError("prompt", encoded, "must have prompt or prompt_token_ids")
            ids = self.get_tokenizer().encode(text, truncation=truncation)
        else:
            ids = token_ids(ids)
            self.engine_core.bounds.check_ids(ids)
            ids = list(ids) if truncation is None else truncation.of(ids)
        encoded["prompt_token_ids"] = ids
        return encoded

    def step(self) -> list[RequestOutput]:
        """Run one step; return outputs of the requests that made progress, in the form of their ``output_kind``.

        If the call is interrupted, the next call returns these outputs."""
        thread = get_ident()
        self._run_step(thread)
        outputs = self._undelivered[thread]
        del self._undelivered[thread]
        return outputs

    @takes_turn
    def _run_step(self, thread: int) -> None:
        """Run a step for ``thread``, or complete an interrupted one.

        A step has stages: the engine's outputs, their processing, the outputs to return. Each stage stores its result
        at its end and can be repeated until then."""
        if self._unwanted or self._adding is not None:
            self._drop()
        if self._processed is not None:
            self._settle(*self._processed)
        if thread in self._undelivered:
            return
        if not self._step_outputs:
            self.engine_core.step(self._step_outputs)
        self._processed = (thread, self._processor.process(self._step_outputs))
        self._settle(*self._processed)

    def _settle(self, thread: int, step: ProcessedStep) -> None:
        for child, stop in step.stopped:
            self.engine_core.finish(child, "stop", stop)
        self._processor.settle(step)
        if self.observer is not None:
            self.observer(self._step_outputs)
        self._undelivered[thread] = step.ready
        self._step_outputs, self._processed = [], None

    def has_unfinished_requests(self) -> bool:
        """Return whether :meth:`step` has or will have outputs for this thread."""
        return (
            self.engine_core.has_unfinished_requests()
            or bool(self._step_outputs)
            or get_ident() in self._undelivered
        )

    def get_num_unfinished_requests(self) -> int:
        """Return the number of unfinished requests."""
        return self._processor.num_requests

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """Abort requests; they give no further outputs. Unknown ids are ignored.

        Inside a signal handler or callback that runs during another call, they are aborted before the next step."""
        self._unwanted.update([request_ids] if isinstance(request_ids, str) else request_ids)
        if not self.turns.is_mine():
            self._drop_in_turn()

    @takes_turn
    def _drop_in_turn(self) -> None:
        self._drop()

    def _drop(self) -> None:
        """Abort unwanted requests and one whose addition was interrupted, and discard their pending outputs.

        Their ids can be used again afterwards."""
        if self._adding is not None:
            self._unwanted.add(self._adding)
            self._adding = None
        if self._unwanted and self._processed is not None:
            self._settle(*self._processed)
        for request_id in list(self._unwanted):
            children = self._processor.children(request_id)
            self._step_outputs = [
                output for output in self._step_outputs if output.request_id not in children
            ]
            for thread, outputs in list(self._undelivered.items()):
                self._undelivered[thread] = [o for o in outputs if o.request_id != request_id]
            for child in children:
                self.engine_core.finish(child)
            self._processor.forget(request_id)
            self._unwanted.discard(request_id)

    def take_error(self, request_id: str) -> str | None:
        """Return the reason why a request ended with the finish reason ``error``, only once; None if it did not."""
        return self._processor.errors.pop(request_id, None)

    @takes_turn
    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empty the prefix cache and return True, as in vLLM. vLLM's arguments must be False."""
        refuse({"reset_running_requests": reset_running_requests, "reset_connector": reset_connector})
        self.engine_core.reset_prefix_cache()
        return True

    @takes_turn
    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free the engine's memory until :meth:`wake_up`. At ``level`` 1 the weights are kept in main memory, at 2 they
        are read again from the checkpoint. Unfinished requests are aborted or, if ``mode`` is ``keep``, computed again
        after waking up; if ``mode`` is ``wait`` and there are any, an error is raised."""
        check_sleep(level, mode)
        if mode == "wait" and self._processor.num_requests:
            raise ParameterError("mode", mode, "step the engine until no requests are unfinished")
        self._unwanted.update(self._processor.request_ids if mode == "abort" else ())
        self._drop()
        self.engine.sleep(level)

    @takes_turn
    def wake_up(self, tags: list[str] | None = None) -> None:
        """Allocate the freed memory again. With ``tags``, which are ``weights`` and ``kv_cache``, this happens once
        both have been given, in one call or in several."""
        self.engine.wake_up(tags)

    def is_sleeping(self) -> bool:
        """Whether the engine sleeps."""
        return self.stats().sleep_level > 0

    def stats(self) -> EngineStats:
        """Return counters since the start, and the current state of the engine."""
        return self.engine_core.current_stats()


def _truncating(params: SamplingParams | PoolingParams) -> SamplingParams:
    """Return sampling parameters that truncate a prompt as ``params`` do."""
    if isinstance(params, SamplingParams):
        return params
    return SamplingParams(
        truncate_prompt_tokens=params.truncate_prompt_tokens, truncation_side=params.truncation_side
    )
