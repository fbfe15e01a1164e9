"""How many draft tokens a request asks for: policy of speculative decoding, without a model.

Drafts are guesses of the next ids of a request. A step computes them after the last known token and samples at each of
their positions; a draft is accepted while it equals the id that was sampled at its place. The text is therefore that of
a run without drafts, and only the number of steps depends on what is decided here.

**Drafts and two steps in flight.** When a step with drafts is launched, the host does not know yet how many will be
accepted, so it knows neither the positions nor the number of blocks of the request's next row. A request that has
drafts in flight, or waits for drafts to be proposed, is therefore not scheduled before its step is collected
(:attr:`Request.may_run`), while all other requests go on with two steps in flight. The alternative, deriving positions,
context lengths and sampled positions on the device after ``accept``, would put a second way of preparing a batch into
every backend; n-gram drafts, bans and grammars are made on the host from the accepted ids and would have to wait for
them all the same. A request for which speculation does not pay asks for no drafts and so waits for nothing.

**How many.** A request asks for the number ``k`` of drafts with the most expected tokens per unit of step cost:
``(1 + p + … + p^k) / (cost of k + 1 tokens a row + k * cost of a draft)``, where ``p`` is the running rate at which its
drafts are accepted.
Where that is none, it asks for one draft now and then, to notice that its text has changed.
"""

from __future__ import annotations

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
"""Tokens of a request between two attempts, while drafts do not pay."""


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
    until_probe: int = PROBE_INTERVAL
    """Tokens left until the next attempt, while drafts do not pay."""

    @property
    def rate(self) -> float:
        """The probability that a draft whose predecessors were accepted is accepted."""
        return self.accepted / self.tried

    def record(self, drafts: int, accepted: int) -> None:
        """Take in a verification of ``drafts``, of which the first ``accepted`` were accepted."""
        self.accepted = MEMORY * self.accepted + accepted
        self.tried = MEMORY * self.tried + min(accepted + 1, drafts)


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
    draft_cost: StepCost | None = None
    """Time of a step of the model that proposes drafts, by its rows, in the unit of ``cost``; None: drafts are free."""
    fills_cache: bool = False
    """Whether proposing drafts writes keys and values, so that their positions need blocks."""
    reads_states: bool = False
    """Whether proposing drafts reads the model's hidden states, which are not in the prefix cache: the last block of a
    cached prefix is computed again, so that those of its last position are known."""
    _costs: dict[int, list[float]] = field(default_factory=dict)
    """Rows of a step → its cost with 0, 1, 2, … drafts a row."""

    def wanted(self, acceptance: Acceptance, rows: int) -> int:
        """Return how many drafts a request should ask for in a step of ``rows`` rows. While drafts do not pay, each
        call counts towards the interval until the next probe."""
        if not self.most or (self.max_rows is not None and rows > self.max_rows):
            return 0
        costs = self._costs.get(rows)
        if costs is None:
            own = 0.0 if self.draft_cost is None else self.draft_cost(rows)
            costs = [self.cost(rows * (drafts + 1)) + drafts * own for drafts in range(self.most + 1)]
            self._costs[rows] = costs
        best, count, tokens, term, rate = 1.0 / costs[0], 0, 1.0, 1.0, acceptance.rate
        for drafts in range(1, self.most + 1):
            term *= rate
            tokens += term
            speed = tokens / costs[drafts]
            if speed <= best:
                break
            best, count = speed, drafts
        if count:
            acceptance.until_probe = PROBE_INTERVAL
            return count
        acceptance.until_probe -= 1
        if acceptance.until_probe > 0:
            return 0
        acceptance.until_probe = PROBE_INTERVAL
        return 1
