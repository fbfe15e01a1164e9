"""How many draft tokens a request asks for: policy of speculative decoding, without a model.

Drafts are guesses of the next ids of a request. A step computes them after the last known token and samples at each of
their positions; a draft is accepted while it equals the id that was sampled at its place. The text is therefore that of
a run without drafts, and only the number of steps depends on what is decided here.

**Drafts and two steps in flight.** When a step with drafts is launched, the host does not know yet how many will be
accepted, so it knows neither the positions nor the number of blocks of the request's next row. A request that has
drafts in flight, or waits for drafts to be proposed, is therefore not scheduled before its step is collected
(:attr:`Request.may_run`), while all other requests go on with two steps in flight. It is then in every second step; so
where many rows of a step have drafts or want them, the next step waits for all of them (:func:`holds_back`). The
alternative, deriving positions,
context lengths and sampled positions on the device after ``accept``, would put a second way of preparing a batch into
every backend; n-gram drafts, bans and grammars are made on the host from the accepted ids and would have to wait for
them all the same. A request for which speculation does not pay asks for no drafts and so waits for nothing.

**How many.** A request asks for the number ``k`` of drafts with the most expected tokens per unit of step cost:
``(1 + p + … + p^k) / cost(k + 1 tokens a row)``, where ``p`` is the running rate at which its drafts are accepted, at
first that of recent requests. Where that is none, it is asked again after some tokens, and drafts one token now and
then (a probe), to notice that its text has changed. Probes take at most :data:`PROBE_SHARE` of the time of steps.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

MEMORY = 0.8
"""Weight of what was known before a verification, against that verification's drafts."""
PRIOR = (0.8, 1.0)
"""Drafts that every request begins with: accepted, and tried."""
MOST_DRAFTS = 256
"""Most drafts of a step, over all rows; each takes a row of logits."""
PROBE_INTERVAL = 96
"""Least tokens of a request between two probes, while drafts do not pay."""
PROBE_SHARE = 0.01
"""Most time of probes, as a part of the time of steps; where they cost more, they are made less often."""
ASKED_AGAIN = 16
"""Tokens of a request for which nothing is decided again, while drafts do not pay: other rows may have come or gone."""
RECENT_MEMORY = 0.98
"""Weight of the acceptance of recent requests' drafts before a verification, against that verification's."""
LEAST_PRIOR = 0.3
"""Least rate of acceptance with which a request begins."""


HELD_BACK = 6
"""The next step waits for one that at least the HELD_BACKth part of its rows wait for."""


def holds_back(waiting: int, rows: int) -> bool:
    """Return whether no step should be launched beside one of ``rows`` rows, of which ``waiting`` have drafts or want
    some.

    Two steps in flight leave out the waiting rows of every second step; one after the other takes longer, by a fifth or
    so. With three tokens a step for rows with drafts, both are equal if a seventh of the rows wait."""
    return waiting * HELD_BACK >= rows


class StepCost:
    """The time of a step by its number of tokens, in any unit: linear between measured points."""

    def __init__(self, points: Sequence[tuple[int, float]] = ((1, 1.0), (33, 2.0))) -> None:
        """Take ``points`` (tokens, time), ascending. The last two extend to larger steps; of one point, all cost the
        same."""
        points = points if len(points) > 1 else [*points, (points[0][0] + 1, points[0][1])]
        self._tokens = [tokens for tokens, _ in points]
        self._times = [time for _, time in points]

    def __call__(self, tokens: int) -> float:
        """Return the time of a step of ``tokens``."""
        at = min(max(bisect_left(self._tokens, tokens), 1), len(self._tokens) - 1)
        (x0, x1), (y0, y1) = self._tokens[at - 1 : at + 1], self._times[at - 1 : at + 1]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


@dataclass(slots=True)
class Acceptance:
    """How the drafts of one request have fared: decaying counts of drafts accepted and tried.

    The drafts after the first rejected one were not tried."""

    accepted: float = PRIOR[0]
    tried: float = PRIOR[1]
    waited: int = 0
    """Tokens without drafts since the last that was asked for."""
    pause: int = 1
    """Tokens until the request is asked again, while drafts do not pay."""

    @property
    def rate(self) -> float:
        """The probability that a draft whose predecessors were accepted is accepted."""
        return self.accepted / self.tried

    def record(self, drafts: int, accepted: int, memory: float = MEMORY) -> None:
        """Take in a verification of ``drafts``, of which the first ``accepted`` were accepted."""
        self.accepted = memory * self.accepted + accepted
        self.tried = memory * self.tried + min(accepted + 1, drafts)


