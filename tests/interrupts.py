"""Interrupts at chosen points: a trace function that raises where CPython could run a signal handler."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import vllmlite

PACKAGE = str(Path(vllmlite.__file__).parent)
TESTS = str(Path(__file__).parent / "fake_runner.py")


class Interrupt(BaseException):
    """Raised in the middle of a call, as KeyboardInterrupt is."""


@cache
def interruptible(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which CPython looks for signals: those after a call, at the start of a
    function, and after a jump back. It looks nowhere else."""
    found, looks = set(), False
    for instruction in dis.get_instructions(code):
        if looks:
            found.add(instruction.offset)
        name = instruction.opname
        looks = name.startswith("CALL") or name == "RESUME"
        if "JUMP_BACKWARD" in name:
            found.add(instruction.argval)
    return frozenset(found)


class Points:
    """Counts the points of the package at which it could be interrupted, and interrupts it at one of them."""

    def __init__(self, interrupt_at: int | None) -> None:
        self.count = 0
        self._interrupt_at = interrupt_at

    def trace(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "call":
            name = frame.f_code.co_filename
            if not name.startswith(PACKAGE) and name != TESTS:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode" and frame.f_lasti in interruptible(frame.f_code):
            self.count += 1
            if self.count == self._interrupt_at:
                raise Interrupt
        return self.trace


@contextmanager
def interrupt(at: int | None) -> Iterator[Points]:
    """Run the body, which raises Interrupt at its point number ``at``, or count its points."""
    points = Points(at)
    before = sys.gettrace()
    sys.settrace(points.trace)
    try:
        yield points
    finally:
        sys.settrace(before)


def tries(number: int | None, call: Any, *args: Any) -> bool:
    """Make a call that is interrupted at a point; whether it came to its end before that."""
    try:
        with interrupt(number):
            call(*args)
    except Interrupt:
        return False
    return True
