"""Measure the time of steps of several sizes, by which the number of drafts is chosen."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate

MEASURED = (1, 8, 2, 4, 16, 32, 64, 128)
"""Numbers of tokens of the steps to measure, in this order. The first two are always measured, the others while time is
left."""
REPEATS = 3
STEPS = 8
"""Number of consecutive steps in one measurement of :func:`waiting_time`."""
MOST_SECONDS = 1.0
"""Seconds after which no further size is measured."""


def step_times(
    profile: Callable[[int], None], most: int, device: str, agree: Callable[[bool], bool] = bool
) -> list[tuple[int, float]]:
    """Return pairs of a number of tokens, ascending and up to ``most``, and the seconds that ``profile`` takes to run
    such a step: processor time on a CPU, where other programs may run.

    A step takes at most as long as one with more tokens; a longer time is taken for a disturbance. Each token is
    sampled from, up to the number of slots, as in a step that decodes or verifies drafts. All ranks run the same steps:
    ``agree`` returns whether every rank called it with True."""
    begin = time.perf_counter()
    times: dict[int, float] = {}
    for tokens in (tokens for tokens in MEASURED if tokens <= most):
        if len(times) > 1 and not agree(time.perf_counter() - begin <= MOST_SECONDS):
            break
        profile(tokens)  # allocates what the step needs
        times[tokens] = min(_seconds(profile, tokens, device) for _ in range(REPEATS))
    sizes = sorted(times, reverse=True)
    return sorted(zip(sizes, accumulate((times[size] for size in sizes), min), strict=True))


def _seconds(profile: Callable[[int], None], tokens: int, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    begin = clock()
    profile(tokens)
    return clock() - begin


def waiting_time(profile: Callable[[int, bool], None]) -> float:
    """Return the seconds by which a step of one token takes longer if its results are read before the next step is
    launched; the second argument of ``profile`` says whether they are read."""

    def seconds(waits: bool) -> float:
        begin = time.perf_counter()
        for step in range(STEPS):
            profile(1, waits or step == STEPS - 1)
        return (time.perf_counter() - begin) / STEPS

    return max(min(seconds(True) for _ in range(REPEATS)) - min(seconds(False) for _ in range(REPEATS)), 0.0)
