"""The simulation of fleets: its arithmetic on traces whose results follow by hand."""

from __future__ import annotations

import importlib.util
import random
import sys
from types import ModuleType

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from served import ROOT


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_fleet", ROOT / "scripts" / "simulate_fleet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate_fleet"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


fleet = load()
COSTS = fleet.Costs(((1, 1.0), (4, 1.0)), 0.01, max_rows=4, budget=100, cache_tokens=10_000)


def test_one_request_takes_a_step_for_its_prompt_and_one_for_each_further_token() -> None:
    call = fleet.Call(5.0, [1] * 50, 4)
    found = fleet.simulate([call], COSTS, 1, 1.0, "round-robin")
    assert call.first == pytest.approx(5 + 1.5) and call.done == pytest.approx(call.first + 3)
    assert found["tokens_per_second"] == pytest.approx(4 / 4.5) and found["itl_p99"] == pytest.approx(1.0)


def test_a_long_prompt_takes_several_steps_beside_those_that_decode() -> None:
    first, long = fleet.Call(0.0, [1] * 10, 20), fleet.Call(0.5, [2] * 250, 1)
    fleet.simulate([first, long], COSTS, 1, 1.0, "round-robin")
    # 99, 99 and 52 tokens beside a row
    assert long.first == pytest.approx(1.1 + 1.99 + 1.99 + 1.52)
    assert first.done == pytest.approx(long.first + 16)


def test_a_cached_prefix_is_not_computed_again_and_routing_finds_it() -> None:
    calls = [fleet.Call(100.0 * index, [index % 2] * 128 + [9], 1) for index in range(8)]
    routed = fleet.simulate(calls, COSTS, 2, 1.0, "prefix")
    # the router sends each prefix to where it was
    assert routed["hit_rate"] == pytest.approx(6 * 128 / (8 * 129))
    assert calls[-1].first - calls[-1].arrival == pytest.approx(1.01)


def test_no_more_rows_run_than_a_server_has() -> None:
    calls = [fleet.Call(0.0, [index], 2) for index in range(8)]
    fleet.simulate(calls, COSTS, 1, 1.0, "round-robin")
    assert sorted(call.first for call in calls)[4] >= sorted(call.done for call in calls)[0]


@pytest.mark.parametrize("policy", fleet.POLICIES)
def test_every_request_of_a_trace_ends(policy: str) -> None:
    calls = fleet.trace(random.Random(1), 200, 50.0, 2.0, 61)
    found = fleet.simulate(calls, fleet.H200_LLAMA8B, 4, 1.0, policy)
    assert all(call.arrival < call.first <= call.done for call in calls)
    assert 0 < found["hit_rate"] < 1 and found["ttft_p50"] <= found["ttft_p99"]
