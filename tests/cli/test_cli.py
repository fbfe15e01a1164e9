"""generate, chat and the command line as a whole, mostly with a fake engine that continues every prompt with numbered
words."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONTEXT, FakeEngine, FakeTokenizer, install, run

import vllmlite
from vllmlite import cli
from vllmlite.cli.chat import Conversation
from vllmlite.cli.parser import OptionParser
from vllmlite.cli.sampling import NO_FLAG, add_sampling_arguments, given_sampling
from vllmlite.cli.screen import Screen
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ModelError
from vllmlite.hub import BUILT_IN
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.server.parsers.parts import Content

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


# generate


def test_one_prompt_prints_one_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generate", "Once upon", "--max-tokens", "3") == ("Once upon w0 w1 w2\n", "")
    _, params, _ = FakeEngine.made[0].seen[0]
    assert (params.temperature, params.output_kind) == (0.7, RequestOutputKind.DELTA)


def test_control_characters_are_escaped_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "words", ["\x1b]0;title", "\x9b\x7f"])
    options = ("--no-echo", "--max-tokens", "2")
    assert run(capsys, "generate", "a", *options)[0] == "\x1b]0;title\x9b\x7f\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(capsys, "generate", "a", *options)[0] == "␛]0;title\ufffd␡\n"
    out, _ = run(capsys, "generate", "a", "b", *options)
    assert out.count("␛]0;title\ufffd␡\n") == 2 and "\x1b" not in out
    assert "\x9b" not in run(capsys, "generate", "a", "--json", *options)[0]


def test_flags_win_over_the_models_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(
        capsys,
        "generate",
        "--no-echo",
        "--temperature",
        "0",
        "--max_tokens=1",
        "--stop",
        "a",
        "--stop=b",
        "x",
    )
    assert out == " w0\n"
    _, params, _ = FakeEngine.made[0].seen[0]
    assert (params.temperature, params.stop) == (0.0, ["a", "b"])


def test_several_prompts_come_in_order_under_headings(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "generate", "a", "--max-tokens", "2", "b")
    assert out == "==> 1/2 <==\na w0 w1\n\n==> 2/2 <==\nb w0 w1\n"
    out, _ = run(capsys, "generate", "a", "--n", "2", "--max-tokens", "1")
    assert out == "==> 1/1, completion 1/2 <==\na w0\n\n==> 1/1, completion 2/2 <==\na W0\n"


def test_standard_input_is_the_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert run(capsys, "generate", "--max-tokens", "1") == ("two\nlines w0\n", "")
    monkeypatch.setattr("sys.stdin", io.StringIO("in\n"))
    out, _ = run(capsys, "generate", "--max-tokens", "1", "first", "-")
    assert out == "==> 1/2 <==\nfirst w0\n\n==> 2/2 <==\nin w0\n"


def test_a_file_of_lines_holds_a_prompt_per_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('one\n\n{"not": "a prompt"}\n')
    out, _ = run(capsys, "generate", "-f", str(file), "--max-tokens", "1", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["one", '{"not": "a prompt"}']


def test_a_json_lines_file_holds_prompts_and_parameters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a", "max_tokens": 2, "seed": 4, "priority": 3}\n{"prompt_token_ids": [7, 8]}\n'
    )
    out, _ = run(capsys, "generate", "-f", str(file), "--max-tokens", "1")
    assert out == "==> 1/2 <==\na w0 w1\n\n==> 2/2 <==\n<7> <8> w0\n"
    (_, first, priority), (_, second, _) = FakeEngine.made[0].seen
    assert (first.seed, second.seed, priority) == (4, None, 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"}\nb', ":2: must be a JSON object"),
        (
            '{"prompt": "a"}\n\n{"prompt": "a", "temprature": 0}',
            ":3: temprature=0: unknown sampling parameter; did you",
        ),
        ('{"prompt": "a", "top_p": 2}', ":1: top_p=2"),
        ('{"prompt": "a", "priority": 1.5}', ":1: priority=1.5"),
        ('{"prompt": ""}', ":1: the prompt is empty"),
        ('{"prompt": "a", "logprobs": 1}', "--json"),
    ],
)
def test_bad_files_are_refused_before_a_model_loads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, says: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    assert says in run(capsys, "generate", "-f", str(file), status=2)[1]
    assert not FakeEngine.made


def test_output_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "generate", "é b", "--json", "--stats", "--logprobs", "0", "--max-tokens", "2")
    first, last = map(json.loads, out.splitlines())
    assert err == ""
    assert first.pop("metrics").keys() == {"time_to_first_token", "seconds"}
    assert first == {
        "index": 0,
        "completion": 0,
        "prompt": "é b",
        "text": " w0 w1",
        "token_ids": [1, 2],
        "finish_reason": "length",
        "stop_reason": None,
        "num_prompt_tokens": 2,
        "num_cached_tokens": 0,
        "cumulative_logprob": None,
        "logprobs": [{str(i): {"logprob": -1.0, "rank": 1, "decoded_token": "w"}} for i in (1, 2)],
    }
    stats = last["stats"]
    assert (stats["requests"], stats["prompt_tokens"], stats["generated_tokens"], stats["steps"]) == (
        1,
        2,
        2,
        2,
    )
    assert "é" in out


def test_statistics_are_printed_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "generate", "a", "--stats", "--max-tokens", "2")
    assert out == "a w0 w1\n"
    for name in (
        "model",
        "backend",
        "requests",
        "TTFT",
        "prefill",
        "decode",
        "KV blocks",
        "prefix cache",
        "preemptions",
    ):
        assert re.search(rf"^{name} ", err, re.MULTILINE), name


def test_generate_can_apply_the_chat_template(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "generate", "--chat", "hi", "--max-tokens", "1") == (" w0\n", "")
    file = tmp_path / "template"
    file.write_text("T ")
    run(
        capsys,
        "generate",
        "--chat",
        "--system",
        "be",
        "--chat-template",
        str(file),
        "hi",
        "--max-tokens",
        "1",
    )
    assert FakeEngine.made[1].seen[0][0]["prompt"] == "T system: be\nuser: hi\n"


def test_ids_are_generated_without_a_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "ids"
    file.write_text('{"prompt_token_ids": [7, 8]}\n')
    out, _ = run(capsys, "generate", "--skip-tokenizer-init", "-f", str(file), "--json", "--max-tokens", "2")
    assert json.loads(out)["token_ids"] == [1, 2]
    assert "--json" in run(capsys, "generate", "--skip-tokenizer-init", "-f", str(file), status=2)[1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no prompt"),
        ([""], "the prompt is empty"),
        (["\udcff"], "not UTF-8"),
        (["x", "--temprature", "0"], "unknown option --temprature; did you mean --temperature?"),
        (["x", "--temp", "0"], "unknown option --temp"),
        (["x", "--temperature", "-1"], "temperature=-1.0: must be at least 0"),
        (["x", "--temperature", "warm"], "invalid float value"),
        (["x", "--top-p", "0"], "top_p=0.0"),
        (["x", "--n", "129"], "n=129: must be from 1 to 128"),
        (["x", "--logit-bias", "7"], "JSON object"),
        (["x", "--stop-token-ids", "1,b"], "1,2,3"),
        (["x", "--logprobs", "2"], "--json"),
        (["x", "--no-detokenize"], "--json"),
        (["x", "--system", "s"], "--system needs --chat"),
        (["x", "--chat", "--chat-template", "/nonexistent"], "No such file"),
        (["-f", "/nonexistent"], "No such file"),
        (["-", "-f", "-"], "read once"),
        (["x", "--block-size", "0"], "block_size=0: must be at least 1"),
        (["x", "--dtype", "int8"], "invalid choice"),
        (["x", "--config", "/nonexistent"], "cannot be read"),
        (
            ["x", "--num-gpu-blocks-override", "4", "--kv-cache-memory-bytes", "4G"],
            "cannot be combined with kv_cache_memory_bytes",
        ),
    ],
)
def test_wrong_usage_is_status_2_and_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    out, err = run(capsys, "generate", *argv, status=2)
    assert out == ""
    assert says in err
    assert err.startswith("vllmlite generate: error: ")
    assert err.endswith("\nTry 'vllmlite generate --help'.\n")
    assert err.count("\n") == 2
    assert not FakeEngine.made


def test_failures_are_status_1_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = run(capsys, "generate", "word " * CONTEXT, status=1)
    assert (out, err) == ("", f"vllmlite: error: prompt='{CONTEXT} tokens': must be shorter than {CONTEXT}\n")
    _, err = run(capsys, "generate", "-m", "fails", "x", "--json", status=1)
    assert err == "vllmlite: error: request 0: a step failed: RuntimeError: no more\n"

    def broken(config: EngineConfig) -> None:
        raise ModelError("two\nlines")

    monkeypatch.setattr("vllmlite.llm_engine.LLMEngine", broken)
    assert run(capsys, "generate", "x", status=1)[1] == "vllmlite: error: two lines\n"


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: EngineConfig) -> None:
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr("vllmlite.llm_engine.LLMEngine", broken)
    assert "package tokenizers is not installed" in run(capsys, "generate", "x", status=1)[1]


def test_an_interrupt_ends_generate_quietly_and_aborts_the_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "interrupt_at", 3)
    assert run(capsys, "generate", "a", status=130) == ("a w0 w1", "")
    assert FakeEngine.made[0].aborted == ["0"]


def test_verbose_prints_the_backend_and_why_it_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "generate", "a", "-v", "-m", "some/model", "--served-model-name", "mine")
    assert "vllmlite: mine on fake (cpu" in err
    assert "torch declined: not needed" in err


# chat


def converse(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    *argv: str,
    status: int = 0,
) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return run(capsys, "chat", "--max-tokens", "2", *argv, status=status)


def prompts() -> list[str]:
    return [prompt["prompt"] for prompt, _, _ in FakeEngine.made[-1].seen]


def test_chat_remembers_the_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = converse(monkeypatch, capsys, "hi\n\n//slash\n", "--system", "be")
    assert (out, err) == (" w0 w1\n w0 w1\n", "")
    assert prompts() == [
        "system: be\nuser: hi\n",
        "system: be\nuser: hi\nassistant:  w0 w1\nuser: /slash\n",
    ]


def test_chat_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n/system\n/system be good\nb\n/reset\nc\n/help\n/foo\n/quit\nd\n"
    out, err = converse(monkeypatch, capsys, text, "--stats")
    assert out == " w0 w1\n" * 3
    assert prompts() == ["user: a\n", "system: be good\nuser: b\n", "system: be good\nuser: c\n"]
    for said in ("system: none", "system: be good", "/reset ", "unknown command /foo", "TTFT"):
        assert said in err


def test_multiline_messages_and_regenerated_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = converse(monkeypatch, capsys, "/retry\na\\\nb\n/retry\nc\\\n")
    assert (out, err) == (" w0 w1\n" * 3, "there is no answer yet\n")
    assert prompts() == ["user: a\nb\n"] * 2 + ["user: a\nb\nassistant:  w0 w1\nuser: c\n"]


@pytest.mark.parametrize("line", ["/retry", "second"])
def test_a_turn_interrupted_at_its_end_keeps_the_conversation(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the answer but before it is stored leaves no message without an answer."""

    class Echo:
        def answer(self, messages: list[dict[str, str]]) -> Any:
            yield Content(messages[-1]["content"])

        def close(self) -> None: ...

    def interrupted(_screen: Screen) -> None:
        raise KeyboardInterrupt

    conversation = Conversation(Echo(), None)
    assert conversation.say("first")
    before = list(conversation.messages)
    assert [message["role"] for message in before] == ["user", "assistant"]
    monkeypatch.setattr(Screen, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversation.command(line) if line.startswith("/") else conversation.say(line)
    assert conversation.messages == before


def test_one_message_is_answered_without_a_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert converse(monkeypatch, capsys, "never\n", "--system-prompt", "be", "-q", "/a") == (" w0 w1\n", "")
    assert prompts() == ["system: be\nuser: /a\n"]
    assert "shorter" in converse(monkeypatch, capsys, "", "--quick", "word " * CONTEXT, status=1)[1]


def test_reasoning_is_kept_apart_from_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["<think>", "well", "\x1b]0;title\x07", "</thi", "nk>", "\n\n", "yes"]
    monkeypatch.setattr(FakeEngine, "words", words)
    options = ("--reasoning-parser", "qwen3", "--max-tokens", str(len(words)))
    out, _ = converse(monkeypatch, capsys, "a\nb\n", *options)
    assert out == "\n\nyes\n" * 2
    assert prompts()[1] == "user: a\nassistant: \n\nyes\nuser: b\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out, _ = converse(monkeypatch, capsys, "a\n", *options)
    assert out.replace("\x1b[22m\x1b[2m", "") == "\x1b[2mwell␛]0;title␇\x1b[22m\n\nyes\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert converse(monkeypatch, capsys, "a\n", *options)[0] == "well␛]0;title␇\n\nyes\n"


