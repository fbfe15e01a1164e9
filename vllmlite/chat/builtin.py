"""Built-in chat templates under llama.cpp's names, for models without a template of their own.

Each template is a row of control tokens in a table. The templates render text messages only; they refuse tools and
tool calls. A prompt begins with the bos token where the tokenizer would add one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

Turn = tuple[str, str]
"""The text before and after the content of a message."""


@dataclass(frozen=True, slots=True)
class Format:
    """The control tokens of one chat format."""

    turns: Mapping[str, Turn]
    """Turns by role. The key ``*`` covers every other role; its texts may contain ``{role}``."""
    prompt: str = ""
    """Text that begins the assistant's answer (the generation prompt)."""
    start: str = ""
    """Text at the beginning of the conversation."""
    opening: str = ""
    """Text written once before a system message and the user message that follows it."""
    without_system: str = ""
    """Text in place of the system message when there is none."""
    trims: frozenset[str] = field(default_factory=frozenset)
    """Roles whose content is stripped of surrounding whitespace; ``*`` means all roles."""


def _turns(system: Turn, user: Turn, assistant: Turn, **more: Turn) -> dict[str, Turn]:
    return {"system": system, "user": user, "assistant": assistant, **more}


def _alike(before: str, after: str, prompt: str, start: str = "", *, trims: str = "") -> Format:
    """Return a format with the same markers for all roles; ``prompt`` begins the assistant's answer."""
    return Format({"*": (before, after)}, prompt, start, trims=frozenset(trims))


def _llama2(system: Turn, opening: str = "[INST] ", trims: str = "") -> Format:
    turns = _turns(system, ("", " [/INST]"), ("", "</s>"))
    return Format(turns, opening=opening, trims=frozenset(trims))


_ALL = frozenset("*")
_SYS = ("<<SYS>>\n", "\n<</SYS>>\n\n")
_GRANITE = _alike(
    "<|start_of_role|>{role}<|end_of_role|>", "<|end_of_text|>\n", "<|start_of_role|>assistant<|end_of_role|>"
)
_EXAONE = _turns(("[|system|]", "[|endofturn|]\n"), ("[|user|]", "\n"), ("[|assistant|]", "[|endofturn|]\n"))
_BAILING = _turns(("<role>SYSTEM</role>", ""), ("<role>HUMAN</role>", ""), ("<role>ASSISTANT</role>", ""))
_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_HOLDER = "<\uff5chy_place\u2581holder\u2581no\u2581{}\uff5c>"

