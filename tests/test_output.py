"""Text output: detokenisation in whole characters, stop strings, deltas, completions of one request."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.runner_protocol import TokenLogprobs
from vllmlite.errors import ModelError, ParameterError
from vllmlite.output_processor import OutputProcessor, ProcessedStep
from vllmlite.outputs import Logprob, RequestMetrics, RequestOutput
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.server.openai import logprobs
from vllmlite.tokenizers.detokenizer import Detokenizer
from vllmlite.tokenizers.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer: every id is one byte, so that characters are split; and two special tokens."""
    path = tmp_path_factory.mktemp("bytes")
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer(path)


_later = iter(c for c in ALPHABET if ord(c) > 255)
BYTES = [chr(byte) if chr(byte) in ALPHABET else next(_later) for byte in range(256)]
"""How byte-level tokenizers write each byte."""
LETTERS = ["a", "b", "\u2581", "\u2581a", "\u2581ab", "\ufffd"]


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece tokenizer as Llama 2 has it: unknown words become tokens of one byte each."""
    path = tmp_path_factory.mktemp("fallback")
    words = [*LETTERS, *(f"<0x{byte:02X}>" for byte in range(256))]
    fast = FastTokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken("</s>", special=True)])
    fast.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def stream(
    detokenizer: Detokenizer, ids: list[int], sizes: Sequence[int] = (1,)
) -> tuple[list[str], str | None]:
    """The deltas after each chunk of ids (the lengths cycle through ``sizes``) and at the end, and the stop string."""
    deltas: list[str] = []
    turn = cycle(sizes)
    stop = None
    while ids and stop is None:
        piece, ids = ids[: (size := next(turn))], ids[size:]
        _, stop = detokenizer.extend(piece)
        deltas.append(detokenizer.text[: detokenizer.num_released][len("".join(deltas)) :])
    if stop is None:
        stop = detokenizer.finish()
        deltas.append(detokenizer.text[: detokenizer.num_released][len("".join(deltas)) :])
    return deltas, stop


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=8), text=st.text(max_size=40), sizes=SIZES)
def test_streamed_text_equals_the_whole_without_partial_characters(
    tokenizer: Tokenizer, prompt: str, text: str, sizes: list[int]
) -> None:
    # hypothesis tries strings of the sources too, among them special tokens, which no text shows
    text = text.replace("\ufffd", "?").replace("<|", "<")
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt.replace("\ufffd", "?")))
    deltas, _ = stream(detokenizer, ids, sizes)
    assert "".join(deltas) == text == detokenizer.text
    assert not any("\ufffd" in delta for delta in deltas)


def test_an_incomplete_character_shows_at_the_end_only(tokenizer: Tokenizer) -> None:
    deltas, _ = stream(Detokenizer(tokenizer, []), tokenizer.encode("a€")[:-1])
    assert deltas == ["a", "", "", "\ufffd"]


@settings(max_examples=80, deadline=None)
@given(data=st.data(), sizes=SIZES, kind=st.sampled_from(["byte level", "fallback"]), skip=st.booleans())
def test_ids_that_are_not_utf8_give_the_text_of_the_whole(
    tokenizer: Tokenizer, fallback: Tokenizer, data: st.DataObject, sizes: list[int], kind: str, skip: bool
) -> None:
    """For any ids in chunks of any size, the text equals a single decoding of all of them."""
    one = tokenizer if kind == "byte level" else fallback
    ids = data.draw(st.lists(st.integers(0, one.vocab_size + 1), max_size=24))
    detokenizer = Detokenizer(one, [], skip_special_tokens=skip)
    assert "".join(stream(detokenizer, ids, sizes)[0]) == one.decode(ids, skip) == detokenizer.text


EURO = "\u20ac".encode()


@pytest.mark.parametrize(
    ("prompt", "output", "byte_level", "fallback_text"),
    [
        (b"a" + EURO, b"b", "b", "b"),  # the prompt ends in a whole character
        (b"a" + EURO, b"\xff", "\ufffd", "\ufffd"),
        (b"a" + EURO[:2], EURO[2:] + b"b", "\u20acb", "\u20acb"),  # the output completes a character
        (b"a" + EURO[:2], b"b", "b", "b"),  # or not, and the prompt's own text shows that
        (b"a" + EURO[:2], b"", "", ""),
        (b"a" + EURO[:1], EURO[1:2], "", "\ufffd"),
        (EURO[:1], b"\xffb", "\ufffdb", "\ufffdb"),
    ],
)
@pytest.mark.parametrize("num_hidden", [0, 9])
def test_a_prompt_may_end_within_a_character(
    tokenizer: Tokenizer,
    fallback: Tokenizer,
    prompt: bytes,
    output: bytes,
    byte_level: str,
    fallback_text: str,
    num_hidden: int,
) -> None:
    def text(one: Tokenizer, ids: dict[int, int]) -> str:
        hidden = [one.vocab_size - 1] * num_hidden
        detokenizer = Detokenizer(one, [ids[byte] for byte in prompt] + hidden)
        return "".join(stream(detokenizer, [ids[byte] for byte in output])[0])

    assert text(tokenizer, {byte: ALPHABET.index(BYTES[byte]) for byte in range(256)}) == byte_level
    ids = {byte: len(LETTERS) + byte for byte in range(256)} | {ord("a"): 0, ord("b"): 1}
    assert text(fallback, ids) == fallback_text


EURO_BYTES = [
    [0xE2],
    [0xE2, 0x82],
    list(EURO),
    [0xF0, 0x9F, 0x98],
    [0x80],
    [0xFF],
    [ord("b")],
    [0xEF, 0xBF],
    [0xBD],
]


def _ids_with_byte_runs(one: Tokenizer, byte_level: bool) -> st.SearchStrategy[list[int]]:
    """Ids with incomplete and invalid runs of bytes, words between them, and special tokens within them."""
    first = {byte: ALPHABET.index(BYTES[byte]) for byte in range(256)} if byte_level else None
    runs = [[first[byte] if first else len(LETTERS) + byte for byte in run] for run in EURO_BYTES]
    words = [[first[ord(c)]] for c in "ab "] if first else [[index] for index in range(5)]
    hidden = [[one.vocab_size - 1], [one.vocab_size + 5], [one.vocab_size - 1] * 7]
    piece = st.sampled_from([*runs, *runs, *words, *hidden])
    return st.lists(piece, max_size=6).map(lambda pieces: [token for each in pieces for token in each])


def _text_after(one: Tokenizer, byte_level: bool, prompt: list[int], output: list[int]) -> str:
    """What ``output`` adds to the text of ``prompt``, by decoding whole sequences."""
    seen = [token for token in prompt if not one.is_hidden(token, True)]
    if byte_level:
        before, after = one.decode(seen), one.decode(seen + output)
        if not before.endswith("\ufffd") or after.startswith(before):
            return after.removeprefix(before)
        return after.removeprefix(before[:-1])  # the last character is completed
    run = [one.byte_of(token) for token in reversed(seen)]
    size = next((index for index, byte in enumerate(run) if byte is None), len(run))
    data = bytes(byte for byte in reversed(run[:size]) if byte is not None)
    num_open = len(data) - utf_8_decode(data, "replace", False)[1]
    # A word stands for what the prompt has before its incomplete character: a run of bytes does not join those.
    base = [*seen[: len(seen) - size], *([0] if len(seen) > num_open else [])]
    open_ids = seen[len(seen) - num_open :] if num_open else []
    new = one.decode(base + open_ids + output).removeprefix(one.decode(base))
    return new.removeprefix("\ufffd" * num_open)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sizes=SIZES, kind=st.sampled_from(["byte level", "fallback"]))
def test_output_after_a_prompt_of_byte_runs_is_the_rest_of_the_whole(
    tokenizer: Tokenizer, fallback: Tokenizer, data: st.DataObject, sizes: list[int], kind: str
) -> None:
    byte_level = kind == "byte level"
    one = tokenizer if byte_level else fallback
    prompt, output = (data.draw(_ids_with_byte_runs(one, byte_level)) for _ in range(2))
    found = Detokenizer(one, prompt)
    deltas, _ = stream(found, output, sizes)
    assert "".join(deltas) == found.text == _text_after(one, byte_level, prompt, output)


def test_positions_count_whole_characters(tokenizer: Tokenizer, fallback: Tokenizer) -> None:
    for one, ids in (
        (tokenizer, tokenizer.encode("a\U0001f600b")),
        (fallback, fallback.encode("a\U0001f600b")),
    ):
        detokenizer = Detokenizer(one, [1], stop=["bcd"])
        positions = []
        for token_id in ids:
            positions.append(detokenizer.position)
            detokenizer.extend([token_id])
        skipped = positions[-6]  # the space that SentencePiece puts before a text
        assert [at - skipped for at in positions[-6:]] == [0, 1, 1, 1, 1, 2]
        assert detokenizer.position == skipped + 3


def test_tokens_have_their_own_text_and_bytes(tokenizer: Tokenizer, fallback: Tokenizer) -> None:
    def of(one: Tokenizer, token: str) -> tuple[str, bytes]:
        token_id = one.token_id(token)
        assert token_id is not None
        return one.token_text(token_id), one.token_bytes(token_id)

    assert of(fallback, "\u2581") == (" ", b" ")
    assert of(fallback, "\u2581a") == (" a", b" a")
    assert of(fallback, "a") == ("a", b"a")
    assert of(fallback, "<0xE2>") == ("\ufffd", b"\xe2")
    assert of(fallback, "<0x41>") == ("A", b"A")
    assert of(fallback, "</s>") == ("</s>", b"</s>")
    assert of(tokenizer, BYTES[0xE2]) == ("\ufffd", b"\xe2")
    assert of(tokenizer, BYTES[0x20]) == (" ", b" ")
    assert of(tokenizer, "<|im_end|>") == ("<|im_end|>", b"<|im_end|>")


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    sizes=SIZES,
)
def test_stop_strings_cut_at_their_first_occurrence(
    tokenizer: Tokenizer, text: str, stops: list[str], sizes: list[int]
) -> None:
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    for include in (False, True):
        detokenizer = Detokenizer(tokenizer, [], stop=stops, include_stop=include)
        deltas, stop = stream(detokenizer, tokenizer.encode(text), sizes)
        if ends:
            end, start, _ = min(ends)
            assert stop in stops
            assert "".join(deltas) == text[: end if include else start]
        else:
            assert stop is None
            assert "".join(deltas) == text


def test_no_part_of_a_stop_string_is_streamed(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], stop=["STOP"])
    deltas, _ = stream(detokenizer, tokenizer.encode("abSTOx"))
    assert "".join(deltas[:5]) == "ab"
    assert "".join(deltas) == "abSTOx"


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    deltas, stop = stream(Detokenizer(tokenizer, [], stop=["b"], min_tokens=3), tokenizer.encode("abab"))
    assert (stop, "".join(deltas)) == ("b", "aba")


def test_special_tokens_are_skipped_or_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|im_end|>b")
    assert "".join(stream(Detokenizer(tokenizer, []), ids)[0]) == "ab"
    assert "".join(stream(Detokenizer(tokenizer, [], skip_special_tokens=False), ids)[0]) == "a<|im_end|>b"


def test_chat_template(tokenizer: Tokenizer) -> None:
    message = {"role": "user", "content": "Hi"}
    assert tokenizer.eos_token_id == tokenizer.encode("<|im_end|>")[0]
    assert tokenizer.apply_chat_template([message]).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    open_end = [message, {"role": "assistant", "content": "Well, "}]
    text = tokenizer.apply_chat_template(open_end, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nWell, ")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only users') }}",
        "{{ messages[0].missing.deeper }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_harmful_templates_are_refused(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(ParameterError, match="messages"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template)


@pytest.mark.parametrize("messages", [[], ["hello"], [{"content": "x"}]])
def test_unusable_messages_are_refused(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> None:
    with pytest.raises(ParameterError, match="messages"):
        tokenizer.apply_chat_template(messages)


def test_a_broken_tokenizer_file_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_tokenizer_that_is_only_python(tmp_path: Path) -> None:
    """Without a form in the tokenizers library, transformers' own tokenizer is used, with the same ids and texts."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ByT5Tokenizer()
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    ours = Tokenizer(tmp_path)
    for text in ("Hello, wörld 🙂", "", "a</s>b"):
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)
    assert ours.eos_token_id == theirs.eos_token_id and ours.vocab_size == len(theirs)
    with pytest.raises(ParameterError, match="surrogate"):
        ours.encode("\ud800")
    texts, byte_level = ours.vocabulary(300)
    assert texts[3 + ord("a")] == "a" and texts[1] == "" and not byte_level
    detokenizer = Detokenizer(ours, [])
    for token_id in ours.encode("größer", add_special_tokens=False):
        detokenizer.extend([token_id])
    assert detokenizer.text == "größer"


