"""Records what an engine's thread does when, in the format that Chrome's tracing page and Perfetto read."""

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
from vllmlite.engine.scheduler import Schedule

TraceEvent: TypeAlias = dict[str, Any]
"""One event of the format, ready for JSON."""

MAX_EVENTS = 1_000_000
"""The latest so many are kept."""


class Trace:
    """Spans of one thread (Trace Event Format, complete events), microseconds from the trace's beginning."""

    def __init__(self) -> None:
        """Nothing is recorded yet."""
        self._begin = time.perf_counter_ns()
        self._events: deque[TraceEvent] = deque(maxlen=MAX_EVENTS)

    @property
    def events(self) -> list[TraceEvent]:
        """What has been recorded."""
        return list(self._events)

    @contextmanager
    def span(self, name: str, **args: Any) -> Iterator[None]:
        """Record the time inside, with ``args``."""
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
    """Write a file that the tracing pages open."""
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


class TracedRunner:
    """A runner whose launches and collections are recorded."""

    def __init__(self, runner: Runner, trace: Trace) -> None:
        """Stand in front of ``runner``."""
        self.runner = runner
        self._trace = trace

    def launch(self, schedule: Schedule) -> Any:
        """See :class:`Runner`."""
        with self._trace.span("launch", rows=len(schedule.slots), tokens=schedule.num_tokens):
            return self.runner.launch(schedule)

    def collect(self, handle: Any) -> StepResult:
        """See :class:`Runner`."""
        with self._trace.span("collect"):
            return self.runner.collect(handle)
