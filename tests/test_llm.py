"""The most important promise: a request gives the same tokens however it is scheduled.

With the built-in model in float32, through the public API: batched = single, chunked = whole, cached = cold, preempted
= not preempted, two steps in flight = one, streamed = whole; greedy and seeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vllmlite import LLM, EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllmlite.backends.kv_cache import QUANTIZED_KV
from vllmlite.errors import BackendError, ParameterError
from vllmlite.sampling_params import RequestOutputKind

PROMPTS = [
    "The package manager",
    "Debian is",
    "A",
    "To install a package, run apt install with its name. The command then",
    "The kernel " * 20,
    "The kernel " * 20 + "is the part of the operating system",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=11, max_tokens=24, ignore_eos=True,
    repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1, logprobs=2,
)  # fmt: skip
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "device": "cpu"}


def make(**options: Any) -> LLM:
    return LLM(**OPTIONS | options)


@pytest.fixture(scope="module", params=["torch", "cpu", "cuda"], autouse=True)
def backend(request: pytest.FixtureRequest) -> str:
    """Every test runs on each backend available on this machine."""
    if request.param != "torch":
        native = pytest.importorskip(
            f"vllmlite._{request.param}", reason=f"vllmlite._{request.param} is not built"
        )
        if request.param == "cuda" and not native.probe()["devices"]:
            pytest.skip(f"no GPU: {native.probe()['reason']}")
    OPTIONS["backend"] = request.param
    OPTIONS["device"] = "cuda" if request.param == "cuda" else "cpu"
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def llm(backend: str) -> LLM:
    return make()


@pytest.fixture(params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def params(request: pytest.FixtureRequest) -> SamplingParams:
    found: SamplingParams = request.param
    return found


def texts(outputs: list[RequestOutput]) -> list[tuple[str, list[int]]]:
    return [(output.outputs[0].text, output.outputs[0].token_ids) for output in outputs]


def singly(params: SamplingParams) -> list[tuple[str, list[int]]]:
    alone = make(enable_prefix_caching=False, max_num_seqs=1)
    return [texts(alone.generate([prompt], params))[0] for prompt in PROMPTS]


def test_batched_equals_single(llm: LLM, params: SamplingParams) -> None:
    assert texts(llm.generate(PROMPTS, params)) == singly(params)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 16},
        {"enable_prefix_caching": False},
        {"async_scheduling": True},
        {"block_size": 4},
        {"max_num_seqs": 2},
        {"num_gpu_blocks_override": 8, "max_model_len": 128},
        {
            "num_gpu_blocks_override": 8,
            "max_model_len": 128,
            "async_scheduling": True,
            "max_num_batched_tokens": 20,
        },
    ],
    ids=str,
)
def test_scheduling_does_not_change_the_text(
    llm: LLM, params: SamplingParams, options: dict[str, Any]
) -> None:
    other = make(**options)
    assert texts(other.generate(PROMPTS, params)) == texts(llm.generate(PROMPTS, params))
    if "num_gpu_blocks_override" in options:
        assert other.llm_engine.stats().num_preemptions > 0
    other.llm_engine.engine.scheduler.check_integrity()
    assert other.llm_engine.stats().num_used_blocks == 0


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8_e4m3"])
def test_batch_invariant_in_bfloat16(params: SamplingParams, kv_dtype: str) -> None:
    """Batched = single, chunked = whole, preempted = not preempted, cached = cold: texts and log-probabilities, bit for
    bit."""
    if OPTIONS["backend"] == "torch":
        with pytest.raises(BackendError, match="batch-invariant"):
            make(dtype="bfloat16", batch_invariant=True)
        return
    if OPTIONS["backend"] == "cpu" and kv_dtype != "auto":
        pytest.skip("the CPU is batch-invariant in every dtype: the next test covers quantised caches")

    def found(llm: LLM, prompts: list[str]) -> list[Any]:
        outputs = llm.generate(prompts, params.clone(logprobs=2))
        return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]

    def invariant(**options: Any) -> LLM:
        return make(dtype="bfloat16", batch_invariant=True, kv_cache_dtype=kv_dtype, **options)

    alone = invariant(enable_prefix_caching=False, max_num_seqs=1)
    expected = [found(alone, [prompt])[0] for prompt in PROMPTS]
    whole = invariant()
    assert found(whole, PROMPTS) == expected
    assert found(whole, PROMPTS) == expected
    assert found(invariant(max_num_batched_tokens=16, block_size=4), PROMPTS) == expected
    assert found(invariant(enforce_eager=True, max_num_batched_tokens=100), PROMPTS) == expected
    tight = invariant(num_gpu_blocks_override=8, max_model_len=128)
    assert found(tight, PROMPTS) == expected
    assert tight.llm_engine.stats().num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", QUANTIZED_KV)
def test_a_quantised_cache_is_batch_invariant_too(backend: str, kv_dtype: str) -> None:
    """Batched = single, chunked = whole, preempted = not preempted, cached = cold; greedy and sampled prompts."""
    params = [(GREEDY, SAMPLED)[index % 2] for index in range(len(PROMPTS))]

    def quantised(**options: Any) -> LLM:
        return make(kv_cache_dtype=kv_dtype, **options)

    alone = quantised(enable_prefix_caching=False, max_num_seqs=1)
    expected = [texts(alone.generate([PROMPTS[at]], params[at]))[0] for at in range(len(PROMPTS))]
    whole = quantised()
    assert texts(whole.generate(PROMPTS, params)) == expected
    assert texts(whole.generate(PROMPTS, params)) == expected
    assert whole.llm_engine.stats().prefix_cache_hits > 0
    chunked = quantised(max_num_batched_tokens=16, block_size=4)
    assert texts(chunked.generate(PROMPTS, params)) == expected
    tight = quantised(num_gpu_blocks_override=8, max_model_len=128)
    assert texts(tight.generate(PROMPTS, params)) == expected
    assert tight.llm_engine.stats().num_preemptions > 0


@pytest.mark.parametrize("kv_dtype", QUANTIZED_KV)
def test_a_quantised_cache_costs_little(llm: LLM, kv_dtype: str) -> None:
    """Log-probabilities of a text change: by a few hundredths in int8, by a few tenths in fp8, which has 3 bits of
    mantissa or 2."""

    def logprobs(llm: LLM) -> list[float]:
        (output,) = llm.generate(PROMPTS[5], GREEDY.clone(max_tokens=1, prompt_logprobs=0))
        assert output.prompt_logprobs is not None
        found = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        return [entry[token].logprob for token, entry in found if entry is not None]

    pairs = zip(logprobs(llm), logprobs(make(kv_cache_dtype=kv_dtype)), strict=True)
    moved = [abs(one - other) for one, other in pairs]
    assert 1e-4 < sum(moved) / len(moved) < {"int8": 0.1, "fp8_e5m2": 0.8}.get(kv_dtype, 0.4)


def test_cached_prefixes_equal_cold_ones(params: SamplingParams) -> None:
    llm = make()
    cold = llm.generate(PROMPTS, params)
    warm = llm.generate(PROMPTS, params)
    assert texts(warm) == texts(cold)
    longest = warm[PROMPTS.index(max(PROMPTS, key=len))]
    assert longest.num_cached_tokens >= len(longest.prompt_token_ids) - 16
    assert llm.llm_engine.stats().prefix_cache_hits > 0


def test_streamed_text_equals_the_whole(llm: LLM, params: SamplingParams) -> None:
    engine = llm.llm_engine
    whole = texts(llm.generate(PROMPTS, params))
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, params.clone(output_kind=RequestOutputKind.DELTA))
    deltas = {str(index): ("", list[int]()) for index in range(len(PROMPTS))}
    while engine.has_unfinished_requests():
        for output in engine.step():
            text, ids = deltas[output.request_id]
            deltas[output.request_id] = (text + output.outputs[0].text, ids + output.outputs[0].token_ids)
    assert list(deltas.values()) == whole


def test_equal_seeds_repeat_and_others_differ(llm: LLM) -> None:
    hot = SAMPLED.clone(temperature=2.0)
    one, again, other = (texts(llm.generate("Debian", hot.clone(seed=seed)))[0] for seed in (1, 1, 2))
    assert one == again != other


def test_seed_minus_one_draws_a_new_seed_each_time(llm: LLM) -> None:
    hot = SamplingParams(temperature=1.5, seed=-1, max_tokens=12, ignore_eos=True)
    first, second = (texts(llm.generate("Debian", hot))[0] for _ in range(2))
    assert first != second
    last = llm.generate("Debian", hot.clone(n=2, seed=2**64 - 1))[0].outputs
    assert last[0].text == texts(llm.generate("Debian", hot.clone(seed=2**64 - 1)))[0][0]
    assert last[1].text == texts(llm.generate("Debian", hot.clone(seed=0)))[0][0]


def test_an_engine_with_seed_minus_one_is_seeded_at_random() -> None:
    hot = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
    assert texts(make(seed=-1).generate("Debian", hot)) != texts(make(seed=-1).generate("Debian", hot))


def test_completions_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.5, seed=5, max_tokens=12, ignore_eos=True)
    first, second = llm.generate("Debian is", params), llm.generate("Debian is", params)
    found = [completion.token_ids for completion in first[0].outputs]
    assert len({tuple(ids) for ids in found}) == 3
    assert found == [completion.token_ids for completion in second[0].outputs]
    assert [completion.index for completion in first[0].outputs] == [0, 1, 2]


def test_stop_string_and_stop_token(llm: LLM) -> None:
    whole = llm.generate("Debian is", GREEDY)[0].outputs[0]
    stop = whole.text[5:9]
    cut = llm.generate("Debian is", GREEDY.clone(stop=stop))[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = llm.generate("Debian is", GREEDY.clone(stop=stop, include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == cut.text + stop
    token = whole.token_ids[4]
    first = whole.token_ids.index(token)
    ended = llm.generate("Debian is", GREEDY.clone(stop_token_ids=[token]))[0].outputs[0]
    assert ended.token_ids == whole.token_ids[: first + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)


def test_bans_biases_and_allowed_ids(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    whole = llm.generate("Debian is", GREEDY)[0].outputs[0]
    word = next(word for word in whole.text.split() if word.isalpha() and len(word) > 2)
    without = llm.generate("Debian is", GREEDY.clone(bad_words=[word]))[0].outputs[0]
    assert f" {word} " not in without.text
    only = [tokenizer.encode(text)[0] for text in (" the", " a")]
    allowed = llm.generate("Debian is", GREEDY.clone(allowed_token_ids=only))[0].outputs[0]
    assert set(allowed.token_ids) <= set(only)
    biased = llm.generate("Debian is", GREEDY.clone(logit_bias={only[0]: 100.0}))[0].outputs[0]
    assert set(biased.token_ids) == {only[0]}


def test_min_tokens_delay_the_end(llm: LLM) -> None:
    engine = llm.llm_engine.engine
    end = next(iter(engine.bounds.eos_ids))
    force_end = GREEDY.clone(ignore_eos=False, logit_bias={end: 100.0})
    assert len(llm.generate("Debian is", force_end)[0].outputs[0].token_ids) == 1
    assert len(llm.generate("Debian is", force_end.clone(min_tokens=5))[0].outputs[0].token_ids) == 6


@pytest.mark.parametrize("chunk", [None, 4])
def test_logprobs_of_named_ids_are_those_of_the_whole_vocabulary(chunk: int | None) -> None:
    llm = LLM(
        dtype="float32",
        device="cpu",
        max_model_len=64,
        max_logprobs=-1,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
    )
    ids = [7, 3, 6143, 7]
    prompts = ["Debian is", "A package manager", "The"]
    wishes = [
        GREEDY.clone(max_tokens=6, logprobs=-1),
        GREEDY.clone(max_tokens=6, logprob_token_ids=ids),
        GREEDY.clone(max_tokens=6, logprobs=2, logprob_token_ids=ids, temperature=1.0, seed=4),
    ]
    for prompt in prompts:
        whole, named, both = (llm.generate(prompt, wish, use_tqdm=False)[0].outputs[0] for wish in wishes)
        assert whole.logprobs is not None and named.logprobs is not None and both.logprobs is not None
        assert named.token_ids == whole.token_ids
        for all_of_them, entry, token_id in zip(whole.logprobs, named.logprobs, named.token_ids, strict=True):
            assert entry == {i: all_of_them[i] for i in dict.fromkeys([token_id, 7, 3, 6143])}
        for entry, token_id in zip(both.logprobs, both.token_ids, strict=True):
            assert {token_id, 7, 3, 6143} <= entry.keys() and len(entry) <= 6
        together = llm.generate([prompt] * 3, wishes, use_tqdm=False)[1].outputs[0]
        assert together.token_ids == named.token_ids and together.logprobs is not None
        for entry, alone in zip(together.logprobs, named.logprobs, strict=True):
            assert [*entry] == [*alone]
            assert all(entry[i].logprob == pytest.approx(alone[i].logprob, abs=1e-3) for i in entry)
    for wrong in ([6144], [-1], list(range(129)), "7"):
        with pytest.raises(ParameterError, match="logprob_token_ids"):
            llm.generate("x", SamplingParams(logprob_token_ids=wrong), use_tqdm=False)  # type: ignore[arg-type]


def test_logprobs_follow_the_greedy_path(llm: LLM) -> None:
    params = GREEDY.clone(logprobs=3, prompt_logprobs=2, max_tokens=4)
    plain = llm.generate("Debian is a free operating system", params)[0]
    chunked = make(max_num_batched_tokens=3).generate("Debian is a free operating system", params)[0]
    assert plain.outputs[0].logprobs is not None
    assert plain.prompt_logprobs is not None
    assert chunked.prompt_logprobs is not None
    for token_id, entry in zip(plain.outputs[0].token_ids, plain.outputs[0].logprobs, strict=True):
        assert entry[token_id].rank == 1
        assert len(entry) == 3
        values = [logprob.logprob for logprob in entry.values()]
        assert values == sorted(values, reverse=True)
        assert all(value <= 0 for value in values)
    assert plain.prompt_logprobs[0] is None
    assert len(plain.prompt_logprobs) == len(plain.prompt_token_ids)
    for token_id, one, other in zip(
        plain.prompt_token_ids[1:], plain.prompt_logprobs[1:], chunked.prompt_logprobs[1:], strict=True
    ):
        assert one is not None
        assert other is not None
        assert one[token_id].logprob == pytest.approx(other[token_id].logprob, abs=1e-4)
        assert one[token_id].rank == other[token_id].rank


def test_the_probability_of_a_prompt_is_the_same_as_output_and_as_prompt(llm: LLM) -> None:
    params = GREEDY.clone(logprobs=0, max_tokens=6)
    output = llm.generate("The kernel is", params)[0]
    generated = output.outputs[0].token_ids
    again = llm.generate(
        {"prompt_token_ids": output.prompt_token_ids + generated},
        GREEDY.clone(prompt_logprobs=0, max_tokens=1),
    )[0]
    assert output.outputs[0].logprobs is not None
    assert again.prompt_logprobs is not None
    tail = again.prompt_logprobs[-len(generated) :]
    for token_id, as_output, as_prompt in zip(generated, output.outputs[0].logprobs, tail, strict=True):
        assert as_prompt is not None
        assert as_output[token_id].logprob == pytest.approx(as_prompt[token_id].logprob, abs=1e-4)


def test_prompt_forms(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("Debian is")
    forms: list[Any] = ["Debian is", ids, {"prompt": "Debian is"}, {"prompt_token_ids": ids}]
    found = [texts(llm.generate(form, GREEDY)) for form in (*forms, [forms[0]], [ids])]
    assert all(one == found[0] for one in found)
    assert texts(llm.generate(forms, GREEDY)) == found[0] * 4
    each = [GREEDY, GREEDY.clone(max_tokens=2)]
    assert [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b"], each)] == [24, 2]


def test_chat_answers_until_the_end_token(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is Debian?"}]
    params = SamplingParams(temperature=0, max_tokens=120)
    answer = llm.chat(question, params)[0]
    assert answer.prompt is not None
    assert "What is Debian?" in answer.prompt
    assert "<|" not in answer.outputs[0].text
    both = llm.chat([question, question], params)
    assert texts(both) == texts([answer]) * 2


def test_generation_config_gives_the_defaults(llm: LLM) -> None:
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.max_tokens) == (0.0, 256)  # do_sample false, max_new_tokens 256
    assert make(generation_config="vllm").get_default_sampling_params() == SamplingParams()
    over = make(generation_config="vllm", override_generation_config={"top_k": 5, "max_new_tokens": 9})
    assert over.get_default_sampling_params() == SamplingParams(top_k=5, max_tokens=9)
    for changes, temperature in (
        ({"temperature": 0.8}, 0.8),  # over the file's do_sample: false
        ({"top_k": 5}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0}, 0.0),
    ):
        sampled = make(override_generation_config=changes).get_default_sampling_params()
        assert (sampled.temperature, sampled.max_tokens) == (temperature, 256), changes
    for override, field in (
        ({"do_sample": False, "temperature": 0.8}, "override_generation_config.temperature"),
        ({"top_p": 5}, "override_generation_config.top_p"),
        ({"stop": "x"}, "override_generation_config"),
    ):
        with pytest.raises(ParameterError) as error:
            make(override_generation_config=override)
        assert error.value.field == field
    changed = llm.get_default_sampling_params()
    changed.temperature = 1.75
    assert llm.get_default_sampling_params().temperature == defaults.temperature


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        ({"text": "x"}, {}, "text"),
        ({"prompt": 3}, {}, "prompt"),
        ([1.5], {}, "prompt_token_ids"),
        ({"prompt_token_ids": ["1"]}, {}, "prompt_token_ids"),
        ({"prompt": "x", "cache_salt": ""}, {}, "cache_salt"),
        ("x " * 2000, {}, "prompt"),
        ("x", {"logprobs": 21}, "logprobs"),
        ("x", {"stop_token_ids": [10**6]}, "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused_and_the_engine_keeps_serving(
    llm: LLM, prompt: Any, options: dict[str, Any], field: str
) -> None:
    before = texts(llm.generate("Debian is", GREEDY))
    with pytest.raises(ParameterError) as error:
        llm.generate([prompt] if prompt == [] else prompt, SamplingParams(**options))
    assert error.value.field == field
    with pytest.raises(ParameterError):
        llm.generate(["Debian is", prompt], SamplingParams(**options))
    assert not llm.llm_engine.has_unfinished_requests()
    assert texts(llm.generate("Debian is", GREEDY)) == before


def test_a_mixed_step_is_no_larger_than_a_whole_one() -> None:
    with pytest.raises(ParameterError, match=r"max_mixed_prefill_tokens=17.*at most the 16"):
        LLM(**OPTIONS | {"max_num_batched_tokens": 16, "max_mixed_prefill_tokens": 17})


def test_vllms_add_request_and_step_loop() -> None:
    """vLLM's documented engine example, with only the import changed."""
    engine = LLMEngine.from_engine_args(EngineArgs(**OPTIONS))
    prompts = [("A robot may not injure a human being", GREEDY), ("To be or not to be,", SAMPLED)]
    request_id = 0
    finished = []
    while prompts or engine.has_unfinished_requests():
        if prompts:
            prompt, sampling_params = prompts.pop(0)
            engine.add_request(str(request_id), prompt, sampling_params)
            request_id += 1
        request_outputs: list[RequestOutput] = engine.step()
        finished += [output for output in request_outputs if output.finished]
    assert sorted(output.request_id for output in finished) == ["0", "1"]


def test_abort_frees_everything(llm: LLM) -> None:
    engine = llm.llm_engine
    for name, n in (("one", 1), ("three", 3)):
        params = SamplingParams(n=n, temperature=1.0 if n > 1 else 0.0, max_tokens=50, ignore_eos=True)
        engine.add_request(name, "Debian is", params)
    engine.step()
    engine.abort_request(["one", "three", "unknown"])
    assert not engine.has_unfinished_requests()
    assert engine.step() == []
    engine.engine.scheduler.check_integrity()
    assert engine.stats().num_used_blocks == 0


@pytest.fixture
def failing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    def fail(_schedule: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(llm.llm_engine.engine.runner, "launch", fail)
    yield llm


def test_a_failing_step_is_an_error_not_a_hang(failing: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="no such luck"):
        failing.generate(["a", "b"], GREEDY)
    monkeypatch.undo()
    assert texts(failing.generate("Debian is", GREEDY))[0][1]
