"""Safe use of standard streams, which may be closed, None, or (in embedded Python) objects with only ``write``."""

from __future__ import annotations

import contextlib
import os
import sys


def is_terminal(stream: object) -> bool:
    """Return whether ``stream`` is an open terminal."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):  # no isatty method, or closed
        return False


def note(text: str, end: str = "\n") -> None:
    """Write ``text`` to standard error; ignore failures."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text + end)
            if hasattr(sys.stderr, "flush"):
                sys.stderr.flush()


def open_closed_streams() -> bool:
    """Open /dev/null for each standard stream that was closed at start, so that no other file gets its descriptor.

    Return whether standard output was closed."""
    output_is_closed = sys.stdout is None
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
    return output_is_closed
