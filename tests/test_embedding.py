"""Embeddings of prompts: against transformers, alone and in a batch, in chunks, from the cache, after preemption."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from native import needs_native_cpu

from vllmlite import LLM, EngineConfig, LLMEngine, PoolingParams, SamplingParams
from vllmlite.engine_process.start import start_process
from vllmlite.errors import ParameterError
from vllmlite.hub import find_model

TEXTS = ["The Debian Project is an association.", "A package", "To install " * 30, "dpkg"]


BACKENDS = [
    "torch",
    pytest.param("cpu", marks=needs_native_cpu),
]


def engine(backend: str, **options: Any) -> LLM:
    config = {"dtype": "float32", "device": "cpu", "max_model_len": 256, "num_gpu_blocks_override": 64}
    return LLM(backend=backend, **{**config, **options})


def vectors(llm: LLM, texts: Any, **options: Any) -> list[list[float]]:
    params = PoolingParams(**options)
    return [out.outputs.embedding for out in llm.embed(texts, pooling_params=params, use_tqdm=False)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LAST", "MEAN"])
def test_an_embedding_is_batch_invariant(backend: str, kind: str) -> None:
    llm = engine(backend)
    alone = [vectors(llm, text, pooling_type=kind)[0] for text in TEXTS]

    def same(found: list[list[float]]) -> None:
        if backend == "cpu":
            assert found == alone
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)

    same(vectors(llm, TEXTS, pooling_type=kind))  # together, from the prefix cache where it serves
    same(vectors(engine(backend, max_num_batched_tokens=8, async_scheduling=True), TEXTS, pooling_type=kind))
    small = engine(backend, num_gpu_blocks_override=16, max_num_batched_tokens=24)
    for index, text in enumerate(TEXTS):
        small.llm_engine.add_request(f"text {index}", "x y z " * 10, SamplingParams(max_tokens=40))
        small.llm_engine.add_request(str(index), text, PoolingParams(pooling_type=kind))
    found: dict[str, Any] = {}
    while small.llm_engine.has_unfinished_requests():
        for output in small.llm_engine.step():
            found[output.request_id] = output.embedding
        small.llm_engine.engine.scheduler.check_integrity()
    same([found[str(index)] for index in range(len(TEXTS))])


def test_an_engine_in_its_own_process_gives_the_same_output() -> None:
    config = EngineConfig(dtype="float32", device="cpu", max_model_len=256, num_gpu_blocks_override=64)
    elsewhere = LLMEngine(config, start_process)
    try:
        for index, text in enumerate(TEXTS):
            elsewhere.add_request(str(index), text, PoolingParams(pooling_type="MEAN"))
        found: dict[str, Any] = {}
        while elsewhere.has_unfinished_requests():
            found.update((output.request_id, output.embedding) for output in elsewhere.step())
    finally:
        elsewhere.close()
    expected = vectors(engine("auto"), TEXTS, pooling_type="MEAN")
    np.testing.assert_allclose([found[str(i)] for i in range(len(TEXTS))], expected, rtol=0, atol=1e-5)


def test_embeddings_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    path = find_model(None)
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    llm = engine("torch")
    for text in TEXTS:
        ids = llm.get_tokenizer().encode(text)
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0]
        for kind, expected in (("LAST", states[-1]), ("MEAN", states.mean(0))):
            (found,) = vectors(llm, [ids], pooling_type=kind, normalize=False)
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_embedding_options() -> None:
    llm = engine("auto", pooling_type="mean")
    (whole,) = vectors(llm, TEXTS[0])
    assert math.hypot(*whole) == pytest.approx(1) and len(whole) == llm.llm_engine.hidden_size
    assert (
        vectors(llm, TEXTS[0], pooling_type="MEAN") == [whole] != vectors(llm, TEXTS[0], pooling_type="LAST")
    )
    (short,) = vectors(llm, TEXTS[0], dimensions=8)
    length = math.hypot(*whole[:8])
    assert short == pytest.approx([element / length for element in whole[:8]])
    (raw,) = vectors(llm, TEXTS[0], normalize=False)
    assert raw == pytest.approx([element * math.hypot(*raw) for element in whole])
    ids = llm.get_tokenizer().encode(TEXTS[0])
    assert vectors(llm, [ids], truncate_prompt_tokens=3) == vectors(llm, [ids[-3:]])
    assert len(vectors(llm, [[5] * 256])[0]) == len(whole)  # the whole context: nothing is generated
    for options, field in (
        ({"dimensions": 10_000}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"pooling_type": "CLS"}, "pooling_type"),
    ):
        with pytest.raises(ParameterError, match=field):
            vectors(llm, TEXTS, **options)
    with pytest.raises(ParameterError, match="maximum context length"):
        vectors(llm, [[5] * 257])
    assert not llm.llm_engine.has_unfinished_requests()
