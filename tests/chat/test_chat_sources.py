"""Where chat templates and special tokens come from: a checkpoint's files, GGUF metadata, built-in formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_formats import RENDERED, TALK
from chat_templates import TOOLS, assistant, call, tool, user
from gguf_files import encode, tokenizer_metadata

from vllmlite.chat.builtin import BUILT_IN, built_in
from vllmlite.chat.sources import read_template
from vllmlite.chat.template import ChatTemplate, PromptOptions
from vllmlite.errors import ModelError, ParameterError
from vllmlite.tokenizers.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "vllmlite" / "data" / "demo"
HI = [user("Hi")]
PLAIN, TOOL_USE, RAG = "plain", "tools: {{ tools | length }}", "rag"
NAMED = [
    {"name": "default", "template": PLAIN},
    {"name": "tool_use", "template": TOOL_USE},
    {"name": "rag", "template": RAG},
]


def checkpoint(
    path: Path, config: dict[str, Any] | None = None, files: dict[str, str] | None = None
) -> Tokenizer:
    """The tokenizer of a directory with the demo model's vocabulary."""
    path.mkdir(exist_ok=True)
    shutil.copy(DEMO / "tokenizer.json", path)
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    for name, text in (files or {}).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return Tokenizer(path)


SOURCES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a list in tokenizer_config.json": ({"chat_template": NAMED}, {}),
    "an object in tokenizer_config.json": (
        {"chat_template": {each["name"]: each["template"] for each in NAMED}}, {},
    ),
    "files": (
        {"chat_template": "old"},
        {
            "chat_template.jinja": PLAIN,
            "additional_chat_templates/tool_use.jinja": TOOL_USE,
            "additional_chat_templates/rag.jinja": RAG,
            "additional_chat_templates/notes.txt": "x",
        },
    ),
    "chat_template.json": ({}, {"chat_template.json": json.dumps({"chat_template": NAMED})}),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_the_tool_use_template_is_chosen_with_tools(tmp_path: Path, source: str) -> None:
    tokenizer = checkpoint(tmp_path / "x", *SOURCES[source])
    assert tokenizer.has_chat_template and tokenizer.chat_template == PLAIN
    assert tokenizer.apply_chat_template(HI) == "plain"
    assert tokenizer.apply_chat_template(HI, tools=[]) == "plain"
    assert tokenizer.apply_chat_template(HI, tools=TOOLS) == "tools: 2"
    assert tokenizer.apply_chat_template(HI, tools=TOOLS, chat_template="default") == "plain"
    assert tokenizer.apply_chat_template(HI, chat_template="rag") == "rag"
    assert tokenizer.apply_chat_template(HI, chat_template="{{ 1 }}", tools=TOOLS) == "1"
    with pytest.raises(ParameterError, match=r"default, (rag|tool_use), (rag|tool_use), chatml"):
        tokenizer.apply_chat_template(HI, chat_template="other")


def test_gguf_metadata_names_templates(tmp_path: Path) -> None:
    metadata = tokenizer_metadata(DEMO, "gpt-2")
    metadata |= {
        "tokenizer.chat_template.tool_use": TOOL_USE,
        "tokenizer.chat_templates": ["default", "tool_use"],
    }
    path = tmp_path / "x.gguf"
    path.write_bytes(encode({"general.architecture": "llama", **metadata}, {}))
    tokenizer = Tokenizer(path)
    assert set(tokenizer.chat_templates) == {"default", "tool_use"}
    assert tokenizer.apply_chat_template(HI, tools=TOOLS) == "tools: 2"
    assert "Hi" in tokenizer.apply_chat_template(HI)


