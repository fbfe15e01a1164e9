"""Mutual exclusion of the calls of one object by several threads, safe against interrupts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from vllmlite.errors import EngineUseError

P = ParamSpec("P")
R = TypeVar("R")

_num_forks = 0
"""Number of forks between the program's first process and this one."""


def _count_fork() -> None:
    global _num_forks
    _num_forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Turns:
    """The lock of one object, held by one thread at a time; rejects re-entry and use after a fork."""

    def __init__(self, owner: str) -> None:
        """Create a free lock. ``owner`` names the object in error messages."""
        self.lock = threading.RLock()
        self._owner = owner
        self.num_forks = _num_forks

    def check(self) -> None:
        """Raise :class:`EngineUseError` after a fork, or if this thread holds the lock already."""
        if self.num_forks != _num_forks:
            raise EngineUseError(
                f"this {self._owner} was created in the parent process, and its threads and devices do not exist here: "
                f"create the {self._owner} in the child, or start the child with multiprocessing's 'spawn'"
            )
        if self.is_mine():
            raise EngineUseError(
                f"this {self._owner} was called by a signal handler or callback while a call of the same thread runs: "
                "wait until that call has returned"
            )

    def is_mine(self) -> bool:
        """Return whether this thread holds the lock."""
        return self.lock._is_owned()  # type: ignore[no-any-return, attr-defined]


class HasTurns(Protocol):
    """An object with a ``turns`` attribute, for :func:`takes_turn`."""

    @property
    def turns(self) -> Turns:
        """The lock of the object."""
        ...


Self = TypeVar("Self", bound=HasTurns)


def takes_turn(
    method: Callable[Concatenate[Self, P], R],
) -> Callable[Concatenate[Self, P], R]:
    """Decorate ``method`` to run while no other thread runs such a method of the same object.

    Raises :class:`EngineUseError` in a forked process, and if the thread runs such a method already."""

    @wraps(method)
    def run(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        turns = self.turns
        lock = turns.lock
        if turns.num_forks != _num_forks or lock._is_owned():  # type: ignore[attr-defined]
            turns.check()
        try:
            lock.acquire()
            result = method(self, *args, **kwargs)
        finally:
            # CPython raises signal exceptions after calls, at the start of functions and at backward jumps: never
            # between the start of this block and the release.
            try:  # noqa: SIM105  (suppress() would add a call)
                lock.release()
            except RuntimeError:
                pass  # interrupted while waiting for the lock
        return result

    return run
