"""Standard streams that may be closed, None or an object with ``write`` alone, as hosts of Python set them."""

from __future__ import annotations

import contextlib
import os
import sys


def is_terminal(stream: object) -> bool:
    """Whether ``stream`` is open on a terminal."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):  # nothing that can say, or closed
        return False


def note(text: str, end: str = "\n") -> None:
    """Write ``text`` to standard error if that takes it: a message is no reason to fail."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text + end)
            if hasattr(sys.stderr, "flush"):
                sys.stderr.flush()


def open_closed_streams() -> bool:
    """Open /dev/null for each standard stream that the process was started without, so that no other file takes its
    descriptor. Returns whether standard output was one of them."""
    output_is_closed = sys.stdout is None
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest descriptor that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
    return output_is_closed