BUILT_IN: Mapping[str, Format] = {
    "chatml": _alike("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    "llama2": _llama2(("", "\n")),
    "llama2-sys": _llama2(_SYS),
    "llama2-sys-bos": _llama2(_SYS, "<s>[INST] "),
    "llama2-sys-strip": _llama2(_SYS, trims="*"),
    "mistral-v1": Format(
        _turns(("", "\n\n"), ("", " [/INST]"), (" ", "</s>")), opening=" [INST] "
    ),
    "mistral-v3": Format(
        _turns(("", "\n\n"), ("", "[/INST]"), (" ", "</s>")), opening="[INST] ", trims=frozenset({"assistant"})
    ),
    "mistral-v3-tekken": Format(_turns(("", "\n\n"), ("", "[/INST]"), ("", "</s>")), opening="[INST]"),
    "mistral-v7": Format(
        _turns(("[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"), ("[INST] ", "[/INST]"), (" ", "</s>"))
    ),
    "mistral-v7-tekken": Format(
        _turns(("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]"), ("", "</s>"))
    ),
    "phi3": _alike("<|{role}|>\n", "<|end|>\n", "<|assistant|>\n"),
    "phi4": _alike("<|im_start|>{role}<|im_sep|>", "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
    "falcon3": _alike("<|{role}|>\n", "\n", "<|assistant|>\n"),
    "zephyr": _alike("<|{role}|>\n", "<|endoftext|>\n", "<|assistant|>\n"),
    "monarch": _alike("<s>{role}\n", "</s>\n", "<s>assistant\n"),
    "gemma": Format(
        _turns(("", "\n\n"), ("", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n")),
        "<start_of_turn>model\n", opening="<start_of_turn>user\n", trims=_ALL,
    ),
    "orion": Format(_turns(("", "\n\n"), ("", "\n\nAssistant: </s>"), ("", "</s>")), opening="Human: "),
    "openchat": Format(
        _turns(
            ("", "<|end_of_turn|>"),
            ("GPT4 Correct User: ", "<|end_of_turn|>"),
            ("GPT4 Correct Assistant: ", "<|end_of_turn|>"),
        ),
        "GPT4 Correct Assistant:",
    ),
    "vicuna": Format(_turns(("", "\n\n"), ("USER: ", "\n"), ("ASSISTANT: ", "</s>\n")), "ASSISTANT:"),
    "vicuna-orca": Format(
        _turns(("SYSTEM: ", "\n"), ("USER: ", "\n"), ("ASSISTANT: ", "</s>\n")), "ASSISTANT:"
    ),
    "deepseek": Format(
        _turns(("", ""), ("### Instruction:\n", "\n"), ("### Response:\n", "\n<|EOT|>\n")), "### Response:\n"
    ),
    "deepseek2": Format(_turns(("", "\n\n"), ("User: ", "\n\n"), ("Assistant: ", _END)), "Assistant:"),
    "deepseek3": Format(
        _turns(("", "\n\n"), ("<\uff5cUser\uff5c>", ""), ("<\uff5cAssistant\uff5c>", _END)), "<\uff5cAssistant\uff5c>"
    ),
    "command-r": Format(
        _turns(
            ("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ),
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", trims=_ALL,
    ),
    "llama3": _alike(
        "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n", trims="*",
    ),
    "llama4": _alike(
        "<|header_start|>{role}<|header_end|>\n\n", "<|eot|>",
        "<|header_start|>assistant<|header_end|>\n\n", trims="*",
    ),
    "chatglm3": _alike("<|{role}|>\n ", "", "<|assistant|>", "[gMASK]sop"),
    "chatglm4": _alike("<|{role}|>\n", "", "<|assistant|>\n", "[gMASK]<sop>"),
    "glmedge": _alike("<|{role}|>\n", "", "<|assistant|>"),
    "minicpm": Format(_turns(("", ""), ("<\u7528\u6237>", "<AI>"), ("", "")), trims=_ALL),
    "exaone3": Format(_EXAONE, "[|assistant|]", trims=_ALL),
    "exaone4": Format({**_EXAONE, "tool": ("[|tool|]", "[|endofturn|]\n")}, "[|assistant|]", trims=_ALL),
    "rwkv-world": Format(
        _turns(("System: ", "\n\n"), ("User: ", "\n\n"), ("Assistant: ", "\n\n")), "Assistant:", trims=_ALL
    ),
    "granite": _GRANITE,
    "granite-4.0": _GRANITE,
    "granite-4.1": _GRANITE,
    "gigachat": Format(
        _turns(
            ("", "<|message_sep|>"),
            ("user<|role_sep|>", "<|message_sep|>available functions<|role_sep|>[]<|message_sep|>"),
            ("assistant<|role_sep|>", "<|message_sep|>"),
        ),
        "assistant<|role_sep|>", "<s>",
    ),
    "megrez": _alike("<|role_start|>{role}<|role_end|>", "<|turn_end|>", "<|role_start|>assistant<|role_end|>"),
    "yandex": Format(
        {
            "user": (" \u041f\u043e\u043b\u044c\u0437\u043e\u0432\u0430\u0442\u0435\u043b\u044c: ", "\n\n"),
            "assistant": (" \u0410\u0441\u0441\u0438\u0441\u0442\u0435\u043d\u0442: ", "\n\n"),
        },
        " \u0410\u0441\u0441\u0438\u0441\u0442\u0435\u043d\u0442:[SEP]",
    ),
    "bailing": Format(_BAILING, "<role>ASSISTANT</role>"),
    "bailing-think": Format(_BAILING, "<role>ASSISTANT</role><think>"),
    "bailing2": Format(
        {role: (before, "<|role_end|>") for role, (before, _) in _BAILING.items()}, "<role>ASSISTANT</role>",
        without_system="<role>SYSTEM</role>detailed thinking off<|role_end|>",
    ),
    "smolvlm": Format(
        _turns(("", "\n\n"), ("User: ", "<end_of_utterance>\n"), ("Assistant: ", "<end_of_utterance>\n")),
        "Assistant:", "<|im_start|>",
    ),
    "dots1": Format(
        _turns(
            ("<|system|>", "<|endofsystem|>"),
            ("<|userprompt|>", "<|endofuserprompt|>"),
            ("<|response|>", "<|endofresponse|>"),
        ),
        "<|response|>",
    ),
    "hunyuan-moe": Format(
        _turns(("<|startoftext|>", "<|extra_4|>"), ("<|startoftext|>", "<|extra_0|>"), ("", "<|eos|>"))
    ),
    "hunyuan-dense": Format(
        _turns(
            ("", _HOLDER.format(3)),
            ("<\uff5chy_User\uff5c>", ""),
            ("<\uff5chy_Assistant\uff5c>", _HOLDER.format(2)),
        ),
        "<\uff5chy_Assistant\uff5c>",
    ),
    "gpt-oss": Format(
        {"*": ("<|start|>{role}<|message|>", "<|end|>"), "assistant": ("<|start|>assistant<|message|>", "<|return|>")},
        "<|start|>assistant",
    ),
    "kimi-k2": Format(
        _turns(
            ("<|im_system|>system<|im_middle|>", "<|im_end|>"),
            ("<|im_user|>user<|im_middle|>", "<|im_end|>"),
            ("<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
            tool=("<|im_system|>tool<|im_middle|>", "<|im_end|>"),
        ),
        "<|im_assistant|>assistant<|im_middle|>",
    ),
    "seed_oss": Format(
        {"*": ("<seed:bos>{role}\n", "<seed:eos>"), "assistant": ("<seed:bos>assistant\n", "<seed:eos>")},
        "<seed:bos>assistant\n", trims=frozenset({"assistant"}),
    ),
    "grok-2": Format(
        _turns(
            ("System: ", "<|separator|>\n\n"),
            ("Human: ", "<|separator|>\n\n"),
            ("Assistant: ", "<|separator|>\n\n"),
        ),
        "Assistant:", trims=frozenset({"system", "user"}),
    ),
    "pangu-embedded": Format(
        _turns(
            ("[unused9]\u7cfb\u7edf\uff1a", "[unused10]"),
            ("[unused9]\u7528\u6237\uff1a", "[unused10]"),
            ("[unused9]\u52a9\u624b\uff1a", "[unused10]"),
            tool=("[unused9]\u5de5\u5177\uff1a", "[unused10]"),
        ),
        "[unused9]\u52a9\u624b\uff1a", without_system="[unused9]\u7cfb\u7edf\uff1a[unused10]",
    ),
}  # fmt: skip
"""Formats by name (https://github.com/ggml-org/llama.cpp, ``src/llama-chat.cpp``)."""


def built_in(name: str, bos: str) -> str:
    """Return the Jinja template of format ``name``; ``bos`` (a bos token or "") comes before the first turn."""
    form = BUILT_IN[name]
    first = form.start or form.opening or form.turns.get("*", ("", ""))[0]
    start = form.start if bos and first.startswith(bos) else bos + form.start
    cases = "".join(_case(form, role, turn) for role, turn in sorted(form.turns.items(), reverse=True))
    refusal = f"the built-in chat template {name} has no"
    return (
        f"{{%- if tools %}}{{{{ raise_exception({_text(refusal + ' tools')}) }}}}{{% endif -%}}"
        f"{{{{- {_text(start)} }}}}"
        f"{{%- if messages[0].role != 'system' %}}{{{{ {_text(form.without_system)} }}}}{{% endif -%}}"
        "{%- set turn = namespace(open=false) -%}{%- for message in messages -%}"
        f"{{%- if message.tool_calls %}}{{{{ raise_exception({_text(refusal + ' tool calls')}) }}}}{{% endif -%}}"
        f"{{%- if false -%}}{cases}"
        f"{{%- else -%}}{{{{- raise_exception({_text(refusal + ' role ')} ~ message.role) }}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt %}}{{{{ {_text(form.prompt)} }}}}{{% endif -%}}"
    )


def _case(form: Format, role: str, turn: Turn) -> str:
    """Return the Jinja branch for messages of ``role``. ``*`` sorts last, so it handles the roles without a branch."""
    before, after = (" ~ message.role ~ ".join(map(_text, part.split("{role}"))) for part in turn)
    trimmed = " | trim" if {role, "*"} & form.trims else ""
    opening = f"({_text(form.opening)} if not turn.open else '') ~ " if role in ("system", "user") else ""
    test = "true" if role == "*" else f"message.role == {_text(role)}"
    is_open = "true" if role == "system" else "false"
    return (
        f"{{%- elif {test} -%}}{{{{- {opening}{before} ~ (message.content{trimmed}) ~ {after} }}}}"
        f"{{%- set turn.open = {is_open} -%}}"
    )


def _text(text: str) -> str:
    """Return ``text`` as a Jinja string literal."""
    return json.dumps(text)
