"""Standard streams that are closed, None or unusual, and text files written on other systems."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllmlite import LLM, SamplingParams
from vllmlite.cli.parser import OptionParser
from vllmlite.cli.prompts import add_prompt_arguments, read_prompts
from vllmlite.config.options import read_yaml
from vllmlite.server.config import ServerConfig
from vllmlite.terminal import is_terminal, note

PROGRAM = f"{sys.executable} -m vllmlite"


class WriteAlone:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


class Broken(WriteAlone):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8")


def test_streams_without_isatty_are_not_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, WriteAlone(), io.StringIO()):
        assert not is_terminal(stream)
        monkeypatch.setattr(sys, "stderr", stream)
        note("said")
    monkeypatch.setattr(sys, "stderr", Broken())
    note("said")
    monkeypatch.setattr(sys, "stderr", plain := WriteAlone())
    note("said", end="")
    assert plain.text == "said"


@pytest.mark.parametrize("stream", [None, WriteAlone(), Broken()], ids=["none", "write alone", "broken"])
def test_an_engine_works_without_standard_error(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    outputs = LLM().generate(["Debian is", "Linux is"], SamplingParams(max_tokens=2))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 2]


def test_a_command_without_standard_output_fails_with_a_message() -> None:
    done = shell(f"{PROGRAM} --version >&-")
    assert (done.returncode, done.stderr) == (1, "vllmlite: error: standard output is closed\n")
    assert shell(f"{PROGRAM} --version >&- 2>&-").returncode == 1


def test_no_opened_file_gets_the_descriptor_of_a_closed_stream() -> None:
    code = "import os; from vllmlite.terminal import open_closed_streams as o; o(); print(os.open('.', 0))"
    done = shell(f'{sys.executable} -c "{code}" <&- 2>&-')
    assert (done.returncode, int(done.stdout) > 2) == (0, True)


def test_a_command_without_standard_error_or_input_works() -> None:
    done = shell(f"{PROGRAM} --version <&- 2>&-")
    assert (done.returncode, done.stdout.partition(" ")[0]) == (0, "vllmlite")


def wishes_of(monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: str = "") -> list[object]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin, newline="\n"))
    parser = OptionParser()
    add_prompt_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return [
        entry.prompt for entry in read_prompts(parser.parse([*arguments, "--json"]), SamplingParams(), parser)
    ]


def test_byte_order_marks_and_carriage_returns_are_removed_from_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\n\r\ntwo\u2028words\r\n".encode())
    assert wishes_of(monkeypatch, "-f", str(file)) == ["one", "two\u2028words"]
    assert wishes_of(monkeypatch, "-f", "-", stdin="\ufeffone\r\ntwo\r\n") == ["one", "two"]
    assert wishes_of(monkeypatch, "-", stdin="\ufeffone\r\ntwo\r\n") == ["one\ntwo"]
    lines = [{"prompt": "a\u2028b"}, {"prompt": "\r\n"}]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(x, ensure_ascii=False) for x in lines).encode())
    assert wishes_of(monkeypatch, "-f", str(file)) == ["a\u2028b", "\r\n"]


def test_byte_order_marks_and_carriage_returns_are_removed_from_configuration_and_keys(
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xef\xbb\xbfport: 8001\r\nhost: ::1\r\n")
    assert read_yaml(file) == {"port": 8001, "host": "::1"}
    file.write_bytes(b"\xef\xbb\xbfsesame\r\nother\r\n")
    assert ServerConfig(api_key_file=str(file)).api_keys() == ("sesame", "other")