def test_a_message_that_does_not_fit_is_removed_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = converse(monkeypatch, capsys, "a\n" + "word " * CONTEXT + "\nb\n", status=1)
    assert out == " w0 w1\n" * 2
    assert "/reset starts a new conversation" in err
    assert prompts()[-1] == "user: a\nassistant:  w0 w1\nuser: b\n"


def test_an_interrupt_stops_only_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "interrupt_at", 1)
    out, _ = converse(monkeypatch, capsys, "a\nb\n")
    assert out == " w0\n w0 w1\n"
    assert FakeEngine.made[0].aborted == ["0"]
    assert prompts()[1] == "user: a\nassistant:  w0\nuser: b\n"


def test_chat_needs_a_tokenizer_and_a_chat_template(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--skip-tokenizer-init" in run(capsys, "chat", "--skip-tokenizer-init", status=2)[1]
    monkeypatch.setattr(FakeTokenizer, "has_chat_template", False)
    assert "--chat-template" in run(capsys, "chat", status=1)[1]


# The whole command line


def test_every_sampling_field_has_a_flag_and_help() -> None:
    parser = OptionParser(prog="x")
    add_sampling_arguments(parser, max_tokens=128)
    argv = [
        "--n=2", "--temperature=1", "--top-p=.5", "--top-k=3", "--min-p=.1", "--repetition-penalty=2",
        "--presence-penalty=-1", "--frequency-penalty", "-1.5", "--max-tokens=none", "--min-tokens=1", "--stop=s",
        "--stop-token-ids=1,2", "--ignore-eos", "--include-stop-str-in-output", "--logprobs=1", "--prompt-logprobs=-1",
            "--logprob-token-ids=5",
        "--logit-bias={\"3\": -100}", "--allowed-token-ids=4", "--bad-words=b", "--no-skip-special-tokens",
        "--detokenize", "--truncate-prompt-tokens=9", "--truncation-side=right", "--thinking-token-budget=5",
    ]  # fmt: skip
    given = given_sampling(parser.parse(argv))
    assert given.keys() == set(SamplingParams.__slots__) - NO_FLAG
    params = SamplingParams(**given)
    assert (params.max_tokens, params.logit_bias, params.stop_token_ids) == (None, {3: -100.0}, [1, 2])
    assert (params.presence_penalty, params.frequency_penalty) == (-1.0, -1.5)
    assert all(action.help for action in parser._actions)


def test_positional_arguments_may_follow_options_and_dashes_end_options() -> None:
    parser = OptionParser(prog="x")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", default=[])
    parser.add_argument("--some-flag", action="store_true")
    args = parser.parse(["a", "--some_flag", "b c", "--", "--some-flag", "-x"])
    assert args.prompts == ["a", "b c", "--some-flag", "-x"]
    assert parser.parse(["--- a_b c"]).prompts == ["--- a_b c"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "no command given; choose one of generate"),
        (["genrate"], "unknown command genrate; did you mean generate?"),
        (["--versoin"], "unknown option --versoin; did you mean --version?"),
    ],
)
def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert says in run(capsys, *argv, status=2)[1]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[0] == f"vllmlite {vllmlite.__version__}\n"
    text, _ = run(capsys, "--help")
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert run(capsys, *name.split(), "--help")[0].startswith(f"usage: vllmlite {name} [options]")


