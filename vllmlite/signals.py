"""Exceptions that signal handlers raise in the middle of other code."""

from __future__ import annotations

import functools
import signal
from types import CodeType


def came_from_handler(error: BaseException) -> bool:
    """Whether a signal handler of the program raised ``error``, rather than the code that it interrupted."""
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _code(handler: object) -> CodeType | None:
    """The code of a Python function, method, partial function or callable object."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    code = getattr(handler, "__code__", None)
    if code is None and callable(handler):
        code = getattr(type(handler).__call__, "__code__", None)
    return code if isinstance(code, CodeType) else None
