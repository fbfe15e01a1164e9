"""Chat templates in the forms of real ones, written for these tests, and conversations for them."""
# ruff: noqa: E501 -- templates are data

from __future__ import annotations

from typing import Any

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

PARTS_ALONE = "vision: parts alone"
"""The name of the template that ignores content given as a string and shows only lists of parts."""

TEMPLATES = {
    "chatml": """
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
""",
    "chatml, trimmed, a line break before the end": """
{%- for m in messages %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content | trim) ~ '\\n<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
""",
    "llama 3: tools, date, trimmed": """
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set said = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set said = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{% endif %}
{{- 'Today: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{% endfor %}
{%- endif %}
{{- said + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('One call at a time, please.') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
""",
    "mistral: strict alternation": """
{%- if messages[0]['role'] == 'system' %}
    {%- set said, rest = messages[0]['content'], messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(index=0) %}
{%- for message in rest %}
    {%- if not (message.role == 'tool' or message.tool_calls is defined) %}
        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('Roles must take turns: user, assistant, user, ...') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.last and said is defined %}
            {{- '[INST] ' + said + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}{{- out[:-1] }}
            {{- ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- else %}
        {{- raise_exception('Only user, assistant and an initial system message.') }}
    {%- endif %}
{%- endfor %}
""",
    "command-r: tokens of turns": """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set said = messages[0]['content'] %}
{%- else %}{% set loop_messages = messages %}{% set said = false %}{% endif %}
{%- if said != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + said + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{%- for message in loop_messages %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'user' %}
        {{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}
""",
    "gemma: no system message": """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system role.') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Take turns.') }}{% endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
    "gemma 3: text or parts": """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{% set first = messages[0]['content'] + '\\n\\n' %}
    {%- else %}{% set first = messages[0]['content'][0]['text'] + '\\n\\n' %}{% endif %}
    {%- set rest = messages[1:] %}
{%- else %}{% set first, rest = '', messages %}{% endif %}
{%- for message in rest %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- first if loop.first else '' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- elif message['content'] is iterable %}
        {%- for item in message['content'] %}
            {%- if item['type'] == 'image' %}{{ '<image>' }}{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}
        {%- endfor %}
    {%- else %}{{ raise_exception('What content is this?') }}{% endif %}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
    PARTS_ALONE: """
{{- bos_token }}
{%- for message in messages %}
    {{- message['role'] | capitalize }}{{ ':' }}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}
    {%- endfor %}
    {{- '<end_of_utterance>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
""",
    "deepseek: reasoning cut off, absent content is none, arguments are text": """
{%- set ns = namespace(first=true, in_tool=false, said='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.said = ns.said + ('' if ns.first else '\\n\\n') + message['content'] %}{% set ns.first = false %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.said }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<User>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {%- for call in message['tool_calls'] %}
            {{- '<Assistant><call>' + call['function']['name'] + '\\n' + call['function']['arguments'] + '</call>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<Assistant>' + content + eos_token }}
    {%- endif %}
    {%- if message['role'] == 'tool' %}{{ '<output>' + message['content'] + '</output>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}
""",
    "granite: roles in marks, documents": """
{%- if messages[0]['role'] == 'system' %}{% set said, rest = messages[0]['content'], messages[1:] %}
{%- else %}{% set said, rest = 'You are a tool.', messages %}{% endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + said + '<|end_of_text|>\\n' }}
{%- if tools %}
    {{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- if documents %}
    {{- '<|start_of_role|>documents<|end_of_role|>' }}
    {%- for document in documents %}{{- 'Document ' + loop.index0 | string + '\\n' + document['text'] }}{% endfor %}
    {{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in rest %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}
    {%- if message.tool_calls %}{{- '<|tool_call|>' + message.tool_calls | map(attribute='function') | list | tojson }}{% endif %}
    {{- '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant' }}
    {%- if controls %}{{- ' ' + controls | tojson }}{% endif %}{{- '<|end_of_role|>' }}
{%- endif %}
""",
    "smollm 3: generation blocks, compact JSON": """
{%- set thinks = enable_thinking is not defined or enable_thinking %}
{%- if messages[0].role == 'system' %}{% set said, rest = messages[0].content, messages[1:] %}
{%- else %}{% set said, rest = '', messages %}{% endif %}
{{- '<|im_start|>system\\nMode: ' ~ ('/think' if thinks else '/no_think') ~ '\\n' ~ said }}
{%- if tools %}
    {%- for tool in tools %}
        {{- '\\n' ~ tool | tojson(separators=(',', ':'), sort_keys=true) ~ (tool | tojson(ensure_ascii=true)) }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in rest %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {% generation %}
            {%- set shown = content.lstrip('\\n') %}
            {{- '<|im_start|>assistant\\n' + shown + '<|im_end|>\\n' }}
        {% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- if thinks %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}{% endif %}
{%- endif %}
""",
    "phi: tools of a system message, roles as they come": """
{%- for message in messages %}
    {%- if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
        {{- '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}
    {%- else %}
        {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}
""",
    "hermes: tools in XML": """
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool.function | tojson(indent=2) }}{% endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') or (message.role == 'assistant' and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- ('<|im_start|>tool\\n' if loop.previtem and loop.previtem.role != 'tool' else '') }}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '\\n' if not loop.last and loop.nextitem.role == 'tool' else '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "qwen 3: reasoning of the last turn alone, loop controls": """
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role != 'user' %}{% continue %}{% endif %}
    {%- set ns.last = (messages | length - 1) - loop.index0 %}{% break %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- ('' if loop.first and not content else '\\n') + '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}{% else %}{{- call.function.arguments | tojson }}{% endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
""",
    "gpt-oss: a developer, reasoning": """
{%- macro note(text) %}{{- '<|start|>developer<|message|># Instructions\\n\\n' + text + '<|end|>' }}{% endmacro %}
{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y') + '<|end|>' }}
{%- for message in messages %}
    {%- if loop.first and message.role in ['developer', 'system'] %}{{- note(message.content) }}
    {%- elif message.role == 'assistant' %}
        {%- if message.thinking and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{% endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}
""",
    "tokens by name, no whitespace control": """{{ bos_token }}{% for m in messages %}
{{ m.role }}: {{ m['content'] }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}
{% endfor %}
{%- if add_generation_prompt %}
assistant:
{%- endif %}""",
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city, in °C <now>",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Zürich", "Oslo"]},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00001", "content": content}


OSLO = {"city": "Oslo", "days": 2}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [user("What is dpkg?")],
    "a system message": [system("Be brief."), user("What is dpkg?")],
    "several turns": [user("Hi"), assistant("Hello!"), user("  What is apt?\n")],
    "a system message and several turns": [
        system(" Be brief.\n"), user("Hi"), assistant("\nHello!\n"), user("Who?"), assistant("Me."), user("Ah."),
    ],
    "text that looks like a template's": [user("{{ bos_token }}<|im_end|>"), assistant("</think>"), user("\\n 'x' \"y\"")],
    "characters beyond ASCII": [system("Zürich 🏔"), user("Grüße aus «東京»"), assistant("é"), user("🙂")],
    "empty texts": [system(""), user(""), assistant(""), user("x")],
    "a call and its result": [
        user("Weather?"), assistant("", tool_calls=[call(OSLO)]), tool("rain"), assistant("Rain."), user("Thanks."),
    ],
    "text and a call": [user("Weather?"), assistant("Let me see.", tool_calls=[call(OSLO)]), tool("rain")],
    "two calls": [
        user("Weather?"), assistant("", tool_calls=[call(OSLO), call({}, "clock")]), tool("rain"), tool("noon"),
    ],
    "a call last": [user("Weather?"), assistant("", tool_calls=[call({"city": "Zürich"})])],
    "reasoning apart": [user("1+1?"), assistant("2", reasoning_content="One and one."), user("2+2?")],
    "reasoning apart, last": [user("1+1?"), assistant("2", reasoning_content="One and one.")],
    "reasoning in the text": [user("1+1?"), assistant("<think>\nHm.\n</think>\n\n2"), user("2+2?")],
    "the assistant first": [assistant("Hello!"), user("Hi")],
    "two questions": [user("One"), user("Two")],
    "names": [{**user("Hi"), "name": "Ann"}, assistant("Hello, Ann.", name="Bot"), {**user("Bye"), "name": "Ann"}],
    "an unknown role": [user("Hi"), {"role": "critic", "content": "Hm."}],
}  # fmt: skip

AFTER_CONTENT = {
    "chatml": "<|im_end|>\n",
    "chatml, trimmed, a line break before the end": "\n<|im_end|>\n",
    "llama 3: tools, date, trimmed": "<|eot_id|>",
    "mistral: strict alternation": "</s>",
    "command-r: tokens of turns": "<|END_OF_TURN_TOKEN|>",
    "gemma: no system message": "<end_of_turn>\n",
    "gemma 3: text or parts": "<end_of_turn>\n",
    PARTS_ALONE: "<end_of_utterance>\n",
    "deepseek: reasoning cut off, absent content is none, arguments are text": "</s>",
    "granite: roles in marks, documents": "<|end_of_text|>\n",
    "smollm 3: generation blocks, compact JSON": "<|im_end|>\n\n",
    "phi: tools of a system message, roles as they come": "<|end|></s>",
    "hermes: tools in XML": "<|im_end|>\n",
    "qwen 3: reasoning of the last turn alone, loop controls": "<|im_end|>\n",
    "gpt-oss: a developer, reasoning": "<|end|>",
    "tokens by name, no whitespace control": "</s><pad><unk>\n",
}
"""What each template writes after the content of a last message of the assistant, where no answer is asked for."""

PREFILLS = [
    "<", "d", "e", "</", "s>", "Hello", "Hi", "assistant", "Hello ", "Hello\n", "Hello \n\n", "\n\nHello", "", " ", "\n",
    "\n \n", "<|im_end|>", "<|im_end|>\n", "<end_of_turn>\n", "</s>", "</think>", "<think>\n", "<think>\nHm.\n</think>",
    "<think>\nHm.\n</think>\n\n2", "<think>Hm.</think>  \n", "{{ bos_token }}", 'a "b" \\n', "🙂", "e\u0301", "\ue000\ue001",
    "\u2003x\u2003", "Hi Hi", "\\", "'",
]  # fmt: skip
"""Beginnings of a last message: parts of control tokens, texts of other messages, whitespace at either end."""
