"""A server that speculates answers as one that does not, and its metrics count drafts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

from native import needs_native_cpu
from served import ENGINE, ask, post, serving, stream

from vllmlite.runner import build
from vllmlite.server.service import Service

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LOOP = "one two three one two three one two three one"
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, {"prompt": LOOP, "temperature": 0, "logprobs": 2}),
    "sampled": (COMPLETIONS, {"prompt": LOOP, "temperature": 1, "seed": 3, "n": 2}),
    "stop": (COMPLETIONS, {"prompt": LOOP, "temperature": 0, "stop": ["three"], "logprobs": 0}),
    "chat": (
        CHAT,
        {
            "messages": [{"role": "user", "content": LOOP}],
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 1,
        },
    ),
}


@pytest.fixture(scope="module")
def services() -> Iterator[tuple[Service, Service]]:
    """One without drafts, and one whose policy always pays, whatever the machine's times are."""
    options = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "step_times", lambda *_: [(1, 1.0), (2, 1.0)])
        with serving() as plain, serving(replace(ENGINE, speculative_config=options)) as speculating:
            yield plain, speculating


def without_names(answer: Any) -> Any:
    """Return ``answer`` without what differs from request to request."""
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


@needs_native_cpu
@pytest.mark.parametrize("name", BODIES)
def test_answers_usage_logprobs_and_stop_strings_are_the_same(
    services: tuple[Service, Service], name: str
) -> None:
    path, body = BODIES[name]
    plain, speculating = (post(service, path, **body, max_tokens=24) for service in services)
    assert without_names(speculating) == without_names(plain)


@needs_native_cpu
@pytest.mark.parametrize("name", BODIES)
def test_streams_add_up_to_the_same_text_and_usage(services: tuple[Service, Service], name: str) -> None:
    """However many tokens come in an event; the usage that each event has never counts more than has been sent."""
    path, body = BODIES[name]
    found = []
    for service in services:
        texts: dict[int, str] = {}
        counts = [0]
        options = {"include_usage": True, "continuous_usage_stats": True}
        for _, event in stream(service, path, **body, max_tokens=24, stream_options=options):
            if event == "[DONE]":
                continue
            for choice in event["choices"]:
                piece = choice["text"] if path == COMPLETIONS else choice["delta"].get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + piece
            counts.append(event["usage"]["completion_tokens"])
        assert counts == sorted(counts)
        found.append((texts, counts[-1]))
    assert found[0] == found[1]


@needs_native_cpu
def test_metrics_count_drafts(services: tuple[Service, Service]) -> None:
    def metric(service: Service, name: str) -> float:
        text = ask(service, lambda client: client.get("/metrics")).text
        found = re.search(rf"^{re.escape(name)}_total\{{[^}}]*\}} (\S+)", text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    for service, drafts in zip(services, (False, True), strict=True):
        before = metric(service, "vllm:generation_tokens"), metric(service, "vllmlite:steps")
        post(service, COMPLETIONS, prompt=LOOP, temperature=0, max_tokens=32, ignore_eos=True)
        assert metric(service, "vllm:generation_tokens") - before[0] == 32
        accepted = metric(service, "vllm:spec_decode_num_accepted_tokens")
        assert (metric(service, "vllmlite:steps") - before[1] < 32) == (accepted > 0) == drafts
        assert metric(service, "vllm:spec_decode_num_draft_tokens") >= accepted
        gained = metric(service, "vllmlite:spec_decode_plain_seconds")
        assert (gained > metric(service, "vllmlite:spec_decode_seconds")) == drafts
