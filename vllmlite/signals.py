"""Detect exceptions that signal handlers raise inside other code."""

from __future__ import annotations

import functools
import signal
from types import CodeType


def came_from_handler(error: BaseException) -> bool:
    """Return whether a signal handler of the program raised ``error``, not the code that it interrupted."""
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _code(handler: object) -> CodeType | None:
    """Return the code object of a function, method, partial or callable object; None if it has none."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    code = getattr(handler, "__code__", None)
    if code is None and callable(handler):
        code = getattr(type(handler).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None
