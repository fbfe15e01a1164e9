"""The reader of adapters rests between pieces of work."""

from __future__ import annotations

from vllmlite.lora.pace import PIECE, REST, Pace


def test_a_thread_rests_in_proportion_to_its_work() -> None:
    """However the work is cut, it takes a quarter of a core."""
    now, slept = [0.0], [0.0]

    def sleep(seconds: float) -> None:
        slept[0] += seconds

    pace = Pace(lambda: now[0], sleep)
    now[0] = 100.0  # what the thread did before
    pace.begin()
    for piece in (PIECE / 4,) * 40 + (PIECE * 5,) * 3:
        now[0] += piece
        pace()
    assert abs(slept[0] - REST * 25 * PIECE) < 1e-9
