"""Log lines about requests that are written only once, however many requests cause them."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_NOTES = 256
"""Maximum number of different lines, because clients influence their text."""


class Notes:
    """Logs each line once since the server started."""

    def __init__(self) -> None:
        self._noted: set[str] = set()

    @property
    def are_full(self) -> bool:
        """Whether the maximum number of lines has been logged."""
        return len(self._noted) >= MAX_NOTES

    def once(self, key: str, line: Callable[[], str]) -> None:
        """Log ``line`` unless a line with the same ``key`` was logged."""
        if key in self._noted or self.are_full:
            return
        self._noted.add(key)
        logger.warning("%s", line())
        if self.are_full:
            logger.warning("%d such lines have been logged; further ones are suppressed", MAX_NOTES)