def test_bytes_are_seen_wherever_they_are_decoded(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    of_bytes = decoders.ByteLevel()
    for decoder, pre_tokenizer, byte_level, only_bytes in (
        (None, None, False, False),
        (of_bytes, None, True, True),
        (decoders.Sequence([decoders.Fuse(), of_bytes]), None, True, False),
        (decoders.WordPiece(), pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()]), True, False),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), None, False, False),
        (decoders.Replace("ByteLevel", " "), pre_tokenizers.Whitespace(), False, False),
    ):
        fast = FastTokenizer(models.BPE({"a": 0, "b": 1}, []))
        fast.decoder, fast.pre_tokenizer = decoder, pre_tokenizer
        fast.save(str(tmp_path / "tokenizer.json"))
        ours = Tokenizer(tmp_path)
        assert ours.vocabulary(3) == (["a", "b", ""], byte_level)
        assert ours.is_byte_level == only_bytes


def feed(
    processor: OutputProcessor, request_id: str, ids: list[int], reason: str | None = None
) -> tuple[list[RequestOutput], list[tuple[str, str]]]:
    """One step that gives one sequence ``ids``."""
    step = take(processor, EngineOutput(request_id, ids, reason, None, 0, RequestMetrics(0.0)))
    return step.ready, step.stopped