def test_one_parser_knows_all_commands() -> None:
    text = cli.build_parser().format_help()
    assert all(f"  {name}" in text for name in cli.COMMANDS)


LIGHT = """
import sys
from vllmlite.cli import build_parser, main
build_parser()
for argv in (["--version"], ["--help"], *([name, "--help"] for name in ("generate", "chat", "bench", "env"))):
    assert main(argv) == 0, argv
heavy = {"torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "yaml", "jinja2"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def python(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, *argv], env=environment, text=True, capture_output=True, timeout=120, **options
    )


def test_help_does_not_import_heavy_packages() -> None:
    done = python("-c", LIGHT)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_ends_the_program_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "vllmlite", "env", "--quick"],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vllmlite", "env", "--quick"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == b"vllmlite: error: writing the output: No space left on device\n"


needs_model = pytest.mark.skipif(
    not (BUILT_IN / "config.json").is_file(), reason="no built-in model in this tree"
)


@needs_model
def test_generate_continues_a_text_with_the_built_in_model() -> None:
    pytest.importorskip("torch")
    argv = [
        "-m",
        "vllmlite",
        "generate",
        "--temperature",
        "0",
        "--max-tokens",
        "8",
        "--json",
        "--stats",
        "Debian is",
    ]
    first, second = python(*argv), python(*argv)
    assert first.returncode == 0, first.stderr
    line, stats = map(json.loads, first.stdout.splitlines())
    assert len(line["token_ids"]) == 8 or line["finish_reason"] == "stop"
    assert line["token_ids"] == json.loads(second.stdout.splitlines()[0])["token_ids"]
    assert stats["stats"]["backend"] in ("cpu", "torch")


def test_env_probes_the_backends() -> None:
    pytest.importorskip("torch")
    done = python("-m", "vllmlite", "env", "--json")
    answers = {(a["backend"], a["kind"]): a for a in json.loads(done.stdout)["backends"]}
    assert answers["torch", "cpu"]["available"]
