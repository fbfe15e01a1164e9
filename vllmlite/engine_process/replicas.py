"""Client of several replicas of an engine, each in a process of its own."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn, Unpack

from vllmlite.engine.block_pool import root_digest
from vllmlite.engine.bounds import RequestBounds
from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.request import RequestOptions
from vllmlite.engine.routing import Router
from vllmlite.engine_process.client import EngineClient
from vllmlite.errors import EngineDeadError, ParameterError
from vllmlite.lora.request import LoRARequest
from vllmlite.outputs import EngineStats
from vllmlite.sampling_params import SamplingParams

FROM_FIRST = ("block_size", "max_adapters", "backend", "device", "dtype", "sleep_level")
"""Fields of :class:`EngineStats` that are equal in all replicas, or that are taken from the first one."""

NAMES = ("running_adapters", "waiting_adapters")
"""Fields of :class:`EngineStats` that hold names; those of all replicas are merged."""


class ReplicaClient:
    """Client of several replicas, with the interface of :class:`EngineClient`. A :class:`Router` chooses the replica of
    each request. Not thread-safe.

    If one replica ends, all count as ended, so that a service manager restarts the program."""

    def __init__(self, clients: Sequence[EngineClient], caches_prefixes: bool) -> None:
        """Send requests to ``clients``. ``caches_prefixes``: the replicas have prefix caches."""
        self._clients = list(clients)
        first = clients[0].stats
        blocks = min(client.stats.num_blocks for client in clients)
        self._router = Router(range(len(clients)), first.block_size, blocks, caches_prefixes)
        self._indices: dict[str, int] = {}
        """Index of the replica of each unfinished request."""

    @property
    def bounds(self) -> RequestBounds:
        """The limits on requests of the replica with the shortest ``max_model_len``."""
        return min((client.bounds for client in self._clients), key=lambda bounds: bounds.max_model_len)

    @property
    def engine(self) -> NoReturn:
        """Raise AttributeError: the engines are in processes of their own."""
        raise AttributeError("the engines are in processes of their own")

    @property
    def stats(self) -> EngineStats:
        """The replicas' counters as they last sent them, added up."""
        return add_stats([client.stats for client in self._clients])

    @property
    def failed_steps_in_a_row(self) -> int:
        """Number of steps that failed since the last one that succeeded, of the replica with the most."""
        return max(client.failed_steps_in_a_row for client in self._clients)

    def join_loop(self, loop: asyncio.AbstractEventLoop, on_arrival: Callable[[], object]) -> None:
        """Have ``loop`` watch the sockets of the replicas: it calls ``on_arrival`` when messages arrive. Raises
        VllmliteError if they belong to another open loop."""
        for client in self._clients:
            client.join_loop(loop, on_arrival)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> None:
        """Send a request to the replica that can begin it the soonest. Raises :class:`ParameterError`, and sends
        nothing, if it can never be served."""
        if request_id in self._indices:
            raise ParameterError("request_id", request_id, "is in use by a request that has not finished")
        adapter = options.get("adapter")
        root = root_digest(
            "salt", options.get("cache_salt") or "", *([] if adapter is None else [repr(adapter)])
        )
        index = self._router.choose(request_id, prompt_token_ids, root)
        try:
            self._indices[request_id] = index
            self._clients[index].add_request(request_id, prompt_token_ids, params, **options)
        except BaseException:
            self._forget(request_id)
            raise

    def finish(self, request_id: str, reason: str = "abort", stop_reason: int | str | None = None) -> bool:
        """End a request. Returns False if there is no such unfinished request."""
        index = self._indices.get(request_id)
        if index is None:
            return False
        self._forget(request_id)
        return self._clients[index].finish(request_id, reason, stop_reason)

    def has_unfinished_requests(self) -> bool:
        """Return whether any request has not finished."""
        return bool(self._indices)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self._router.forget_prefixes()
        for client in self._clients:
            client.reset_prefix_cache()

    def add_adapter(self, adapter: LoRARequest) -> None:
        """Have every replica read an adapter. If one cannot, its requests with the adapter end with an error."""
        for client in self._clients:
            client.add_adapter(adapter)

    def remove_adapter(self, adapter: LoRARequest) -> None:
        """Have every replica forget an adapter."""
        for client in self._clients:
            client.remove_adapter(adapter)

    def expect_grammars(self) -> None:
        """Have every replica import the modules that grammars need."""
        for client in self._clients:
            client.expect_grammars()

    def current_stats(self) -> EngineStats:
        """Return the replicas' counters as they last sent them, added up."""
        return self.stats

    def ask(self, name: str, *args: object) -> asyncio.Future[Any]:
        """Call the engines' method ``name`` between two of their steps; the future gets the returned value: counters
        are added up, otherwise it is the first replica's."""
        if name == "reset_prefix_cache":
            self._router.forget_prefixes()
        answers = [client.ask(name, *args) for client in self._clients]
        return asyncio.ensure_future(_combined(answers))

    def step(self, outputs: list[EngineOutput] | None = None) -> list[EngineOutput]:
        """Wait for the outputs of any replica; return those of all steps since the last call, merged by request. Raises
        EngineDeadError if a replica has ended."""
        if outputs is None:
            outputs = []
        while not self.has_outputs():
            self.check()
            poll = select.poll()
            by_number = {client.handle.connection.fileno(): client for client in self._clients}
            for number in by_number:
                poll.register(number, select.POLLIN)
            for number, _ in poll.poll():
                by_number[number].receive()
        for index, client in enumerate(self._clients):
            if client.has_outputs():
                start = len(outputs)
                client.step(outputs)
                for output in outputs[start:]:
                    self._note(index, output)
        return outputs

    def has_outputs(self) -> bool:
        """Return whether :meth:`step` would return outputs without waiting."""
        return any(client.has_outputs() for client in self._clients)

    def receive(self) -> None:
        """Read the messages that have come."""
        for client in self._clients:
            client.receive()

    def check(self) -> None:
        """Raise EngineDeadError if a replica has ended."""
        for index, client in enumerate(self._clients):
            try:
                client.check()
            except EngineDeadError as error:
                raise EngineDeadError(f"replica {index}: {error}") from None

    def close(self) -> None:
        """End all replicas."""
        for client in self._clients:
            client.close()

    def _note(self, index: int, output: EngineOutput) -> None:
        """Tell the router about an output of replica ``index``."""
        if output.finish_reason is not None:
            self._forget(output.request_id)
        elif output.new_token_ids:
            self._router.note_token(index, output.request_id)

    def _forget(self, request_id: str) -> None:
        index = self._indices.pop(request_id, None)
        if index is not None:
            self._router.note_end(index, request_id)


def add_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """Return the sums of the replicas' counters."""
    total = replace(stats[0])
    for each in stats[1:]:
        for field in fields(EngineStats):
            mine, other = getattr(total, field.name), getattr(each, field.name)
            if field.name in FROM_FIRST:
                continue
            if field.name in NAMES:
                setattr(total, field.name, tuple(sorted({*mine, *other})))
            elif isinstance(mine, tuple):
                length = max(len(mine), len(other))
                padded = ([*values, *[0] * (length - len(values))] for values in (mine, other))
                setattr(total, field.name, tuple(map(sum, zip(*padded, strict=True))))
            elif isinstance(mine, int):
                setattr(total, field.name, mine + other)
            elif mine is None:
                setattr(total, field.name, other)
    return total


async def _combined(answers: Sequence[asyncio.Future[Any]]) -> Any:
    """Return the replicas' answers as one."""
    values = await asyncio.gather(*answers)
    return add_stats(values) if isinstance(values[0], EngineStats) else values[0]