def take(processor: OutputProcessor, output: EngineOutput) -> ProcessedStep:
    """Process one output and forget the requests that it ends."""
    step = processor.process([output])
    processor.settle(step)
    return step


def test_output_kinds(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc")
    seen = {}
    for kind in RequestOutputKind:
        processor = OutputProcessor(tokenizer)
        processor.add("r", "p", [1], SamplingParams(output_kind=kind))
        outputs = [
            o for i, t in enumerate(ids) for o in feed(processor, "r", [t], "length" if i == 2 else None)[0]
        ]
        seen[kind] = [(o.outputs[0].text, len(o.outputs[0].token_ids)) for o in outputs]
        assert outputs[-1].finished
        assert not processor.knows("r")
    assert seen[RequestOutputKind.CUMULATIVE] == [("a", 1), ("ab", 2), ("abc", 3)]
    assert seen[RequestOutputKind.DELTA] == [("a", 1), ("b", 1), ("c", 1)]
    assert seen[RequestOutputKind.FINAL_ONLY] == [("abc", 3)]


def test_a_stop_string_ends_the_engines_request(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.add("r", "p", [1], SamplingParams(stop="b"))
    outputs, stopped = feed(processor, "r", tokenizer.encode("ab"))
    assert stopped == [("r", "b")]
    completion = outputs[0].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("a", "stop", "b")


def test_completions_of_one_request_end_together(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    children = processor.add("r", "p", [1], SamplingParams(n=2, seed=7))
    assert [params.seed for params in children.values()] == [7, 8]
    first, second = children
    assert not feed(processor, first, tokenizer.encode("a"), "length")[0][0].finished
    final = feed(processor, second, tokenizer.encode("b"), "length")[0][0]
    assert final.finished
    assert [c.text for c in final.outputs] == ["a", "b"]


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [(None, [None] * 3), (-1, [None] * 3), (-2, [2**64 - 2, 2**64 - 1, 0]), (2**64 - 1, [2**64 - 1, 0, 1])],
)
def test_seeds_of_completions_wrap(tokenizer: Tokenizer, seed: int | None, seeds: list[int | None]) -> None:
    children = OutputProcessor(tokenizer).add("r", "p", [1], SamplingParams(n=3, seed=seed))
    assert [params.seed for params in children.values()] == seeds


def test_completions_do_not_share_ids_with_other_requests(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.add("1_r", "p", [1], SamplingParams())
    with pytest.raises(ParameterError, match="request_id='1_r'"):
        processor.add("r", "p", [1], SamplingParams(n=2))
    assert not processor.knows("r") and not processor.children("r")
    processor.add("s", "p", [1], SamplingParams(n=2))
    assert processor.knows("0_s")
    assert [output.request_id for output in feed(processor, "1_r", [5], "length")[0]] == ["1_r"]


def test_prompt_logprobs_of_one_token_are_a_list(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.add("r", "p", [1], SamplingParams(prompt_logprobs=1))
    assert feed(processor, "r", [5], "length")[0][0].prompt_logprobs == [None]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_text_offsets_count_the_whole_text(tokenizer: Tokenizer, kind: RequestOutputKind) -> None:
    """Whether or not text is held back for a stop string, and however many bytes or UTF-16 units a character has."""
    processor = OutputProcessor(tokenizer)
    processor.add("r", "p", [1], SamplingParams(logprobs=0, stop="bcd", output_kind=kind))
    ids = tokenizer.encode("a\U0001f600b")
    offsets: list[int] = []
    for at, token_id in enumerate(ids):
        output = EngineOutput("r", [token_id], "length" if at == 5 else None, None, 0, RequestMetrics(0.0))
        output.logprobs = [TokenLogprobs(token_id, -1.0, 1, [], [])]
        for found in take(processor, output).ready:
            assert found.outputs[0].text_offsets is not None
            delta = kind is RequestOutputKind.DELTA
            offsets = (offsets if delta else []) + found.outputs[0].text_offsets
    assert offsets == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("kind", RequestOutputKind)
@pytest.mark.parametrize("stop", [None, "bc", "de"])
@pytest.mark.parametrize("several", [2, 3, 6])
def test_several_ids_at_once_give_what_they_give_one_by_one(
    tokenizer: Tokenizer, kind: RequestOutputKind, stop: str | None, several: int
) -> None:
    """Also log-probabilities and offsets, which end with the ids at a stop string."""
    ids = tokenizer.encode("a\U0001f600bcdef")
    found = []
    for size in (1, several):
        processor = OutputProcessor(tokenizer)
        processor.add("r", "p", [1], SamplingParams(logprobs=0, stop=stop, output_kind=kind))
        whole: RequestOutput | None = None
        for at in range(0, len(ids), size):
            part = ids[at : at + size]
            reason = "length" if at + size >= len(ids) else None
            entries = [TokenLogprobs(token_id, -float(token_id), 1, [], []) for token_id in part]
            output = EngineOutput("r", part, reason, None, 0, RequestMetrics(0.0), logprobs=entries)
            for ready in take(processor, output).ready:
                if whole is not None and kind is RequestOutputKind.DELTA:
                    whole.extend(ready)
                else:
                    whole = ready
            if whole is not None and whole.finished:
                break
        assert whole is not None
        (c,) = whole.outputs
        found.append(
            (
                c.text,
                c.token_ids,
                c.logprobs,
                c.cumulative_logprob,
                c.text_offsets,
                c.finish_reason,
                c.stop_reason,
            )
        )
    assert found[0] == found[1]
    assert (found[0][-1] == stop) and len(found[0][1]) == len(found[0][2] or ()) == len(found[0][4] or ())


def test_logprobs_hold_the_chosen_token_and_the_top(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.add("r", "p", [1], SamplingParams(logprobs=2))
    entry = TokenLogprobs(5, -3.0, 4, [1, 2, 3], [-0.1, -0.2, -0.3])
    output = EngineOutput("r", [5], "length", None, 0, RequestMetrics(0.0), logprobs=[entry])
    completion = take(processor, output).ready[0].outputs[0]
    assert completion.logprobs is not None
    assert {i: (lp.logprob, lp.rank) for i, lp in completion.logprobs[0].items()} == {
        5: (-3.0, 4), 1: (-0.1, 1), 2: (-0.2, 2)
    }  # fmt: skip
    assert completion.cumulative_logprob == -3.0


# ---- Log-probabilities in the shapes of the server's APIs


def entry_of(one: Tokenizer, *tokens: str) -> dict[int, Logprob]:
    """Tokens in descending order of probability; the first is the chosen one."""
    ids = [one.token_id(token) for token in tokens]
    return {
        i: Logprob(-float(rank), rank, one.token_text(i))
        for rank, i in enumerate(ids, start=1)
        if i is not None
    }


def test_logprobs_keep_tokens_of_equal_text_apart(fallback: Tokenizer) -> None:
    """``top_logprobs`` of completions has text as keys: as many entries as requested are returned, and none replaces
    another."""
    entry = entry_of(fallback, "\u2581a", "a", "<0x61>", "<0xE2>", "<0xE3>")
    (chosen, *_), e3 = entry, fallback.token_id("<0xE3>")
    found = logprobs.for_completion([entry], [chosen], [0], 5, False, fallback)
    assert found["tokens"] == [" a"]
    assert found["top_logprobs"] == [
        {
            " a": -1.0,
            "a": -2.0,
            f"token_id:{fallback.token_id('<0x61>')}": -3.0,
            "\ufffd": -4.0,
            f"token_id:{e3}": -5.0,
        }
    ]


def test_logprob_bytes_are_the_tokens_own(tokenizer: Tokenizer, fallback: Tokenizer) -> None:
    for one, token, expected in (
        (fallback, "<0xE2>", b"\xe2"),
        (fallback, "\u2581a", b" a"),
        (tokenizer, BYTES[0xE2], b"\xe2"),
        (tokenizer, BYTES[0x20], b" "),
    ):
        entry = entry_of(one, token)
        ids = list(entry)
        (chat,) = logprobs.for_chat([entry], ids, 1, False, one)["content"]
        (llamacpp,) = logprobs.for_llamacpp([entry], ids, 1, one)
        for found in (chat, llamacpp, chat["top_logprobs"][0], llamacpp["top_logprobs"][0]):
            assert bytes(found["bytes"]) == expected


def test_offsets_of_a_prompt(tokenizer: Tokenizer, fallback: Tokenizer) -> None:
    """Special tokens count with their length in the text; those that the tokenizer adds have none."""
    text = "a<|im_end|>\U0001f600b"
    assert logprobs.prompt_offsets(tokenizer, tokenizer.encode(text), text) == [0, 1, 11, 11, 11, 11, 12]
    end = fallback.token_id("</s>")
    assert end is not None
    ids = [end, *fallback.encode("a b")]
    assert logprobs.prompt_offsets(fallback, ids, "a b") == [0, 0, 0, 1, 2]
