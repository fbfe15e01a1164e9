"""Residency of adapters: which of them are on the device, and which requests wait for one.

There are as many slots on the device as ``max_loras``. A waiting request whose adapter has no slot is set aside, and
others are admitted. Its adapter gets a free slot, or that of the adapter without users that was used longest ago. If
all adapters have users, the slot that was given out longest ago is closed: requests behind the waiting one can no
longer use its adapter, so that it is free once the running ones end. So no request overtakes another one for ever.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from vllmlite.engine.request import AdapterKey, Request
from vllmlite.errors import VllmliteError

Key: TypeAlias = tuple[int, int]


class AdapterSource(Protocol):
    """Reads adapters into host memory, where it keeps some of them. Its methods may be called by any thread."""

    def knows(self, source: Any) -> bool:
        """Return whether the adapter's key is known, so that :meth:`identify` returns without reading a file."""
        ...

    def identify(self, source: Any) -> AdapterKey:
        """Return the key of the adapter that ``source`` describes; read and check it first, if it is not known. Raises
        VllmliteError if it cannot be used."""
        ...

    def take(self, key: AdapterKey, timeout: float) -> Any:
        """Return the adapter; None if it has to be read and that takes longer than ``timeout`` seconds. Raises
        VllmliteError if it can no longer be read, or has other contents."""
        ...

    def forget(self, source: Any) -> bool:
        """Drop an adapter from memory. Returns whether it was known."""
        ...


class AdapterRunner(Protocol):
    """A runner that puts adapters on its device."""

    def load_adapter_parts(self, index: int, adapter: Any) -> Iterator[int]:
        """Put an adapter on the device in slot ``index``, which no step uses, in parts; yields the bytes of each.
        Raises VllmliteError if it cannot be used."""
        ...


@dataclass(slots=True, eq=False)
class Resident:
    """A slot for an adapter on the device."""

    index: int
    """Number of the slot in the runner, from 1 on."""
    key: AdapterKey | None = None
    ready: bool = False
    """Whether all parts of the adapter are on the device."""
    loading: Iterator[int] | None = None
    """Puts the rest of the adapter on the device, part by part."""
    users: int = 0
    """Number of running requests that use the adapter."""
    last_use: int = 0
    """Value of a counter when a request last began to use the adapter; larger is later."""
    idle_from: int = 0
    """Number of the first step that cannot contain any former user of the slot."""
    closed_from: Key | None = None
    """Requests with this key or a larger one are not admitted; None: all are."""
    promised: Request | None = None
    """The first of the requests for which the adapter was loaded; the adapter keeps the slot until this request is
    admitted."""

    def is_idle(self, key: Key) -> bool:
        """Return whether the slot can be taken for a request with ``key``."""
        if self.key is None:
            return True
        first = self.promised
        kept = first is not None and first.is_waiting and first.key < key
        return self.ready and not self.users and self.closed_from is None and not kept


