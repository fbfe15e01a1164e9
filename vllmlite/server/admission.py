"""Admission of requests: limits the sequences that run or wait, and admits none while the server shuts down."""

from __future__ import annotations

import math
from http import HTTPStatus

from vllmlite.errors import ParameterError
from vllmlite.server.errors import ApiError
from vllmlite.server.metrics import Metrics


class Admission:
    """Counts the unfinished sequences, of which ``max_num_seqs`` may run and ``max_queue`` more may wait."""

    def __init__(self, max_num_seqs: int, max_queue: int, metrics: Metrics) -> None:
        """Start without sequences; rejections are counted in ``metrics``."""
        self.draining = False
        """Set when the server shuts down; then nothing more is admitted."""
        self.num_unfinished = 0
        self.capacity = max_num_seqs + max_queue
        self._max_num_seqs = max_num_seqs
        self._max_queue = max_queue
        self._metrics = metrics

    def admit(self, count: int) -> None:
        """Admit ``count`` sequences. Raises ApiError if the queue is full or the server is shutting down."""
        if self.draining:
            self._metrics.rejected("shutting_down")
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", headers={"retry-after": "5"}
            )
        if count > self.capacity:
            raise ParameterError("n", count, f"prompts times n must be at most {self.capacity}")
        if self.num_unfinished + count > self.capacity:
            self._metrics.rejected("queue_full")
            waiting = self.num_unfinished - self._max_num_seqs
            wait = self._metrics.mean_latency() * (waiting + count) / self._max_num_seqs
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"the queue is full: {max(waiting, 0)} of at most {self._max_queue} sequences are waiting",
                code="queue_full",
                headers={"retry-after": str(min(max(math.ceil(wait), 1), 60))},
            )
        self.num_unfinished += count

    def release(self, count: int) -> None:
        """Count ``count`` sequences as ended."""
        self.num_unfinished -= count
