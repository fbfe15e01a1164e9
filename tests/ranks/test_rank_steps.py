"""A rank runs the driver's commands in their order, and agrees with the other ranks where they must not differ."""

from __future__ import annotations

import pickle
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.tiers import Copies
from vllmlite.engine_process.wire import unpack
from vllmlite.errors import BackendError
from vllmlite.ranks.messages import AdapterPart, Failed
from vllmlite.ranks.worker import Steps


class Rank:
    """A rank's shared memory, collectives and runner; notes what is done with them."""

    def __init__(self, *commands: Any, other_ranks: int = 1, loads: bool = True) -> None:
        self.commands, self.other_ranks, self.loads = list(commands), other_ranks, loads
        self.done: list[Any] = []
        self.aborted = False
        self.control, ours = socket.socketpair()
        self.adapter_limits, self.model = None, None
        self.backend = SimpleNamespace(asynchronous=False, comm=SimpleNamespace(least=self.least))
        with self.control, ours:
            Steps(self, self, ours, reports=True).run()  # type: ignore[arg-type]
            ours.close()
            with self.control.makefile("rb") as stream:
                self.failures = [unpack(stream)] if stream.peek(1) else []

    def receive(self, seconds: float) -> bytes | None:
        self.aborted = not self.commands
        return None if self.aborted else pickle.dumps(self.commands.pop(0))

    def limit(self, seconds: float) -> None:
        pass

    def send(self, message: bytes) -> None:
        step, result = pickle.loads(message)
        self.done.append((step, result if isinstance(result, StepResult) else str(result)))

    def least(self, value: int) -> int:
        self.done.append("agree")
        return min(value, self.other_ranks)

    def launch(self, schedule: Schedule) -> None:
        self.done.append("launch")

    def collect(self, handle: None) -> StepResult:
        return StepResult([])

    def load_adapter(self, index: int, adapter: Any) -> None:
        self.done.append(f"load {index}")
        if not self.loads:
            raise BackendError("no memory")

    def unload_adapter(self, index: int) -> None:
        self.done.append(f"unload {index}")


def part(first: bool = True, last: bool = True) -> AdapterPart:
    return AdapterPart(2, "digest", {}, first, last)


def test_the_driver_hears_of_copies_once_all_ranks_have_made_them() -> None:
    """A step with rows ends on all ranks together in any case."""
    with_rows = Schedule(slots=[0], counts=[1], copies=Copies())
    rank = Rank((1, Schedule(copies=Copies())), (2, with_rows), (3, Schedule(slots=[0], counts=[1])))
    result = StepResult([])
    assert rank.done == ["launch", "agree", (1, result), "launch", (2, result), "launch", (3, result)]


@pytest.mark.parametrize(
    ("other_ranks", "loads", "done", "failure"),
    [
        (1, True, [(2, StepResult([]))], ""),
        (
            0,
            True,
            ["unload 2", (2, "another rank cannot load the adapter: its log says why")],
            "another rank",
        ),
        (0, False, [(2, "no memory")], "BackendError: no memory"),
    ],
    ids=["all ranks", "not another one", "not this one"],
)
def test_an_adapter_is_on_all_ranks_or_on_none(
    other_ranks: int, loads: bool, done: list[Any], failure: str
) -> None:
    rank = Rank((1, part(last=False)), (2, part(first=False)), other_ranks=other_ranks, loads=loads)
    assert rank.done == ["load 2", "agree", *done]
    assert [failure in each.error for each in rank.failures if isinstance(each, Failed)] == [True] * bool(
        failure
    )
