"""Log lines about requests that are written once each, however many requests there are."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_NOTES = 256
"""Different lines that are written; clients choose what stands in them."""


class Notes:
    """What has been noted since the server started."""

    def __init__(self) -> None:
        self._noted: set[str] = set()

    @property
    def are_full(self) -> bool:
        """Whether no more lines are written."""
        return len(self._noted) >= MAX_NOTES

    def once(self, key: str, line: Callable[[], str]) -> None:
        """Log ``line`` unless ``key`` has been noted."""
        if key in self._noted or self.are_full:
            return
        self._noted.add(key)
        logger.warning("%s", line())
        if self.are_full:
            logger.warning("%d such lines have been logged: there will be no more", MAX_NOTES)
