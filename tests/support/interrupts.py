"""Interrupts at chosen points: a hook that raises where CPython could run a signal handler."""

from __future__ import annotations

import dis
import sys
import threading
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
    """Raised in the middle of a call, as KeyboardInterrupt would be."""


@cache
def interruptible(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which CPython checks for signals: after a call, at the start of a function,
    and after a jump back."""
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
        self._thread = threading.get_ident()

    def pass_by(self, code: CodeType, offset: int) -> None:
        """Count the instruction of the package at ``offset`` of ``code``, or interrupt it."""
        if offset in interruptible(code):
            self.count += 1
            if self.count == self._interrupt_at:
                raise Interrupt

    def trace(self, frame: FrameType, event: str, _arg: Any) -> Any:
        """A trace function for :func:`sys.settrace`."""
        if event == "call":
            if not in_package(frame.f_code):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            self.pass_by(frame.f_code, frame.f_lasti)
        return self.trace

    def monitor(self, code: CodeType, offset: int) -> Any:
        """A callback for ``sys.monitoring``, which reports the instructions of all threads."""
        if not in_package(code):
            return DISABLE
        if threading.get_ident() == self._thread:
            self.pass_by(code, offset)
        return None


def in_package(code: CodeType) -> bool:
    """Whether these tests may interrupt ``code``."""
    return code.co_filename.startswith(PACKAGE) or code.co_filename == TESTS


MONITORING: Any = getattr(sys, "monitoring", None)
"""Reports every instruction since Python 3.12, of which on 3.14 a trace function does not hear the first ones."""
DISABLE = MONITORING and MONITORING.DISABLE
TOOL = 4


@contextmanager
def interrupt(at: int | None) -> Iterator[Points]:
    """Run the body and raise Interrupt at its point number ``at``, or only count its points."""
    points = Points(at)
    if MONITORING is None:
        before = sys.gettrace()
        sys.settrace(points.trace)
        try:
            yield points
        finally:
            sys.settrace(before)
        return
    event = MONITORING.events.INSTRUCTION
    MONITORING.use_tool_id(TOOL, __name__)
    MONITORING.register_callback(TOOL, event, points.monitor)
    MONITORING.restart_events()
    MONITORING.set_events(TOOL, event)
    try:
        yield points
    finally:
        MONITORING.set_events(TOOL, 0)
        MONITORING.register_callback(TOOL, event, None)
        MONITORING.free_tool_id(TOOL)


def tries(number: int | None, call: Any, *args: Any) -> bool:
    """Make a call that is interrupted at a point, and return whether it completed before that."""
    try:
        with interrupt(number):
            call(*args)
    except Interrupt:
        return False
    return True
