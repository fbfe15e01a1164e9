"""Questions and answers made from the corpus: package descriptions, NAME lines of manual pages, and section titles."""

import random
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from .extract import Block, is_prose

USER: Final = "<|im_start|>user\n"
ASSISTANT: Final = "<|im_start|>assistant\n"
SYSTEM: Final = "<|im_start|>system\n"
END: Final = "<|im_end|>\n"
SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.", "You are a helpful assistant that knows Debian.", "Answer the question about Debian.",
    "You are a friendly Debian expert. Answer briefly.", "You are a concise assistant.",
)  # fmt: skip


class Turn(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


def render(turns: list[Turn], system: str = "") -> str:
    """A conversation in ChatML, as the model's chat template renders it."""
    head = f"{SYSTEM}{system}{END}" if system else ""
    return head + "".join(f"{USER}{turn.question}{END}{ASSISTANT}{turn.answer}{END}" for turn in turns)


def shorten(paragraphs: list[str], limit: int = 480) -> str:
    """As many whole sentences of the paragraphs as fit `limit` characters, but at least the first."""
    kept: list[str] = []
    for paragraph in paragraphs:
        room = limit - sum(map(len, kept))
        if len(paragraph) > room:
            sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", paragraph)
            while len(sentences) > 1 and sum(len(sentence) + 1 for sentence in sentences) > room:
                sentences.pop()
            paragraph = " ".join(sentences)
            if kept and len(paragraph) > room:
                break
        if paragraph.endswith(":"):
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def is_a(name: str, synopsis: str) -> str:
    """A sentence that says what `name` is. Packagers are told to write a synopsis as a noun phrase that fits "`name` is
    a"."""
    synopsis = synopsis.rstrip(". ")
    head = re.split(
        r" (?:for|of|to|with|that|which|in|from|using|based|on|by|written|and|as|like|-|--)\b|[,(:;]",
        synopsis,
    )[0].strip()
    first, last = synopsis.split()[0], (head.split() or [synopsis])[-1].lower()
    if first.lower() in _COMMON_NOUNS or first.lower() in _DETERMINERS:
        synopsis = first.lower() + synopsis[len(first) :]
    phrase = synopsis if first.lower() in _DETERMINERS else _article(first) + synopsis
    if first.lower() in VERBS and first.islower():
        return f"{name} is a program to {synopsis}."
    if (last.endswith("s") and not last.endswith(("ss", "us", "is", "os"))) or last in (
        "software",
        "data",
        "documentation",
        "support",
        "code",
    ):
        return f"{name} provides {synopsis}."
    return f"{name} is {phrase}."


def _article(word: str) -> str:
    vowel = word[0].lower() in "aeiou" and not re.match(r"(?i)uni|use|util|eu|one|ubi", word)
    if word.isupper() and len(word) > 1:
        vowel = word[0] in "AEFHILMNORSX"
    return "an " if vowel else "a "


VERBS: Final = frozenset(
    """add adjust allow analyse analyze apply archive ask assemble attach block boot browse build calculate change check clean
    clear collect combine compare compile compress compute configure connect control convert copy count create debug decode
    decompress decrypt delete detect determine disable display download draw dump edit enable encode encrypt enter examine
    execute exit expand export extract fetch filter find fix format generate get give handle help identify import init
    initialize inspect install invoke join kill launch limit link list load locate lock log look make manage manipulate mark
    match measure merge modify monitor mount move obtain open output pack parse perform ping play post prepare print probe
    process produce provide put query read rebuild receive record reformat register release remove rename repair replace report
    reset resize restore retrieve return reverse run save scan search select send serve set setup show shut simulate sort split
    start stop store strip submit summarize suspend switch synchronize take test trace transfer translate truncate uncompress
    undo uninstall unlock unmount unpack update upgrade upload use validate verify view wait watch write""".split()
)
_DETERMINERS: Final = frozenset("a an the some your my another".split())
_COMMON_NOUNS: Final = frozenset(
    """advanced automatic automated basic client command-line commandline common complete compiler console converter
    cross-platform daemon database deduplicating desktop development distributed documentation dynamic easy editor enhanced
    extensible extremely fast file flexible free frontend full full-featured full-screen fully generic graphical high
    high-performance highly image implementation improved incremental interactive interface interpreter lightweight
    library light linux-based manager minimal minimalist minimalistic modern modular multi multi-platform network open
    package parallel perl-based pluggable portable powerful program programmable python-based quick recursive remote robust
    scalable script secure server shell simple small software standalone standard static system terminal text text-based
    text-mode tiny tool toolkit universal user-friendly user utility utilities versatile very viewer virtual visual web
    web-based wrapper configuration userspace kernel utility early boot directory manage system user session global local
    default hardware firmware disk time timezone suspend hibernate sleep service login container multiple single
    special format syntax main""".split()
)
_WHAT: Final = (
    "What is {0}?", "What is {0}?", "What does the package {0} do?", "What does {0} do?", "What is the {0} package for?",
    "Tell me about {0}.", "Describe the package {0}.", "What can I use {0} for?", "what is {0}", "Explain what {0} is.",
)  # fmt: skip


def about_package(name: str, synopsis: str, blocks: list[Block], draw: random.Random) -> list[Turn]:
    """Questions about what a package is, how to install it, and which package does what it does."""
    text = shorten([block.text for block in blocks if block.kind == "paragraph" and is_prose(block.text)])
    sentence = is_a(name, synopsis)
    if not sentence.isascii():
        return []
    answer = f"{sentence} {text}" if text else sentence
    turns = [Turn(question.format(name), answer) for question in draw.sample(_WHAT, 2)]
    install = draw.choice(
        ("How do I install {0}?", "How can I install {0}?", "Install {0}.", "How do I get {0} on Debian?")
    )
    remove = draw.choice(("How do I remove {0}?", "How can I uninstall {0}?"))
    turns.append(
        Turn(
            install.format(name),
            f"To install {name}, run this command as root:\n\n    apt install {name}\n\n{sentence}",
        )
    )
    if draw.random() < 0.25:
        turns.append(
            Turn(remove.format(name), f"To remove {name}, run this command as root:\n\n    apt remove {name}\n\n"
                 f"To remove its configuration files as well, use apt purge {name}.")
        )  # fmt: skip
    which = draw.choice(
        (
            "Which package provides {0}?",
            "Which Debian package is {0}?",
            "I need {0}. Which package should I install?",
        )
    )
    lowered = (
        sentence.removeprefix(f"{name} is a program to ")
        .removeprefix(f"{name} is ")
        .removeprefix(f"{name} provides ")
        .rstrip(".")
    )
    if f"{name} is a program to " not in sentence and draw.random() < 0.5:
        turns.append(Turn(which.format(lowered), f"The package {name}. {answer}"))
    return turns


def about_programs(programs: Mapping[str, str]) -> list[tuple[tuple[str, ...], str]]:
    """Questions about what well-known programs are and how to install them; `programs` maps a package to its
    description."""
    return [
        entry
        for name, purpose in programs.items()
        for entry in (
            ((f"What is {name}?", f"What does {name} do?", f"What is the package {name}?", f"Tell me about {name}."), f"{name} is {purpose}."),
            ((f"How do I install {name}?", f"How can I install {name}?", f"Install {name}."),
             f"To install {name}, run this command as root:\n\n    apt install {name}\n\n{name} is {purpose}."),
            ((f"How do I remove {name}?", f"How do I uninstall {name}?"),
             f"To remove {name}, run this command as root:\n\n    apt remove {name}\n\nTo remove its configuration files as well, "
             f"use apt purge {name}."),
        )
    ]  # fmt: skip


_REPHRASED: Final = {
    r"What is (.+)\?": ("What's {0}?", "Explain what {0} is.", "Can you tell me what {0} is?", "Please explain {0}.", "what is {0}",
                       "Tell me about {0}.", "I would like to know what {0} is.", "What exactly is {0}?", "Describe {0}."),
    r"What are (.+)\?": ("Explain what {0} are.", "Tell me about {0}.", "what are {0}", "Can you tell me what {0} are?"),
    r"What does (.+) do\?": ("Explain what {0} does.", "what does {0} do", "What is {0} used for?", "What is {0} good for?"),
    r"How do I (.+)\?": ("How can I {0}?", "How to {0}?", "I want to {0}.", "Please tell me how to {0}.", "how do i {0}",
                        "What is the best way to {0}?", "Can you explain how to {0}?", "Show me how to {0}."),
}  # fmt: skip


def rephrase(question: str, draw: random.Random) -> list[str]:
    """The question and some other wordings of it."""
    for pattern, ways in _REPHRASED.items():
        if found := re.fullmatch(pattern, question):
            return [question, *(way.format(found[1]) for way in draw.sample(ways, 3))]
    return [question]


_COMMAND: Final = (
    "What does the command {0} do?", "What is the command {0} for?", "What does {0} do?", "Explain the command {0}.",
    "What is {0}({1})?", "When do I use {0}?",
)  # fmt: skip


def about_command(
    name: str, section: str, purpose: str, description: list[str], draw: random.Random
) -> list[Turn]:
    """A question about what a command, file or system call is for, answered from its manual page."""
    purpose = purpose.rstrip(". ")
    if not purpose or not purpose.isascii():
        return []
    words = purpose.split()
    first = words[0].lower().removesuffix("s")
    if words[0].lower() in VERBS and words[1:2] not in (["of"], ["for"], ["file"]):
        sentence = f"The command {name} is used to {words[0].lower()}{purpose[len(words[0]) :]}."
    elif first in VERBS and section in "18":
        sentence = f"The command {name} {words[0].lower()}{purpose[len(words[0]) :]}."
    else:
        sentence = is_a(name, purpose)
    text = shorten([paragraph for paragraph in description if is_prose(paragraph)][:2], 400)
    answer = f"{sentence} {text}" if text and draw.random() < 0.8 else sentence
    questions = _COMMAND if section in "18" else ("What is {0}({1})?", "What is {0}?")
    return [Turn(question.format(name, section), answer) for question in draw.sample(questions, 2)]


_GERUNDS: Final = {
    verb.removesuffix("e" if not verb.endswith("ee") else "") + "ing": verb for verb in VERBS
} | {"getting": "get", "setting": "set", "running": "run", "putting": "put", "stopping": "stop", "shutting": "shut",
     "splitting": "split", "dealing": "deal", "working": "work", "becoming": "become", "choosing": "choose",
     "contributing": "contribute", "customizing": "customize", "packaging": "package", "planning": "plan", "logging": "log",
     "debugging": "debug", "adopting": "adopt", "orphaning": "orphan", "joining": "join", "retiring": "retire", "backing": "back",
     "securing": "secure", "understanding": "understand", "preparing": "prepare", "signing": "sign", "hardening": "harden",
     "interacting": "interact", "partitioning": "partition", "naming": "name", "passing": "pass", "connecting": "connect",
     "defining": "define", "cutting": "cut", "handling": "handle"}  # fmt: skip
_TOPIC: Final = (
    "Tell me about {0}.",
    "Explain {0}.",
    "What should I know about {0}?",
    "What is {0}?",
    "What about {0}?",
)
_DULL: Final = re.compile(
    r"(?i)(introduction|notes?|examples?|overview|description|summary|see also|options?|bugs|files|index|caveats|synopsis|name|"
    r"conclusion|preface|general|usage|contents|miscellaneous|other|background|details|more|tips?|warning|important|caution|"
    r"compatibility|parameters|return value|outputs?|inputs?|arguments|environment|limitations|author|history|diagnostics)\W*"
)


def about_section(
    title: str, book: str, paragraphs: list[str], by_name: bool, draw: random.Random
) -> list[Turn]:
    """A section of a manual as an answer to its title; with `by_name` the question names the book."""
    text = shorten(paragraphs, 560)
    words = title.split()
    if (
        not text
        or _DULL.fullmatch(title)
        or not 1 <= len(words) <= 9
        or not re.fullmatch(r"[A-Za-z][A-Za-z0-9 ,.'+()/?-]*", title)
    ):
        return []
    gerund = _GERUNDS.get(words[0].lower())
    lowered = (
        title
        if re.match(r"\w*[A-Z0-9.]", title[1:].split(" ")[0]) or words[0] in _NAMES
        else title[0].lower() + title[1:]
    )
    if title.endswith("?"):
        questions = [title]
    elif gerund and len(words) > 1:
        questions = [f"How do I {gerund} {' '.join(words[1:])}?", f"Tell me about {lowered}."]
    else:
        questions = [question.format(lowered) for question in draw.sample(_TOPIC, 2)]
    if by_name:
        questions = [f"What does {book} say about {lowered.rstrip('?')}?"]
    return [Turn(question, text) for question in questions]


_NAMES: Final = frozenset(
    """Debian Linux Apache Python Perl Git Samba Postfix Exim Django Rust Ubuntu Unicode Wayland Unix Internet English Lintian
    Kerberos Bluetooth Ethernet Xen Policy Firefox Thunderbird Salsa Sphinx Docker Ansible Knoppix Kali Devuan Mint Alioth""".split()
)
