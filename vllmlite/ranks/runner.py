"""The runner of an engine whose model is computed by several ranks: sends schedules to them, gets results back."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.errors import BackendError, EngineDeadError
from vllmlite.ranks.group import RankGroup
from vllmlite.ranks.messages import Command, Ready, Reply


class ParallelRunner:
    """Runs schedules on all ranks of a group.

    An interrupt loses at most the results of the steps in flight, which the ranks complete all the same."""

    def __init__(self, group: RankGroup, ready: Ready) -> None:
        """``ready`` is the answer of the rank that reports results."""
        self.group = group
        self.backend, self.model = ready.backend, ready.model
        self._step = 0

    def launch(self, schedule: Schedule) -> int:
        """Send a step to the ranks. Raises EngineDeadError if one has ended."""
        self._step += 1
        self._send((self._step, schedule))
        return self._step

    def collect(self, handle: int) -> StepResult:
        """Wait for a step's results. Raises what it raised on the ranks, or EngineDeadError if one has ended."""
        if self.backend.asynchronous:
            self._send((handle, None))
        while True:
            message = self.group.ranks.receive(1.0)
            if message is None:
                self.group.check()
                continue
            reply: Reply = pickle.loads(message)
            step, result = reply
            if step != handle:
                continue  # of a step whose collection was interrupted
            if isinstance(result, Exception):
                self.group.agree_on_failure(step)
                raise result
            return result

    def load_adapter_parts(self, index: int, adapter: Any) -> Iterator[int]:
        """Raise BackendError: adapters need a single rank, as the configuration has been told."""
        raise BackendError("adapters need a single rank in this version")

    def _send(self, command: Command) -> None:
        if not self.group.ranks.send(pickle.dumps(command, pickle.HIGHEST_PROTOCOL)):
            self.group.check()
            raise EngineDeadError("the ranks have ended")
