"""Structured outputs: the output follows the grammar whatever the model prefers, alone and in a batch."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar, on amd64 and arm64)")

from vllmlite import LLM, EngineConfig, SamplingParams, StructuredOutputsParams
from vllmlite.beam_params import BeamOptions
from vllmlite.errors import ParameterError
from vllmlite.guided.compiler import COMPILE_BYTES, GrammarCompiler, Prepared, compile_prepared
from vllmlite.guided.grammars import Grammars
from vllmlite.guided.json_schema import exact
from vllmlite.sampling_params import ThinkingMarks
from vllmlite.server.config import ServerConfig
from vllmlite.server.tools import ToolUse

PROMPT = "The Debian Project is"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
        "none": {"type": "null"},
    },
    "required": ["name", "age", "tags", "ok", "none"],
}
WISHES: list[dict[str, Any]] = [
    {"json": PERSON},
    {"json": json.dumps(PERSON)},
    {"regex": r"[0-9]{3}-(apt|dpkg)"},
    {"choice": ["apt", "dpkg", 'a "quoted" one', "ünïcode"]},
    {"grammar": 'root ::= "yes" | "no" [0-9]'},
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", max_model_len=512, device="cpu")


def holds(wish: dict[str, Any], text: str) -> bool:
    if "json" in wish:
        value = json.loads(text)
        return (
            value.keys() == set(PERSON["properties"])
            and len(value["name"]) <= 6
            and 0 <= value["age"] <= 150
            and set(value["tags"]) <= {"a", "b"}
            and isinstance(value["ok"], bool)
            and value["none"] is None
        )
    if "regex" in wish:
        return re.fullmatch(wish["regex"], text) is not None
    if "choice" in wish:
        return text in wish["choice"]
    return re.fullmatch("yes|no[0-9]", text) is not None


def params(wish: dict[str, Any], **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=120, structured_outputs=StructuredOutputsParams(**wish), **options)


def text_of(llm: LLM, wanted: SamplingParams) -> str:
    (output,) = llm.generate(PROMPT, wanted, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    return output.outputs[0].text


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_the_output_follows_the_grammar(llm: LLM, temperature: float) -> None:
    wanted = [params(wish, temperature=temperature, seed=7) for wish in WISHES]
    alone = [text_of(llm, wish) for wish in wanted]
    for wish, text in zip(WISHES, alone, strict=True):
        assert holds(wish, text), (wish, text)
    free = SamplingParams(temperature=0, max_tokens=20)
    calm = llm.generate(PROMPT, free, use_tqdm=False)[0].outputs[0].text
    together = llm.generate([PROMPT] * (len(wanted) + 1), [*wanted, free], use_tqdm=False)
    assert [output.outputs[0].text for output in together] == [*alone, calm]


def test_every_beam_follows_the_grammar(llm: LLM) -> None:
    choices = ["stable", "unstable", "testing", "experimental"]
    wanted = params({"choice": choices}, n=4, temperature=0, beams=BeamOptions(4))
    (output,) = llm.generate(PROMPT, wanted, use_tqdm=False)
    assert {completion.text for completion in output.outputs} <= set(choices)
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
    assert {completion.finish_reason for completion in output.outputs} == {"stop"}


def test_without_an_end_token_the_last_token_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmlite.runner.startup.eos_ids", lambda *_: [])
    endless = LLM(dtype="float32", max_model_len=256, device="cpu")
    assert not endless.llm_engine.engine_core.bounds.eos_ids
    for wish in WISHES[2:]:
        assert holds(wish, text_of(endless, params(wish, temperature=1.0, seed=7))), wish


@pytest.mark.slow
def test_grammars_hold_with_two_steps_in_flight_and_several_completions() -> None:
    texts = []
    for two in (False, True):
        llm = LLM(dtype="float32", max_model_len=256, device="cpu", async_scheduling=two, backend="torch")
        wanted = [
            params(WISHES[0], temperature=2.0, n=4, seed=3),
            SamplingParams(temperature=0, max_tokens=30),
        ]
        guided, free = llm.generate([PROMPT] * 2, wanted, use_tqdm=False)
        assert all(holds(WISHES[0], completion.text) for completion in guided.outputs)
        llm.llm_engine.engine.scheduler.check_integrity()
        texts.append([completion.text for output in (guided, free) for completion in output.outputs])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_preempted_sequence_keeps_its_grammar_state(llm: LLM) -> None:
    schema = {"type": "array", "items": PERSON, "minItems": 3}
    wanted = [params({"json": schema}, seed=seed).clone(max_tokens=200) for seed in range(4)]
    calm = llm.generate([PROMPT] * 4, wanted, use_tqdm=False)
    tight = LLM(dtype="float32", max_model_len=512, device="cpu", num_gpu_blocks_override=33)
    pressed = tight.generate([PROMPT] * 4, wanted, use_tqdm=False)
    assert tight.llm_engine.engine.current_stats().num_preemptions > 0
    assert [o.outputs[0].token_ids for o in pressed] == [o.outputs[0].token_ids for o in calm]


TOOL = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 7, "maximum": 9}},
    "required": ["n"],
}
TAGS: list[dict[str, Any]] = [
    {
        "format": {
            "type": "triggered_tags",
            "triggers": ["<f="],
            "tags": [
                {"begin": "<f=a>", "content": {"type": "json_schema", "json_schema": TOOL}, "end": "</f>"}
            ],
        }
    },
    {
        "type": "structural_tag",
        "structures": [{"begin": "<f=a>", "schema": TOOL, "end": "</f>"}],
        "triggers": ["<f="],
    },
]


@pytest.mark.parametrize("tag", [*TAGS, json.dumps(TAGS[0])])
def test_structural_tags(llm: LLM, tag: Any) -> None:
    import xgrammar

    compiled = llm.llm_engine.grammars.compile(StructuredOutputsParams(structural_tag=tag))
    for text, fits in (
        ('I call <f=a>{"n": 8}</f>', True),
        ('<f=a>{"n": 6', False),
        ('<f=a>{"n":', True),
        ('<f=a>{"n":\n', False),
        ("<f=b", False),
        ("< f=b", True),
    ):
        assert xgrammar.GrammarMatcher(compiled.native).accept_string(text) == fits, text


XML = {
    "type": "object",
    "properties": {"n": {"enum": ["ab", "12"], "pattern": "a"}, "s": {"type": "string", "maxLength": 3}},
    "required": ["n", "s"],
}


@pytest.mark.parametrize(
    "form", [{"type": "qwen_xml_parameter"}, {"type": "json_schema", "style": "qwen_xml"}]
)
def test_schemas_of_another_style_are_enforced_too(llm: LLM, form: dict[str, Any]) -> None:
    import xgrammar
    from xgrammar.structural_tag import JSONSchemaFormat

    if "style" in form and "style" not in JSONSchemaFormat.model_fields:
        pytest.skip("this version of xgrammar knows no styles")
    tag = StructuredOutputsParams(structural_tag={"format": {**form, "json_schema": XML}})
    compiled = llm.llm_engine.grammars.compile(tag)
    for n, s, fits in (("ab", "abc", True), ("12", "abc", False), ("ab", "abcd", False)):
        text = f"<parameter=n>{n}</parameter><parameter=s>{s}</parameter>"
        assert xgrammar.GrammarMatcher(compiled.native).accept_string(text) == fits, text
    assert not xgrammar.GrammarMatcher(compiled.native).accept_string("{")


def test_the_forced_text_of_a_structural_tag_is_generated(llm: LLM) -> None:
    forced = {**TAGS[0]["format"], "at_least_one": True, "stop_after_first": True}
    text = text_of(llm, params({"structural_tag": {"format": forced}}, temperature=1.0, seed=5))
    assert re.fullmatch(r'<f=a>\{"n": [789]\}</f>', text)


def test_a_lark_grammar_is_enforced(llm: LLM) -> None:
    import xgrammar

    wish = {"grammar": 'start: "yes" | "no" DIGIT\nDIGIT: /[0-9]/'}
    if hasattr(xgrammar.GrammarCompiler, "compile_lark"):
        assert re.fullmatch("yes|no[0-9]", text_of(llm, params(wish, temperature=2.0, seed=1)))
        return
    with pytest.raises(ParameterError, match="does not read Lark"):
        text_of(llm, params(wish))


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"json": False}, "allows nothing"),
        ({"json": {"not": {}}}, "cannot enforce"),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "allows nothing"),
        ({"json": {"$ref": "#/nowhere"}}, "points to nothing"),
        ({"json": "{"}, "not JSON"),
        ({"json": {"type": "number", "multipleOf": 3}}, "at most 1000 numbers"),
        ({"json": {"enum": ["b"], "pattern": "a"}}, "allows nothing"),
        ({"json": {"type": "array", "items": {"type": "array", "minItems": 10**7}}}, "at most 1048576"),
        ({"json": {"type": "string", "pattern": "a{9999999}"}}, "at most 1048576"),
        ({"json": {"enum": ["x" * 70_000]}}, "at most 65536"),
        ({"regex": "["}, "no grammar"),
        ({"regex": "(a{10000000}){10}"}, "at most 1048576"),
        ({"grammar": "root ::= missing"}, "no grammar"),
        ({"regex": "((.{0,50}){0,50}){0,50}"}, "takes more than"),
        ({"choice": []}, "no grammar"),
        ({"grammar": 'root ::= [^\\0-\\U0010ffff] "a"'}, "allows no output"),
        ({"structural_tag": {"format": {"type": "nothing"}}}, "no grammar"),
        ({"structural_tag": {"structures": [{"begin": "x"}], "triggers": ["x"]}}, "begin, schema and end"),
        ({"structural_tag": {"structures": [{"begin": "x", "schema": {"not": {}}, "end": "y"}]}}, "cannot"),
        ({"structural_tag": "["}, "not JSON"),
        ({"structural_tag": "[]"}, "a JSON object"),
        ({"json": {}, "whitespace_pattern": " *"}, "must be None"),
        ({"json": {}, "disable_any_whitespace": 1}, "True or False"),
        ({"disable_any_whitespace": True}, "exactly one"),
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
    ],
)
def test_impossible_grammars_are_refused(llm: LLM, wish: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        llm.generate(PROMPT, params(wish), use_tqdm=False)
    assert ".cc:" not in str(caught.value)  # no places in xgrammar's source
    assert not llm.llm_engine.has_unfinished_requests()


def test_deep_nesting_and_contradictions_are_refused(llm: LLM) -> None:
    deep: Any = {"type": "integer"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ParameterError, match="levels"):
        llm.generate(PROMPT, params({"json": deep}), use_tqdm=False)
    for name, value in (
        ("min_tokens", 3),
        ("ignore_eos", True),
        ("bad_words", ["x"]),
        ("allowed_token_ids", [5]),
    ):
        with pytest.raises(ParameterError, match="structured_outputs"):
            params(WISHES[0], **{name: value})


def test_the_server_accepts_response_format_and_structured_outputs() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    httpx = pytest.importorskip("httpx")
    from served import client_of, serving

    messages = [{"role": "user", "content": "Who are you?"}]
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}

    async def work(client: Any) -> None:
        async def ask(status: int, **body: Any) -> Any:
            body = {"messages": messages, "temperature": 2, "seed": 1, "max_tokens": 120, **body}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == status, answer.text
            return answer.json()

        for wish, body in (
            (WISHES[0], {"response_format": schema}),
            *((wish, {"structured_outputs": wish}) for wish in WISHES),
            (WISHES[0], {"structured_outputs": {**WISHES[0], **NEUTRAL}}),
        ):
            assert holds(wish, (await ask(200, **body))["choices"][0]["message"]["content"])
        anything = await ask(
            200, response_format={"type": "json_object"}, stop=["}"], include_stop_str_in_output=True
        )
        assert anything["choices"][0]["message"]["content"].startswith("{")
        tagged = await ask(200, response_format={"type": "structural_tag", **TAGS[1]}, temperature=0)
        assert "<f=" not in tagged["choices"][0]["message"]["content"]
        bad: list[dict[str, Any]] = [
            {"response_format": {"type": "structural_tag"}},
            {"structured_outputs": {**WISHES[0], "whitespace_pattern": " "}},
            {"response_format": {"type": "json_schema"}},
            {"response_format": {"type": "xml"}},
            {"response_format": schema, "structured_outputs": WISHES[2]},
            {"structured_outputs": {"json": {"$ref": "#/nowhere"}}},
            {"structured_outputs": {"jason": {}}},
            {"guided_json": {}},
        ]
        for body in bad:
            assert (await ask(400, **body))["error"]["message"]

    async def run() -> None:
        async with client_of(service) as client:
            await work(client)

    config = EngineConfig(dtype="float32", max_model_len=512, device="cpu", num_gpu_blocks_override=256)
    assert httpx
    with serving(config) as service:
        asyncio.run(run())


NEUTRAL = dict.fromkeys(("disable_any_whitespace", "disable_additional_properties", "disable_fallback"), True)
KEYS = [{f"k{i}{j}": {"enum": [i]} for j in range(40)} for i in range(60)]
RULES = "\n".join(f'r{i} ::= "x{i}" root' for i in range(1500))
HOSTILE: list[tuple[str, Any]] = [
    ("regex", "(((((a{1,2000}){1,2000}){1,2000}){1,2000}){1,2000}){1,2000}"),
    ("regex", "(.*a){2000}(.*b){2000}(.*c){2000}"),
    ("json", {"enum": ["a" * 64], "pattern": "^(a|aa)+b$"}),
    ("json", {"anyOf": [{"type": "object", "properties": keys} for keys in KEYS]}),
    ("grammar", "root ::= " + " ".join(f"r{i}?" for i in range(1500)) + "\n" + RULES),
]


@pytest.fixture(scope="module")
def compiler(llm: LLM) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(llm.llm_engine.grammars._vocabulary, seconds=1, memory=512 << 20)
    yield compiler
    compiler.close()


@pytest.mark.parametrize(("kind", "source"), HOSTILE)
def test_hostile_grammars_end_within_time_and_memory(
    compiler: GrammarCompiler, kind: str, source: Any
) -> None:
    compiler.compile("regex", "a")  # it has started
    try:
        assert compiler.compile(kind, source)
    except ParameterError as error:
        assert error.field == "structured_outputs"
    assert compiler.compile("regex", "b")


def test_a_quick_grammar_does_not_wait_for_a_slow_one(compiler: GrammarCompiler) -> None:
    kind, source = HOSTILE[2]
    with ThreadPoolExecutor(1) as pool:
        compiler.compile("regex", "a")  # it has started
        slow = pool.submit(compiler.compile, kind, source)
        assert compiler.compile("regex", "b")
        assert not slow.done()
        with pytest.raises(ParameterError, match="more than 1 s of processor time"):
            slow.result()


def test_threads_that_want_one_grammar_compile_it_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.llm_engine
    grammars = Grammars(llm.get_tokenizer(), engine.engine_core.bounds.vocab_size, [], loads=False)
    compiled, others_came = [], threading.Event()

    def compile_slowly(self: GrammarCompiler, kind: str, source: Any) -> Prepared:
        compiled.append(source)
        assert others_came.wait(60)
        if source == "(":
            raise ParameterError("structured_outputs", source, "has no grammar")
        return Prepared(kind, source)

    monkeypatch.setattr(GrammarCompiler, "compile", compile_slowly)
    with ThreadPoolExecutor(4) as pool:
        same = [pool.submit(grammars.compile, StructuredOutputsParams(regex="a")) for _ in range(2)]
        wrong = [pool.submit(grammars.compile, StructuredOutputsParams(regex="(")) for _ in range(2)]
        while len(compiled) < 2:
            time.sleep(0.001)
        others_came.set()
        assert same[0].result() is same[1].result()
        for each in wrong:
            with pytest.raises(ParameterError, match="has no grammar"):
                each.result()
    assert compiled.count("a") == 1
    assert grammars._making == {}


def required(parameters: dict[str, Any], count: int) -> Any:
    """The output format that is compiled when one of ``count`` tools must be called."""
    tools = [
        {"type": "function", "function": {"name": f"tool_{i}", "parameters": parameters}}
        for i in range(count)
    ]
    structure = ToolUse.of(tools, "required", True, ServerConfig()).structure()
    assert structure is not None
    return structure.json


def strings(count: int, **limits: Any) -> dict[str, Any]:
    properties = {f"p{index}": {"type": "string", **limits} for index in range(count)}
    return {"type": "object", "properties": properties, "required": [*properties]}


NESTED = {"type": "object", "properties": {name: {**strings(4), "required": []} for name in "ab"}}
LARGE: dict[str, tuple[Any, str]] = {
    "60 tools of 6 optional strings": (
        required({**strings(6), "required": []}, 60), '[{"name": "tool_59", "parameters": {"p1": "x", "p5": ""}}]',
    ),
    "20 tools with two nested objects": (
        required(NESTED, 20), '[{"name": "tool_7", "parameters": {"a": {"p3": "x"}, "b": {}}}]',
    ),
    "25 tools with a long maxLength": (
        required(strings(1, maxLength=10_000), 25),
        f'[{{"name": "tool_3", "parameters": {{"p0": "{"x" * 10_000}"}}}}]',
    ),
    "500 short strings": (
        strings(500, maxLength=3), json.dumps({f"p{index}": "abc" for index in range(500)}),
    ),
}  # fmt: skip


def test_large_schemas_compile_in_little_memory(llm: LLM) -> None:
    """A sixteenth of the memory limit is enough, and the grammars are exact."""
    import xgrammar

    vocabulary = llm.llm_engine.grammars._vocabulary
    compiler = GrammarCompiler(vocabulary, memory=COMPILE_BYTES // 16)
    try:
        prepared = {name: compiler.compile("json", exact(schema)) for name, (schema, _) in LARGE.items()}
    finally:
        compiler.close()
    for name, (_, text) in LARGE.items():
        compiled = compile_prepared(vocabulary.compiler(), prepared[name])
        assert xgrammar.GrammarMatcher(compiled).accept_string(text), name
        too_long = text.replace("abc", "abcd").replace("x" * 10_000, "x" * 10_001)
        assert too_long == text or not xgrammar.GrammarMatcher(compiled).accept_string(too_long), name


def test_a_compiler_process_that_died_is_restarted(compiler: GrammarCompiler) -> None:
    assert compiler.compile("regex", "a")
    assert compiler._process is not None
    compiler._process.kill()
    compiler._process.wait()
    assert compiler.compile("regex", "b")


@pytest.mark.parametrize("begun", [True, False])
def test_the_grammar_applies_only_after_the_reasoning(llm: LLM, begun: bool) -> None:
    (closing,) = llm.get_tokenizer().encode(" is", add_special_tokens=False)
    (opening,) = llm.get_tokenizer().encode("The", add_special_tokens=False)
    marks = ThinkingMarks(closing, None if begun else opening)
    structure = StructuredOutputsParams(regex="[0-9]{3}", after=marks)
    bias = {closing: 4.0, opening: 9.0}
    wanted = SamplingParams(
        temperature=1, seed=3, max_tokens=200, structured_outputs=structure, logit_bias=bias
    )
    (output,) = llm.generate(PROMPT, wanted, use_tqdm=False)
    (completion,) = output.outputs
    ids = list(completion.token_ids)
    assert completion.finish_reason == "stop" and closing in ids
    if not begun:
        assert ids[0] == opening
    answer = ids[ids.index(closing) + 1 :]
    assert re.fullmatch("[0-9]{3}", llm.get_tokenizer().decode(answer))
    assert re.fullmatch("[0-9]{3}", llm.get_tokenizer().decode(ids)) is None


def test_reasoning_markers_must_be_tokens_of_the_model(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="must be ThinkingMarks or None"):
        StructuredOutputsParams(regex="a", after={"closing_id": 5})  # type: ignore[arg-type]
    for field, marks in (
        ("closing_id", ThinkingMarks(10**6, None)),
        ("opening_id", ThinkingMarks(5, -1)),
        ("closing_id", ThinkingMarks("5", 6)),  # type: ignore[arg-type]
    ):
        with pytest.raises(ParameterError, match="must be an id from 0 to") as caught:
            structure = StructuredOutputsParams(regex="a", after=marks)
            llm.generate(PROMPT, SamplingParams(structured_outputs=structure), use_tqdm=False)
        assert caught.value.field == f"structured_outputs.after.{field}"
    assert not llm.llm_engine.has_unfinished_requests()


def test_without_reasoning_the_answer_begins_with_the_grammar(llm: LLM) -> None:
    marks = ThinkingMarks(5, 6)
    for temperature in (0.0, 5.0):
        structure = StructuredOutputsParams(regex="[0-9]{3}", after=marks)
        wanted = SamplingParams(
            temperature=temperature, seed=1, max_tokens=9, structured_outputs=structure, logit_bias={6: -100}
        )
        assert re.fullmatch("[0-9]{3}", text_of(llm, wanted))
