"""Traces of an engine's steps, in the format that Chrome's tracing page and Perfetto open."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from vllmlite.engine.runner_protocol import Runner, StepResult
from vllmlite.engine.schedule import Schedule

TraceEvent: TypeAlias = dict[str, Any]
"""One event of Chrome's Trace Event Format, ready for JSON."""

MAX_EVENTS = 1_000_000
"""Number of events that a trace keeps, the latest ones."""


class Trace:
    """A recording of spans of time on one thread, as complete events; times are microseconds since it began."""

    def __init__(self) -> None:
        """Start without events."""
        self._begin = time.perf_counter_ns()
        self._events: deque[TraceEvent] = deque(maxlen=MAX_EVENTS)

    @property
    def events(self) -> list[TraceEvent]:
        """The recorded events, the oldest first."""
        return list(self._events)

    @contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """Record how long the body of the ``with`` statement takes, under ``name`` and with ``args``."""
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            end = time.perf_counter_ns()
            self._events.append(
                {
                    "name": name, "ph": "X", "pid": os.getpid(), "tid": threading.get_native_id(), "args": args,
                    "ts": (begin - self._begin) / 1000, "dur": (end - begin) / 1000,
                }
            )  # fmt: skip


def write_trace(events: list[TraceEvent], path: Path) -> None:
    """Write ``events`` to a file that Chrome's tracing page and Perfetto open."""
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


class TracedRunner:
    """A runner that records the calls of another runner in a trace."""

    def __init__(self, runner: Runner, trace: Trace) -> None:
        """Pass calls on to ``runner``."""
        self.runner = runner
        self._trace = trace

    def launch(self, schedule: Schedule) -> Any:
        """Start a step; the handle goes to :meth:`collect`."""
        with self._trace.span("launch", rows=len(schedule.slots), tokens=schedule.num_tokens):
            return self.runner.launch(schedule)

    def collect(self, handle: Any) -> StepResult:
        """Wait for a step and return its results."""
        with self._trace.span("collect"):
            return self.runner.collect(handle)

    def drain(self) -> None:
        """Wait until no launched step of the runner copies blocks of cache tiers any more."""
        self.runner.drain()

    def load_adapter_parts(self, index: int, adapter: Any) -> Iterator[int]:
        """Put an adapter on the device in slot ``index``, which no step uses, in parts; yields the bytes of each.
        Raises VllmliteError if it cannot be used."""
        parts = self.runner.load_adapter_parts(index, adapter)
        while True:
            with self._trace.span("load_adapter", index=index):
                size = next(parts, None)
            if size is None:
                return
            yield size
