"""Log-probabilities on the device."""

from __future__ import annotations

import numpy as np
import pytest
from op_sampling import Sampler, check_logprobs, read

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import SlotParams


@pytest.fixture
def backend(exact: Backend) -> Backend:
    return exact


@pytest.mark.parametrize("k", [0, 1, 5, 60])
def test_logprobs(backend: Backend, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(k)
    logits = (rng.integers(-6, 7, (37, 60)) / 2).astype(np.float32)  # full of equals
    logits[3, :9] = -0.0
    ids = rng.integers(0, 60, 37).astype(np.int32)
    for chunk in (2**22, 500):
        if backend.name == "torch":
            monkeypatch.setattr("vllmlite.backends.torch_sampling._CHUNK", chunk)
        check_logprobs(
            logits,
            ids.tolist(),
            k,
            read(backend, backend.logprobs(backend.tensor(logits), backend.tensor(ids), k)),
        )


def test_more_logprobs_than_the_vocabulary_has(backend: Backend) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 9)).astype(np.float32)
    check_logprobs(
        logits,
        [3, 8],
        9,
        read(
            backend, backend.logprobs(backend.tensor(logits), backend.tensor(np.array([3, 8], np.int32)), 20)
        ),
    )


def test_logprobs_of_no_rows(backend: Backend) -> None:
    found = read(backend, backend.logprobs(backend.empty((0, 9), "float32"), backend.empty((0,), "int32"), 3))
    assert [array.shape for array in found] == [(0,), (0,), (0, 3), (0, 3)]


def test_logprobs_are_of_the_unedited_logits(backend: Backend) -> None:
    params = [
        SlotParams(logit_bias=((3, 50.0),)),
        SlotParams(repetition_penalty=5.0, prompt_ids=list(range(9))),
        SlotParams(temperature=0.5, top_k=2, seed=4),
        SlotParams(),
    ]
    logits = np.random.default_rng(1).standard_normal((4, 20)).astype(np.float32)
    masks = {3: np.arange(20) % 2 == 1}
    sampled, _ = Sampler(backend, params, 20).sample(logits, num_logprobs=4, masks=masks)
    check_logprobs(logits, backend.to_host(sampled.ids).tolist(), 4, read(backend, sampled.logprobs))
    assert Sampler(backend, params, 20).sample(logits)[0].logprobs is None