@dataclass(slots=True)
class DraftPolicy:
    """Decides how many drafts a request asks for."""

    most: int
    """Most drafts of a row; 0: nothing is speculated."""
    max_rows: int | None = None
    """Most running requests with which anything is speculated."""
    overlapped: bool = False
    """Whether two steps are in flight, so that a request which waits for drafts loses time even if there are none."""
    cost: StepCost = field(default_factory=StepCost)
    by_rows: Sequence[tuple[int, int, int]] = ()
    """Least and most running requests, and most drafts of a row with as many; :attr:`most` with other numbers."""
    max_len: int = sys.maxsize
    """Most tokens of a sequence for which anything is speculated."""
    draft_cost: StepCost | None = None
    """Time of a step of the model that proposes drafts, by its rows, in the unit of ``cost``; None: drafts are free."""
    fills_cache: bool = False
    """Whether proposing drafts writes keys and values, so that their positions need blocks."""
    reads_states: bool = False
    """Whether proposing drafts reads the model's hidden states, which are not in the prefix cache: the last block of a
    cached prefix is computed again, so that those of its last position are known."""
    wait: float = 0.0
    """Time by which a step that waits for the one before takes longer than one that was launched beside it."""
    recent: Acceptance = field(default_factory=lambda: Acceptance(10 * PRIOR[0], 10 * PRIOR[1]))
    """How the drafts of all requests have fared lately."""
    _costs: dict[int, tuple[list[float], int]] = field(default_factory=dict)
    """Rows of a step → its cost with 0, 1, 2, … drafts a row, and the tokens between two probes of a request."""

    def begin(self) -> Acceptance:
        """Return the acceptance with which a new request begins."""
        return Acceptance(max(self.recent.rate, LEAST_PRIOR) * PRIOR[1], PRIOR[1])

    def record(self, acceptance: Acceptance, drafts: int, accepted: int) -> None:
        """Update the acceptance statistics of a request with a verification of ``drafts`` drafts, the first
        ``accepted`` of which were accepted."""
        acceptance.record(drafts, accepted)
        self.recent.record(drafts, accepted, RECENT_MEMORY)

    def row_cost(self, drafts: int, rows: int) -> float:
        """Return the part of a row with ``drafts`` in the cost of a step of ``rows`` such rows."""
        if rows not in self._costs:
            self._costs[rows] = self._cost_of(rows)
        costs, _ = self._costs[rows]
        return costs[min(drafts, len(costs) - 1)] / rows

    def wanted(self, acceptance: Acceptance, rows: int) -> int:
        """Return how many drafts a request should ask for in a step of ``rows`` rows. If it is none, the request is
        asked again after ``acceptance.pause`` tokens."""
        if rows not in self._costs:
            self._costs[rows] = self._cost_of(rows)
        costs, interval = self._costs[rows]
        best, count, tokens, term, rate = 1.0 / costs[0], 0, 1.0, 1.0, acceptance.rate
        for drafts in range(1, len(costs)):
            term *= rate
            tokens += term
            speed = tokens / costs[drafts]
            if speed <= best:
                break
            best, count = speed, drafts
        if not count and len(costs) > 1 and acceptance.waited >= interval:
            count = 1
        if count:
            acceptance.waited = 0
        else:
            acceptance.pause = max(min(ASKED_AGAIN, interval - acceptance.waited), 1)
            acceptance.waited += acceptance.pause
        return count

    def _limit(self, rows: int) -> int:
        """Return the most drafts of a row in a step of ``rows`` rows."""
        if self.max_rows is not None and rows > self.max_rows:
            return 0
        named = (most for first, last, most in self.by_rows if first <= rows <= last)
        return min(self.most, next(named, self.most))

    def _cost_of(self, rows: int) -> tuple[list[float], int]:
        """Return the cost of a step of ``rows`` rows by the drafts of each, and the tokens between two probes."""
        own = 0.0 if self.draft_cost is None else self.draft_cost(rows)
        plain = self.cost(rows)
        costs = [self.cost(rows * (drafts + 1)) + drafts * own for drafts in range(self._limit(rows) + 1)]
        costs[0] = max(costs[0] - self.wait, 0.1 * plain)
        together = self.cost(2 * rows) - plain + own + 2 * self.wait  # all requests probe in one step
        # Each in another one: it is then left out of two steps, if it waits for them.
        alone = rows * (self.cost(rows + 1) - plain) + own + (2 * costs[0] if self.wait else 0.0)
        return costs, max(PROBE_INTERVAL, math.ceil(max(together, alone) / (PROBE_SHARE * costs[0])))
