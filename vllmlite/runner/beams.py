"""Beam search in a step: the groups of rows among which continuations are chosen, and the continuations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import ForwardBatch, Slots, Tensor
from vllmlite.backends.sampling import BeamRows, Continuations
from vllmlite.engine.beams import Continuation
from vllmlite.engine.schedule import ScheduledBeams


def choose_beams(
    backend: Backend, logits: Tensor, slots: Slots, batch: ForwardBatch, beams: Sequence[ScheduledBeams]
) -> Continuations:
    """Choose the best continuations of each group of ``beams`` from the logits of an uploaded batch."""
    counts = [len(group.scores) for group in beams]
    rows = [group.sampled + index for group in beams for index in range(len(group.scores))]
    given = BeamRows(
        np.array(rows, np.int32),
        np.cumsum([0, *counts]).astype(np.int32),
        np.array([score for group in beams for score in group.scores], np.float32),
        np.repeat(np.array([group.temperature for group in beams], np.float32), counts),
    )
    most = max(group.num_candidates for group in beams)
    return backend.choose_beams(logits, slots, batch, given, most)


def read_beams(
    backend: Backend, beams: Sequence[ScheduledBeams], found: Continuations
) -> list[list[Continuation]]:
    """Wait for the continuations that were ``found`` for each group of ``beams``. Returns those of each group that
    exist, the best first, and no more than the group wants."""
    columns = [backend.to_host(column).tolist() for column in (found.rows, found.ids, found.scores)]
    return [
        [Continuation(*entry) for entry in zip(*lists, strict=True) if entry[0] >= 0][: group.num_candidates]
        for group, *lists in zip(beams, *columns, strict=True)
    ]
