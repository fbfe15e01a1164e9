"""The prompts that the built-in chat formats give for a conversation, written from llama.cpp's description of them."""
# ruff: noqa: E501 -- expected texts are data

from __future__ import annotations

from chat_templates import assistant, system, user

TALK = [
    system("Be kind."),
    user("Hello"),
    assistant("Hi there"),
    user("Who are you"),
    assistant(" I am. "),
    user("Ah"),
]
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
HOLDER = "<\uff5chy_place\u2581holder\u2581no\u2581{}\uff5c>"
EXAONE = (
    "[|system|]Be kind.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi there[|endofturn|]\n[|user|]Who are you\n"
    "[|assistant|]I am.[|endofturn|]\n[|user|]Ah\n[|assistant|]"
)
GRANITE = "".join(
    f"<|start_of_role|>{each['role']}<|end_of_role|>{each['content']}<|end_of_text|>\n" for each in TALK
) + "<|start_of_role|>assistant<|end_of_role|>"  # fmt: skip
BAILING = (
    "<role>SYSTEM</role>Be kind.<role>HUMAN</role>Hello<role>ASSISTANT</role>Hi there<role>HUMAN</role>Who are you"
    "<role>ASSISTANT</role> I am. <role>HUMAN</role>Ah<role>ASSISTANT</role>"
)
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there"
        "<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n<|im_start|>assistant\n I am. <|im_end|>\n"
        "<|im_start|>user\nAh<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama2": "[INST] Be kind.\nHello [/INST]Hi there</s>[INST] Who are you [/INST] I am. </s>[INST] Ah [/INST]",
    "llama2-sys": (
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello [/INST]Hi there</s>[INST] Who are you [/INST] I am. </s>[INST] Ah "
        "[/INST]"
    ),
    "llama2-sys-bos": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello [/INST]Hi there</s><s>[INST] Who are you [/INST] I am. </s><s>"
        "[INST] Ah [/INST]"
    ),
    "llama2-sys-strip": (
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello [/INST]Hi there</s>[INST] Who are you [/INST]I am.</s>[INST] Ah "
        "[/INST]"
    ),
    "mistral-v1": " [INST] Be kind.\n\nHello [/INST] Hi there</s> [INST] Who are you [/INST]  I am. </s> [INST] Ah [/INST]",
    "mistral-v3": "[INST] Be kind.\n\nHello[/INST] Hi there</s>[INST] Who are you[/INST] I am.</s>[INST] Ah[/INST]",
    "mistral-v3-tekken": "[INST]Be kind.\n\nHello[/INST]Hi there</s>[INST]Who are you[/INST] I am. </s>[INST]Ah[/INST]",
    "mistral-v7": (
        "[SYSTEM_PROMPT] Be kind.[/SYSTEM_PROMPT][INST] Hello[/INST] Hi there</s>[INST] Who are you[/INST]  I am. </s>"
        "[INST] Ah[/INST]"
    ),
    "mistral-v7-tekken": (
        "[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Hello[/INST]Hi there</s>[INST]Who are you[/INST] I am. </s>"
        "[INST]Ah[/INST]"
    ),
    "phi3": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi there<|end|>\n<|user|>\nWho are you"
        "<|end|>\n<|assistant|>\n I am. <|end|>\n<|user|>\nAh<|end|>\n<|assistant|>\n"
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant"
        "<|im_sep|>Hi there<|im_end|><|im_start|>user<|im_sep|>Who are you<|im_end|><|im_start|>assistant<|im_sep|>"
        " I am. <|im_end|><|im_start|>user<|im_sep|>Ah<|im_end|><|im_start|>assistant<|im_sep|>"
    ),
    "falcon3": (
        "<|system|>\nBe kind.\n<|user|>\nHello\n<|assistant|>\nHi there\n<|user|>\nWho are you\n<|assistant|>\n I am. \n"
        "<|user|>\nAh\n<|assistant|>\n"
    ),
    "zephyr": (
        "<|system|>\nBe kind.<|endoftext|>\n<|user|>\nHello<|endoftext|>\n<|assistant|>\nHi there<|endoftext|>\n<|user|>"
        "\nWho are you<|endoftext|>\n<|assistant|>\n I am. <|endoftext|>\n<|user|>\nAh<|endoftext|>\n<|assistant|>\n"
    ),
    "monarch": (
        "<s>system\nBe kind.</s>\n<s>user\nHello</s>\n<s>assistant\nHi there</s>\n<s>user\nWho are you</s>\n<s>assistant\n"
        " I am. </s>\n<s>user\nAh</s>\n<s>assistant\n"
    ),
    "gemma": (
        "<start_of_turn>user\nBe kind.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi there<end_of_turn>\n"
        "<start_of_turn>user\nWho are you<end_of_turn>\n<start_of_turn>model\nI am.<end_of_turn>\n<start_of_turn>user\nAh"
        "<end_of_turn>\n<start_of_turn>model\n"
    ),
    "orion": (
        "Human: Be kind.\n\nHello\n\nAssistant: </s>Hi there</s>Human: Who are you\n\nAssistant: </s> I am. </s>Human: Ah"
        "\n\nAssistant: </s>"
    ),
    "openchat": (
        "Be kind.<|end_of_turn|>GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant: Hi there<|end_of_turn|>GPT4 "
        "Correct User: Who are you<|end_of_turn|>GPT4 Correct Assistant:  I am. <|end_of_turn|>GPT4 Correct User: Ah"
        "<|end_of_turn|>GPT4 Correct Assistant:"
    ),
    "vicuna": (
        "Be kind.\n\nUSER: Hello\nASSISTANT: Hi there</s>\nUSER: Who are you\nASSISTANT:  I am. </s>\nUSER: Ah\nASSISTANT:"
    ),
    "vicuna-orca": (
        "SYSTEM: Be kind.\nUSER: Hello\nASSISTANT: Hi there</s>\nUSER: Who are you\nASSISTANT:  I am. </s>\nUSER: Ah\n"
        "ASSISTANT:"
    ),
    "deepseek": (
        "Be kind.### Instruction:\nHello\n### Response:\nHi there\n<|EOT|>\n### Instruction:\nWho are you\n### Response:\n"
        " I am. \n<|EOT|>\n### Instruction:\nAh\n### Response:\n"
    ),
    "deepseek2": (
        f"Be kind.\n\nUser: Hello\n\nAssistant: Hi there{END}User: Who are you\n\nAssistant:  I am. {END}User: Ah\n\n"
        "Assistant:"
    ),
    "deepseek3": (
        f"Be kind.\n\n<\uff5cUser\uff5c>Hello<\uff5cAssistant\uff5c>Hi there{END}<\uff5cUser\uff5c>Who are you"
        f"<\uff5cAssistant\uff5c> I am. {END}<\uff5cUser\uff5c>Ah<\uff5cAssistant\uff5c>"
    ),
    "command-r": (
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be kind.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello"
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Hi there<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>Who are you<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>I am.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Ah<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "llama3": "".join(
        f"<|start_header_id|>{each['role']}<|end_header_id|>\n\n{each['content'].strip()}<|eot_id|>" for each in TALK
    ) + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama4": "".join(
        f"<|header_start|>{each['role']}<|header_end|>\n\n{each['content'].strip()}<|eot|>" for each in TALK
    ) + "<|header_start|>assistant<|header_end|>\n\n",
    "chatglm3": "[gMASK]sop" + "".join(f"<|{each['role']}|>\n {each['content']}" for each in TALK) + "<|assistant|>",
    "chatglm4": "[gMASK]<sop>" + "".join(f"<|{each['role']}|>\n{each['content']}" for each in TALK) + "<|assistant|>\n",
    "glmedge": "".join(f"<|{each['role']}|>\n{each['content']}" for each in TALK) + "<|assistant|>",
    "minicpm": "Be kind.<\u7528\u6237>Hello<AI>Hi there<\u7528\u6237>Who are you<AI>I am.<\u7528\u6237>Ah<AI>",
    "exaone3": EXAONE,
    "exaone4": EXAONE,
    "rwkv-world": (
        "System: Be kind.\n\nUser: Hello\n\nAssistant: Hi there\n\nUser: Who are you\n\nAssistant: I am.\n\nUser: Ah\n\n"
        "Assistant:"
    ),
    "granite": GRANITE,
    "granite-4.0": GRANITE,
    "granite-4.1": GRANITE,
    "gigachat": (
        "<s>Be kind.<|message_sep|>user<|role_sep|>Hello<|message_sep|>available functions<|role_sep|>[]<|message_sep|>"
        "assistant<|role_sep|>Hi there<|message_sep|>user<|role_sep|>Who are you<|message_sep|>available functions"
        "<|role_sep|>[]<|message_sep|>assistant<|role_sep|> I am. <|message_sep|>user<|role_sep|>Ah<|message_sep|>"
        "available functions<|role_sep|>[]<|message_sep|>assistant<|role_sep|>"
    ),
    "megrez": "".join(
        f"<|role_start|>{each['role']}<|role_end|>{each['content']}<|turn_end|>" for each in TALK
    ) + "<|role_start|>assistant<|role_end|>",
    "bailing": BAILING,
    "bailing-think": BAILING + "<think>",
    "bailing2": (
        "<role>SYSTEM</role>Be kind.<|role_end|><role>HUMAN</role>Hello<|role_end|><role>ASSISTANT</role>Hi there"
        "<|role_end|><role>HUMAN</role>Who are you<|role_end|><role>ASSISTANT</role> I am. <|role_end|><role>HUMAN</role>Ah"
        "<|role_end|><role>ASSISTANT</role>"
    ),
    "smolvlm": (
        "<|im_start|>Be kind.\n\nUser: Hello<end_of_utterance>\nAssistant: Hi there<end_of_utterance>\nUser: Who are you"
        "<end_of_utterance>\nAssistant:  I am. <end_of_utterance>\nUser: Ah<end_of_utterance>\nAssistant:"
    ),
    "dots1": (
        "<|system|>Be kind.<|endofsystem|><|userprompt|>Hello<|endofuserprompt|><|response|>Hi there<|endofresponse|>"
        "<|userprompt|>Who are you<|endofuserprompt|><|response|> I am. <|endofresponse|><|userprompt|>Ah"
        "<|endofuserprompt|><|response|>"
    ),
    "hunyuan-moe": (
        "<|startoftext|>Be kind.<|extra_4|><|startoftext|>Hello<|extra_0|>Hi there<|eos|><|startoftext|>Who are you"
        "<|extra_0|> I am. <|eos|><|startoftext|>Ah<|extra_0|>"
    ),
    "hunyuan-dense": (
        f"Be kind.{HOLDER.format(3)}<\uff5chy_User\uff5c>Hello<\uff5chy_Assistant\uff5c>Hi there{HOLDER.format(2)}"
        f"<\uff5chy_User\uff5c>Who are you<\uff5chy_Assistant\uff5c> I am. {HOLDER.format(2)}<\uff5chy_User\uff5c>Ah"
        "<\uff5chy_Assistant\uff5c>"
    ),
    "gpt-oss": (
        "<|start|>system<|message|>Be kind.<|end|><|start|>user<|message|>Hello<|end|><|start|>assistant<|message|>Hi there"
        "<|return|><|start|>user<|message|>Who are you<|end|><|start|>assistant<|message|> I am. <|return|><|start|>user"
        "<|message|>Ah<|end|><|start|>assistant"
    ),
    "kimi-k2": (
        "<|im_system|>system<|im_middle|>Be kind.<|im_end|><|im_user|>user<|im_middle|>Hello<|im_end|><|im_assistant|>"
        "assistant<|im_middle|>Hi there<|im_end|><|im_user|>user<|im_middle|>Who are you<|im_end|><|im_assistant|>assistant"
        "<|im_middle|> I am. <|im_end|><|im_user|>user<|im_middle|>Ah<|im_end|><|im_assistant|>assistant<|im_middle|>"
    ),
    "seed_oss": (
        "<seed:bos>system\nBe kind.<seed:eos><seed:bos>user\nHello<seed:eos><seed:bos>assistant\nHi there<seed:eos>"
        "<seed:bos>user\nWho are you<seed:eos><seed:bos>assistant\nI am.<seed:eos><seed:bos>user\nAh<seed:eos><seed:bos>"
        "assistant\n"
    ),
    "grok-2": (
        "System: Be kind.<|separator|>\n\nHuman: Hello<|separator|>\n\nAssistant: Hi there<|separator|>\n\nHuman: Who are "
        "you<|separator|>\n\nAssistant:  I am. <|separator|>\n\nHuman: Ah<|separator|>\n\nAssistant:"
    ),
    "pangu-embedded": (
        "[unused9]\u7cfb\u7edf\uff1aBe kind.[unused10][unused9]\u7528\u6237\uff1aHello[unused10][unused9]\u52a9\u624b\uff1a"
        "Hi there[unused10][unused9]\u7528\u6237\uff1aWho are you[unused10][unused9]\u52a9\u624b\uff1a I am. [unused10]"
        "[unused9]\u7528\u6237\uff1aAh[unused10][unused9]\u52a9\u624b\uff1a"
    ),
}  # fmt: skip
"""What llama.cpp's formats are for a conversation; monarch's and llama2-sys-bos's begin with the bos token here."""
