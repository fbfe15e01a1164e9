"""The graphs of a model runner: steps that are captured once and replayed, and how many of them may exist."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import CAPTURED_QUERY_LEN, ForwardBatch, GraphKey, Slots, Step, Tensor
from vllmlite.backends.kv_cache import KVSpec

MOST_GRAPHS = 40
"""Maximum number of captured steps, unless those of one token a row leave less room than ``LEAST_RECORDED``."""
LEAST_RECORDED = 5
"""Number of captured steps with several tokens a row that there is always room for."""
RECORDED_AFTER = 16
"""Number of uncaptured steps of one kind, with several tokens a row, after which that kind is captured: capturing then
takes a small part of the time, even if captured steps are dropped again."""
MEMORY_BOUND_TOKENS = 32
"""Number of tokens up to which a step takes about as long as reading the weights, so that padding costs nothing."""
MOST_RECORDED_ROWS = 32
"""Maximum number of rows of captured steps with several tokens a row."""


class Graphs:
    """The captured steps of one model runner; every token of such a step is sampled from.

    A batch may have fewer rows, and rows of fewer tokens, than the step that it runs in. Steps of one token a row are
    captured at start, for all of the backend's numbers of rows. Steps of several tokens a
    row are captured when :meth:`record` asks for them, which the runner does for those that come often; where there are
    :attr:`limit` steps already, the one of these that was used longest ago is dropped. :meth:`find` captures nothing.
    """

    def __init__(
        self,
        backend: Backend,
        step: Step,
        slots: Slots,
        spec: KVSpec,
        rows: Sequence[int],
        *,
        adapters: bool = False,
    ) -> None:
        """Prepare to capture ``step``. ``rows`` are the numbers of rows to capture, ascending, from
        :meth:`Backend.graph_rows`. ``adapters``: rows may have LoRA adapters."""
        self._backend, self._step, self._slots, self._spec = backend, step, slots, spec
        self._rows = rows
        self._kinds = (False, True) if adapters else (False,)
        self._steps: dict[GraphKey, Step] = {}
        self._missed: Counter[GraphKey] = Counter()
        """Number of steps that ran uncaptured, for each key."""
        self.limit = max(MOST_GRAPHS, len(rows) * len(self._kinds) + LEAST_RECORDED)
        """Maximum number of captured steps."""

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[GraphKey]:
        return iter(self._steps)

    def run(self, key: GraphKey, batch: ForwardBatch) -> Sequence[Tensor]:
        """Run the captured step of ``key`` on a batch that was uploaded for it."""
        return self._steps[key](batch)

    def capture(self) -> Iterator[int]:
        """Capture the steps of one token a row, the largest first; yields each one's number of rows."""
        for rows in reversed(self._rows):
            for adapted in self._kinds:
                self._capture(GraphKey(rows, 1, adapted))
            yield rows

    def record(self, rows: int, query_len: int, adapted: bool = False) -> bool:
        """Capture the step for ``rows`` rows of ``query_len`` tokens unless it is captured already. Returns False if
        such a step cannot be captured."""
        if (
            not self._steps
            or rows > min(self._rows[-1], MOST_RECORDED_ROWS)
            or query_len > CAPTURED_QUERY_LEN
        ):
            return False
        key = self._key(rows, query_len, adapted)
        if key not in self._steps:
            if len(self._steps) >= self.limit:
                del self._steps[next(old for old in self._steps if old.query_len > 1)]
            self._capture(key)
        return True

    def record_if_frequent(self, batch: ForwardBatch) -> None:
        """Count a step of several tokens a row, and capture its kind after :data:`RECORDED_AFTER` of them."""
        rows, query_len, adapted = batch.num_rows, batch.max_query_len, batch.adapters is not None
        if not self._fits(batch) or rows > self._rows[-1]:
            return
        key = self._key(rows, query_len, adapted)
        if key in self._steps:
            return
        self._missed[key] += 1
        if self._missed[key] >= RECORDED_AFTER:
            del self._missed[key]
            self.record(rows, query_len, adapted)

    def find(self, batch: ForwardBatch) -> GraphKey | None:
        """Return the key of a captured step in which the host's ``batch`` can run; None if there is none."""
        query_len = batch.max_query_len
        if not self._fits(batch):
            return None
        key = self._key(batch.num_rows, query_len, batch.adapters is not None)
        if query_len == 1:
            return key
        if key not in self._steps:
            return None
        self._steps[key] = self._steps.pop(key)  # the order of the dictionary is that of use
        return key

    def _fits(self, batch: ForwardBatch) -> bool:
        """Return whether a captured step could run ``batch``: all tokens are sampled from, and all rows are equally
        long or, if the backend pads rows, nearly so, since a captured step computes the same number of tokens for each
        row."""
        padded, tokens = batch.num_rows * batch.max_query_len, batch.num_tokens
        most = max(2 * tokens, MEMORY_BOUND_TOKENS) if self._backend.pads_rows else tokens
        return bool(self._steps) and len(batch.logits_rows) == tokens and padded <= most

    def _key(self, rows: int, query_len: int, adapted: bool) -> GraphKey:
        return GraphKey(self._rows[bisect_left(self._rows, rows)], query_len, adapted)

    def _capture(self, key: GraphKey) -> None:
        self._steps[key] = self._backend.capture(key, self._step, self._slots, self._spec)
