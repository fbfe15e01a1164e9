"""Sleep mode: an engine frees the memory of its runner, and allocates it again when it wakes up."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.request import Request
from vllmlite.engine.runner_protocol import Runner
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.scheduler import Scheduler
from vllmlite.engine.tiers import Tiers
from vllmlite.engine.trace import TracedRunner
from vllmlite.engine.unfinished import UnfinishedRequests
from vllmlite.errors import EngineSleepingError, ParameterError, VllmliteError

LEVELS = (1, 2)
"""1: weights are kept in host memory; 2: they are read again from the checkpoint."""
MODES = ("abort", "wait", "keep")
"""Ways to treat unfinished requests: abort them, let them finish first, or continue them after waking up."""
TAGS = frozenset(("weights", "kv_cache"))
"""Parts of the memory, which clients may wake up in separate calls."""
WRITING_SECONDS = 30.0
"""Maximum seconds that an engine waits for blocks to be written to disk before it sleeps."""


class RunnerMemory(Protocol):
    """The memory of an engine's runner. These methods are called only while no step is in flight."""

    def release(self, level: int) -> None:
        """Free the memory. The contents of the key/value cache are lost."""
        ...

    def restore(self) -> Runner:
        """Allocate the memory again, and return the runner. Raises VllmliteError if that fails; it may then be called
        again."""
        ...


@dataclass(slots=True)
class SleepMode:
    """The state of sleep mode of an engine."""

    memory: RunnerMemory
    level: int = 0
    """One of :data:`LEVELS`; 0 while the engine is awake."""
    asleep: frozenset[str] = frozenset()
    """Those of :data:`TAGS` that have not been woken up."""


class SleepingRunner:
    """Runner of an engine that sleeps without its real runner; refuses all work."""

    def launch(self, schedule: Schedule) -> NoReturn:
        """Raise EngineSleepingError: a sleeping engine runs no steps."""
        raise EngineSleepingError

    def collect(self, handle: Any) -> NoReturn:
        """Raise EngineSleepingError: a sleeping engine runs no steps."""
        raise EngineSleepingError

    def drain(self) -> None:
        """Do nothing: no step is in flight."""

    def load_adapter_parts(self, index: int, adapter: Any) -> Iterator[int]:
        """Raise EngineSleepingError: a sleeping engine loads no adapters."""
        raise EngineSleepingError


def check_sleep(level: object, mode: object = MODES[0]) -> None:
    """Raise ParameterError unless ``level`` and ``mode`` are valid."""
    if isinstance(level, bool) or level not in LEVELS:
        raise ParameterError("level", level, "must be 1 or 2")
    if mode not in MODES:
        raise ParameterError("mode", mode, f"must be one of {', '.join(MODES)}")


def check_tags(tags: Iterable[str] | None) -> frozenset[str]:
    """Return ``tags`` as a set, all of them for None. Raises ParameterError for an unknown tag."""
    if tags is None:
        return TAGS
    if isinstance(tags, str) or not TAGS.issuperset(found := list(tags)):
        raise ParameterError("tags", tags, f"must be a list of {', '.join(sorted(TAGS))}")
    return frozenset(found)


class CanSleep:
    """The part of an engine that lets it sleep. Not thread-safe, and interrupts are handled as in the engine."""

    scheduler: Scheduler
    runner: Runner
    sleep_mode: SleepMode | None = None
    """State of sleep mode; None unless it is enabled."""
    _unfinished: UnfinishedRequests
    _in_flight: deque[tuple[Schedule, list[Request], Any]]
    _changing: bool

    def sleep(self, level: int = 1) -> None:
        """Free the memory of the runner until :meth:`wake_up`; unfinished requests are then computed again.

        At ``level`` 1 the weights are kept in host memory; at level 2 they are read again from the checkpoint. The
        prefix cache is emptied, except for blocks in the cache tiers (at level 2 only those on disk). An engine that
        sleeps at level 1 may go on to level 2. Raises ParameterError if sleep mode is not enabled, and VllmliteError,
        without sleeping, if the memory cannot be freed."""
        mode = self._sleep_mode()
        check_sleep(level)
        self._restore_if_interrupted()
        if level <= mode.level:
            return
        self._changing = True
        if not mode.level:
            self._empty_pool()
        if level == 2:
            self.scheduler.drop_contents()
        before = mode.level
        mode.level, mode.asleep = level, TAGS  # if this is interrupted now, the engine sleeps
        if level == 2:
            self._set_runner(SleepingRunner())
        try:
            mode.memory.release(level)
        except VllmliteError:
            mode.level = before
            raise
        finally:
            self._changing = False

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Allocate the memory that :meth:`sleep` has freed, once all of :data:`TAGS` have been given, in this call or
        in earlier ones; None stands for all. Raises VllmliteError, and stays asleep, if that fails."""
        mode = self._sleep_mode()
        found = check_tags(tags)
        self._restore_if_interrupted()
        if mode.level and found >= mode.asleep:
            self._set_runner(mode.memory.restore())
            mode.level = 0
        mode.asleep -= found

    def is_sleeping(self) -> bool:
        """Whether the engine sleeps, or has been woken up in part."""
        return self.sleep_level > 0

    @property
    def sleep_level(self) -> int:
        """Level at which the engine sleeps; 0 while it is awake."""
        return 0 if self.sleep_mode is None else self.sleep_mode.level

    def _sleep_mode(self) -> SleepMode:
        if self.sleep_mode is None:
            raise ParameterError("enable_sleep_mode", False, "must be True for an engine that is to sleep")
        return self.sleep_mode

    def check_awake(self) -> None:
        """Raise EngineSleepingError while the engine sleeps."""
        if self.is_sleeping():
            raise EngineSleepingError

    def _empty_pool(self) -> None:
        """Collect the steps in flight, save the prefix cache in the tiers, and empty the block pool. If there are
        unfinished requests, they are queued again, and the host's tier is emptied too."""
        if self._unfinished.by_id:
            for _, _, handle in self._in_flight:
                self.runner.collect(handle)
            self._restore()
            self._changing = True
            return
        outputs: list[EngineOutput] = []
        tiers = self.scheduler.tiers
        if tiers is not None:
            self._flush(outputs, tiers, everything=True)
        while self._in_flight:
            self._collect(outputs)
        if tiers is not None:
            tiers.finish_writing(WRITING_SECONDS)
        self.scheduler.pool.forget_all()

    def _set_runner(self, runner: Runner) -> None:
        """Replace the runner, inside the one that records a trace."""
        if isinstance(self.runner, TracedRunner):
            self.runner.runner = runner
        else:
            self.runner = runner

    def can_step(self) -> bool:
        """Whether there are unfinished requests, and the engine is awake."""
        return bool(self._unfinished.by_id) and not self.is_sleeping()

    def _restore_if_interrupted(self) -> None:
        raise NotImplementedError

    def _restore(self) -> None:
        raise NotImplementedError

    def _collect(self, outputs: list[EngineOutput]) -> None:
        raise NotImplementedError

    def _flush(self, outputs: list[EngineOutput], tiers: Tiers, everything: bool = False) -> None:
        raise NotImplementedError
