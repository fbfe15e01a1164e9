"""The runner of an engine whose model is computed by several ranks: it sends schedules to the ranks and receives
results.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.tiers import Copies
from vllmlite.errors import EngineDeadError
from vllmlite.ranks.group import RankGroup
from vllmlite.ranks.host_messages import StepCommand
from vllmlite.ranks.messages import AdapterPart, Command, Ready, Reply
from vllmlite.weights.adapter import Adapter, LowRank


class ParallelRunner:
    """Runs schedules on all ranks of a group. If a call is interrupted, at most the results of the steps in flight are
    lost; the ranks complete these steps nevertheless."""

    def __init__(self, group: RankGroup, ready: Ready, memory: Sequence[NDArray[np.uint8]] = ()) -> None:
        """Drive the ranks of ``group``. ``ready`` is the message of the rank that reports results; ``memory`` is the
        host memory of the ranks for blocks, if this process shares it."""
        self.group = group
        self.backend, self.model = ready.backend, ready.model
        self._has_places, self._memory = ready.host is not None, memory
        self._step = 0
        self._replies: dict[int, StepResult | Exception] = {}
        """Replies that have been received but not collected, by step."""

    def launch(self, schedule: Schedule) -> int:
        """Send a step to the ranks. Raises EngineDeadError if one has ended."""
        self._step += 1
        self._send((self._step, schedule))
        return self._step

    def collect(self, handle: int) -> StepResult:
        """Wait for a step's results. Raises the error that the step raised on the ranks, or EngineDeadError if one has
        ended."""
        if self.backend.asynchronous:
            self._send((handle, None))
        for interrupted in [step for step in self._replies if step < handle]:
            del self._replies[interrupted]
        return self._wait_for(handle)

    def drain(self) -> None:
        """Wait until the ranks have ended all steps, or have ended themselves. Does nothing without cache tiers."""
        if self._has_places:
            with suppress(EngineDeadError):  # the next step raises it
                self.collect(self.launch(Schedule(copies=Copies())))

    def host_memory(self) -> Sequence[NDArray[np.uint8]]:
        """Return the host memory of the ranks for blocks; empty if this process does not share it."""
        return self._memory

    def load_adapter_parts(self, index: int, adapter: Adapter) -> Iterator[int]:
        """Send an adapter to the ranks, a layer at a time, and wait until all have loaded it; see
        :meth:`ModelRunner.load_adapter_parts`."""
        layers: defaultdict[str, dict[str, LowRank]] = defaultdict(dict)
        for name, change in adapter.weights.items():
            layers[name.partition(".")[0]][name] = change
        for number, weights in enumerate(layers.values(), 1):
            self._step += 1
            last = number == len(layers)
            self._send((self._step, AdapterPart(index, adapter.digest, weights, number == 1, last)))
            if last:
                self._wait_for(self._step)
            yield sum(change.num_bytes for change in weights.values())

    def _wait_for(self, step: int) -> StepResult:
        """Return the reply to a command, or raise the error that it contains. Replies to other commands are kept."""
        while step not in self._replies:
            message = self.group.ranks.receive(1.0)
            if message is None:
                self.group.check()
                continue
            reply: Reply = pickle.loads(message)
            self._replies[reply[0]] = reply[1]
        result = self._replies.pop(step)
        if isinstance(result, Exception):
            self.group.agree_on_failure(step)
            raise result
        return result

    def _send(self, command: Command) -> None:
        step, work = command
        if not isinstance(work, AdapterPart):  # adapters need ranks of one host
            self.group.send(StepCommand(step, work))
        if not self.group.ranks.send(pickle.dumps(command, pickle.HIGHEST_PROTOCOL)):
            self.group.check()
            raise EngineDeadError("the ranks have ended")