@dataclass(slots=True)
class AdapterSlots:
    """The adapter slots on the device, and the requests that wait until their adapter has one."""

    num_slots: int
    residents: list[Resident] = field(init=False)
    _by_digest: dict[str, Resident] = field(default_factory=dict)
    _aside: dict[str, list[tuple[Key, Request]]] = field(default_factory=dict)
    """Digest of an adapter → heap of the requests that wait for it."""
    next_step: int = 0
    """Number of the next step to be launched."""
    _clock: int = 0

    def __post_init__(self) -> None:
        """Start with empty slots."""
        self.residents = [Resident(index + 1) for index in range(self.num_slots)]

    @property
    def in_use(self) -> bool:
        """Whether requests wait for an adapter, or an adapter is being loaded."""
        return bool(self._aside) or any(self._to_load())

    def admits(self, request: Request) -> bool:
        """Return whether the request's adapter is on the device and may be used."""
        assert request.adapter is not None
        resident = self._by_digest.get(request.adapter.digest)
        if resident is None or not resident.ready:
            return False
        return resident.closed_from is None or request.key < resident.closed_from

    def set_aside(self, request: Request) -> None:
        """Keep a waiting request until :meth:`assign` returns it."""
        assert request.adapter is not None
        heapq.heappush(self._aside.setdefault(request.adapter.digest, []), (request.key, request))

    def acquire(self, request: Request) -> int:
        """Count a user of the request's adapter, for which :meth:`admits` is true; return the slot's index."""
        assert request.adapter is not None
        resident = self._by_digest[request.adapter.digest]
        self._clock += 1
        resident.users += 1
        resident.last_use = self._clock
        return resident.index

    def release(self, request: Request) -> None:
        """Count one user of the request's adapter less."""
        assert request.adapter is not None
        resident = self._by_digest[request.adapter.digest]
        resident.users -= 1
        resident.idle_from = self.next_step

    def assign(self, in_flight: int) -> list[Request]:
        """Give slots to the adapters that requests wait for, the first request's first, while ``in_flight`` steps are
        in flight. Returns the requests whose adapter is ready."""
        for resident in self.residents:
            resident.closed_from = None
        if not self._aside:
            return []
        for digest in list(self._aside):
            self._skip_finished(digest)
        found: list[Request] = []
        for key, digest in sorted((heap[0][0], digest) for digest, heap in self._aside.items()):
            own = self._by_digest.get(digest)
            if own is None:
                self._make_room(self._aside[digest][0][1], key, self.next_step - in_flight)
            elif own.ready and (own.closed_from is None or key < own.closed_from):
                waiting = self._aside.pop(digest)
                own.promised = waiting[0][1]
                found += [request for _, request in waiting]
        return found

    def _make_room(self, request: Request, key: Key, first_step: int) -> None:
        """Assign a slot to the request's adapter; if none is free, close one to later requests. ``first_step`` is the
        oldest step in flight."""
        assert request.adapter is not None
        idle = [each for each in self.residents if each.is_idle(key)]
        if idle:
            chosen = min(idle, key=lambda each: (each.key is not None, each.last_use))
            if chosen.idle_from <= first_step:
                self._replace(chosen, request.adapter)
            else:  # a step in flight may still use it
                chosen.closed_from = key
            return
        used = [each for each in self.residents if each.ready and each.closed_from is None]
        if used:
            min(used, key=lambda each: each.last_use).closed_from = key

    def _replace(self, resident: Resident, key: AdapterKey) -> None:
        self.empty(resident)
        self._clock += 1
        resident.key, resident.last_use = key, self._clock
        self._by_digest[key.digest] = resident

    def empty(self, resident: Resident) -> None:
        """Remove an adapter, which has no users, from its slot."""
        if resident.key is not None:
            del self._by_digest[resident.key.digest]
        resident.key, resident.ready, resident.loading, resident.promised = None, False, None, None

    def load(
        self, source: AdapterSource, runner: AdapterRunner, most_bytes: int, timeout: float
    ) -> Iterator[tuple[list[Request], VllmliteError]]:
        """Load adapters to their slots, about ``most_bytes`` of each; wait up to ``timeout`` seconds for their files.
        Yields the requests whose adapter cannot be loaded, with the error."""
        for resident in list(self._to_load()):
            assert resident.key is not None
            try:
                if resident.loading is None:
                    adapter = source.take(resident.key, timeout)
                    if adapter is None:
                        continue
                    resident.loading = runner.load_adapter_parts(resident.index, adapter)
                left = most_bytes
                while left > 0 and not resident.ready:
                    size = next(resident.loading, None)
                    resident.ready = size is None
                    left -= size or 0
            except VllmliteError as error:
                waiting = self._aside.pop(resident.key.digest, [])
                self.empty(resident)
                yield [request for _, request in waiting], error

    def _to_load(self) -> Iterator[Resident]:
        """Yield the slots whose adapter is not completely on the device."""
        return (each for each in self.residents if each.key is not None and not each.ready)

    def forget(self, source: Hashable) -> None:
        """Remove the adapter that was read from ``source`` from its slot, unless a request uses it or waits for it."""
        for each in self.residents:
            if each.key is None or each.key.source != source or not each.ready or each.users:
                continue
            if each.key.digest not in self._aside:
                self.empty(each)

    def requests(self) -> Iterable[Request]:
        """Yield the requests that are set aside and have not finished."""
        return (request for heap in self._aside.values() for _, request in heap if request.is_waiting)

    def restart(self) -> None:
        """Forget all requests, and start loading again where adapters are not completely on the device."""
        self._aside.clear()
        for resident in self.residents:
            resident.users, resident.closed_from = 0, None
            if not resident.ready:
                self.empty(resident)

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raise AssertionError if slots and their users disagree."""
        digests = [request.adapter.digest for request in running if request.adapter is not None]
        for resident in self.residents:
            digest = None if resident.key is None else resident.key.digest
            assert resident.users == digests.count(digest or ""), resident
            assert digest is None or self._by_digest[digest] is resident
            assert resident.ready or not resident.users
        assert len(self._by_digest) == sum(each.key is not None for each in self.residents)

    def _skip_finished(self, digest: str) -> None:
        heap = self._aside[digest]
        while heap and not heap[0][1].is_waiting:
            heapq.heappop(heap)
        if not heap:
            del self._aside[digest]