def test_transformers_reads_the_same_template(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers, to compare with")
    for number, (config, files) in enumerate(list(SOURCES.values())[:3]):
        path = tmp_path / str(number)
        ours = checkpoint(path, {"tokenizer_class": "PreTrainedTokenizerFast", **config}, files)
        if isinstance(config["chat_template"], dict):
            continue  # which it does not read
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        for tools in (None, TOOLS):
            assert theirs.apply_chat_template(HI, tools=tools, tokenize=False) == ours.apply_chat_template(
                HI, tools=tools
            )


def test_templates_without_a_default_are_chosen_by_name(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path / "x", {"chat_template": NAMED[1:]})
    with pytest.raises(ParameterError, match="choose tool_use, rag"):
        tokenizer.apply_chat_template(HI)
    assert tokenizer.apply_chat_template(HI, tools=TOOLS) == "tools: 2"
    none = checkpoint(tmp_path / "none")
    assert not none.has_chat_template
    with pytest.raises(ParameterError, match="no chat template"):
        none.apply_chat_template(HI)


def test_unreadable_files_are_model_errors(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path / "x")
    (tmp_path / "x" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: is not UTF-8"):
        tokenizer.apply_chat_template(HI)
    with pytest.raises(ModelError, match=r"special_tokens_map\.json"):
        checkpoint(tmp_path / "y", files={"special_tokens_map.json": "[]"})


def test_the_template_flag_is_a_file_a_template_or_a_name(tmp_path: Path) -> None:
    file = tmp_path / "x.jinja"
    file.write_text("from a file")
    assert read_template(None) is None
    assert read_template(str(file)) == "from a file"
    for given in ("{{ messages }}", "chatml", "granite-4.0", "tool_use"):
        assert read_template(given) == given
    for given in ("missing.jinja", "/nonexistent", ""):
        with pytest.raises(ParameterError, match="chat_template"):
            read_template(given)


SPECIAL_TOKENS = (
    "{{ bos_token }},{{ eos_token }},{{ pad_token }},{{ unk_token }},"
    "{{ image_token }},{{ additional_special_tokens }}"
)


def test_special_tokens_are_read_from_either_file(tmp_path: Path) -> None:
    added = {"content": "<s>", "lstrip": False}
    both: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
        "tokenizer_config.json alone": (
            {"bos_token": added, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "image_token": "no",
             "extra_special_tokens": {"image_token": "<img>"}, "additional_special_tokens": ["<a>", added]},
            {},
            "<s>,</s>,<pad>,<unk>,<img>,['<a>', '<s>', '<img>']",
        ),
        "special_tokens_map.json alone": (
            {},
            {"bos_token": added, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
             "additional_special_tokens": [added, "<b>"]},
            "<s>,</s>,<pad>,<unk>,,['<s>', '<b>']",
        ),
        "both": (
            {"eos_token": "<end>", "pad_token": None}, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
            "<s>,<end>,<pad>,,,[]",
        ),
    }  # fmt: skip
    for name, (config, mapped, expected) in both.items():
        tokenizer = checkpoint(tmp_path / name, config, {"special_tokens_map.json": json.dumps(mapped)})
        assert tokenizer.apply_chat_template(HI, chat_template=SPECIAL_TOKENS) == expected, name
    ends = checkpoint(tmp_path / "ends", {}, {"special_tokens_map.json": '{"eos_token": "<|endoftext|>"}'})
    assert ends.eos_token_id == 0


def test_a_request_may_set_a_special_token(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path / "x", {"bos_token": "<s>"})
    assert tokenizer.apply_chat_template(HI, chat_template="{{ bos_token }}", bos_token="begin") == "begin"


def test_built_in_formats_equal_llama_cpps() -> None:
    for name, text in RENDERED.items():
        assert ChatTemplate(built_in(name, ""), {}).prompt(TALK) == text, name
    yandex = ChatTemplate(built_in("yandex", "<s>"), {}).prompt(TALK[1:2])
    assert yandex == (
        "<s> \u041f\u043e\u043b\u044c\u0437\u043e\u0432\u0430\u0442\u0435\u043b\u044c: Hello\n\n"
        " \u0410\u0441\u0441\u0438\u0441\u0442\u0435\u043d\u0442:[SEP]"
    )
    assert RENDERED.keys() | {"yandex"} == BUILT_IN.keys()


def test_built_in_formats_with_an_absent_system_message() -> None:
    said = {name: ChatTemplate(built_in(name, ""), {}).prompt(HI) for name in BUILT_IN}
    assert said["bailing2"].startswith(
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Hi"
    )
    assert said["pangu-embedded"].startswith(
        "[unused9]\u7cfb\u7edf\uff1a[unused10][unused9]\u7528\u6237\uff1aHi"
    )
    assert said["gemma"] == "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert said["mistral-v3"] == "[INST] Hi[/INST]" and said["llama2-sys"] == "[INST] Hi [/INST]"
    assert all("Hi" in text for text in said.values())


def test_built_in_formats_begin_with_bos_once() -> None:
    begun = {
        "chatml": "<s><|im_start|>",
        "monarch": "<s>user",
        "llama2-sys-bos": "<s>[INST]",
        "gigachat": "<s>user",
    }
    for name, first in begun.items():
        text = ChatTemplate(built_in(name, "<s>"), {}).prompt(HI, PromptOptions(add_generation_prompt=False))
        assert text.startswith(first) and text.count("<s>") == 1


def test_built_in_formats_refuse_what_they_cannot_show() -> None:
    chatml = ChatTemplate(built_in("chatml", ""), {})
    with pytest.raises(ParameterError, match="chatml has no tools"):
        chatml.prompt(HI, tools=TOOLS)
    with pytest.raises(ParameterError, match="chatml has no tool calls"):
        chatml.prompt([*HI, assistant(None, tool_calls=[call({})]), tool("x")])
    with pytest.raises(ParameterError, match="vicuna has no role tool"):
        ChatTemplate(built_in("vicuna", ""), {}).prompt([*HI, tool("x")])


def test_a_model_without_a_template_can_use_a_built_in_one(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path / "x", {"bos_token": "<|endoftext|>"})
    text = tokenizer.apply_chat_template(HI, chat_template="chatml")
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    named = checkpoint(tmp_path / "y", {"chat_template": [{"name": "chatml", "template": "its own"}]})
    assert named.apply_chat_template(HI, chat_template="chatml") == "its own"
