"""Turns: calls of several threads into one object run one after the other, whatever interrupts them."""

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
"""Forks between the program's first process and this one."""


def _count_fork() -> None:
    global _num_forks
    _num_forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Turns:
    """The right to call one object, which one thread has at a time."""

    def __init__(self, owner: str) -> None:
        """``owner`` is what error messages call the object."""
        self.lock = threading.RLock()
        self._owner = owner
        self.num_forks = _num_forks

    def check(self) -> None:
        """Raise :class:`EngineUseError` where waiting for a turn would be in vain."""
        if self.num_forks != _num_forks:
            raise EngineUseError(
                f"this {self._owner} was made in the parent of this process, and its threads and devices did not come "
                f"along: make the {self._owner} in the child, or start the child with multiprocessing's 'spawn'"
            )
        if self.is_mine():
            raise EngineUseError(
                f"this {self._owner} was called by a signal handler or callback while a call of the same thread runs: "
                "wait until that call has returned"
            )

    def is_mine(self) -> bool:
        """Whether this thread has the turn."""
        return self.lock._is_owned()  # type: ignore[no-any-return, attr-defined]


class HasTurns(Protocol):
    """An object whose methods take turns."""

    @property
    def turns(self) -> Turns:
        """Its turns."""
        ...


Self = TypeVar("Self", bound=HasTurns)


def takes_turn(
    method: Callable[Concatenate[Self, P], R],
) -> Callable[Concatenate[Self, P], R]:
    """Have ``method`` wait until no other thread is in a method of the object that takes turns.

    Raises :class:`EngineUseError` in a forked process, and where the thread is in such a method already."""

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
            # CPython interrupts code after a call, at the start of a function and where it jumps back: never between
            # the start of this block and the release.
            try:  # noqa: SIM105  (to enter suppress() is a call)
                lock.release()
            except RuntimeError:
                pass  # interrupted while it waited for its turn
        return result

    return run
