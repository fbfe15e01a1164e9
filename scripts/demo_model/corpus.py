"""Building the corpus from a directory tree with Debian packages; the same tree gives the same bytes."""

import fnmatch
import hashlib
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from . import chat
from .answers import ANSWERS, PARAGRAPHS, PROGRAMS
from .extract import Block, description_blocks, html_blocks, is_plain, is_prose, man_blocks, to_ascii
from .fetch import installed, read_text
from .sources import MANUALS, Manual, cleared_licences, is_allowed, is_page

CHUNK: Final = 3600
HELD_OUT_ONE_IN: Final = 64
ANSWERS_REPEAT: Final = (2, 3)


class Document(NamedTuple):
    """A text to learn. `origin` names its package and page; `repeats` says how often an epoch of each stage shows
    it."""

    kind: str
    origin: str
    repeats: tuple[int, int]
    text: str


@dataclass(slots=True)
class Source:
    """What the manifest records of a package from which text was taken."""

    package: str
    version: str
    licence: str
    files: list[str] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""


@dataclass(slots=True)
class Corpus:
    """All documents, in order, and the packages they come from."""

    documents: list[Document]
    sources: list[Source]

    @property
    def sha256(self) -> str:
        """A hash over the kind, origin, repeats and text of every document."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(json.dumps(document).encode())
        return digest.hexdigest()


def is_held_out(document: Document) -> bool:
    """Whether a document is held out to measure the loss: one page or package in 64, with all documents made from
    it."""
    return document.kind != "answers" and number(document.origin) % HELD_OUT_ONE_IN == 0


def number(text: str) -> int:
    """A number derived from a text alone, evenly distributed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Section(NamedTuple):
    """A heading (empty before the first) and the readable blocks below it."""

    title: str
    blocks: list[Block]

    @property
    def paragraphs(self) -> list[Block]:
        """The blocks that are plain paragraphs."""
        return [block for block in self.blocks if block.kind == "paragraph"]

    def render(self) -> str:
        """The section's text, with dashes before items and indented code."""
        parts: list[str] = []
        for block in self.blocks:
            if block.kind == "item":
                glue = "\n" if parts and parts[-1].startswith("- ") else "\n\n"
                parts += [glue, f"- {block.text}"]
            elif block.kind == "code":
                parts += ["\n\n", "\n".join(f"    {line}".rstrip() for line in block.text.split("\n"))]
            else:
                parts += ["\n\n", block.text]
        return "".join(parts[1:])


def sections(blocks: list[Block], seen: set[str], plain: bool) -> list[Section]:
    """Group blocks under their headings. Keeps readable prose that is not in `seen`, and the blocks that it introduces.

    With `plain`, keeps only paragraphs of ordinary words: the English of a manual without the symbols of its subject.
    """
    found = [Section("", [])]
    term = ""
    for block in blocks:
        kept = found[-1].blocks
        last = kept[-1] if kept else Block("", "")
        if plain and block.kind != "heading" and (block.kind == "code" or not is_plain(block.text)):
            term = ""
            continue
        if block.kind == "heading":
            found.append(Section(block.text, []))
        elif block.kind == "term":
            term = block.text if len(block.text) <= 48 and block.text.isascii() else ""
            continue
        elif block.kind == "code":
            if last.text.endswith(":") and _is_short(block.text):
                kept.append(block)
        elif is_prose(block.text) or (
            block.kind == "item" and (last.kind == "item" or last.text.endswith(":")) and _is_item(block.text)
        ):
            text = f"{term}: {block.text}" if term else block.text
            if len(text) < 60 or text not in seen:
                seen.add(text)
                kept.append(Block("item" if term else block.kind, text))
        term = ""
    for section in found:
        while section.blocks and section.blocks[-1].text.endswith(":") and section.blocks[-1].kind != "code":
            section.blocks.pop()  # it introduced a block that was left out
    return [section for section in found if sum(len(block.text) for block in section.blocks) >= 40]


def _is_short(code: str) -> bool:
    lines = code.split("\n")
    return code.isascii() and len(lines) <= 10 and max(map(len, lines)) <= 76


def _is_item(text: str) -> bool:
    letters = sum(sign.isalpha() or sign in " ,.'" for sign in text)
    return text.isascii() and letters >= 0.85 * len(text) and 2 <= len(text.split()) <= 120


def prose(found: list[Section], origin: str, repeats: tuple[int, int]) -> Iterator[Document]:
    """A page's sections as documents of a few thousand characters; every second one begins without its heading."""
    parts: list[str] = []
    for place, section in enumerate(found):
        bare = not parts and number(f"{origin} {place}") % 2
        parts.append(
            section.render() if bare or not section.title else f"## {section.title}\n\n{section.render()}"
        )
        if sum(map(len, parts)) >= CHUNK or place == len(found) - 1:
            yield Document("text", origin, repeats, "\n\n".join(parts))
            parts = []


def _from_page(
    name: str, root: Path, package: str, manual: Manual | None, seen: set[str]
) -> Iterator[Document]:
    """The documents of an HTML page, and for a known manual its sections as questions and answers."""
    origin, repeats = f"{package}/{os.path.basename(name)}", _repeats(name, manual)
    found = sections(html_blocks(read_text(root / name)), seen, plain=not _is_about_debian(manual))
    yield from prose(found, origin, repeats)
    if manual is None:
        return
    draw = random.Random(number(origin))
    for section in found:
        paragraphs = [block.text for block in section.paragraphs[:3]]
        turns = chat.about_section(section.title, manual.title, paragraphs, not manual.about_debian, draw)
        yield from _conversations(turns, origin, repeats, draw)


def _is_about_debian(manual: Manual | None) -> bool:
    return manual is not None and manual.about_debian


def _repeats(name: str, manual: Manual | None) -> tuple[int, int]:
    """How often each stage shows a page: the second stage has all pages about Debian, and a third of the others."""
    if manual and manual.about_debian:
        return manual.repeat, manual.repeat
    return 1, int(number(name) % 3 == 0)


def _from_manual_page(
    name: str, root: Path, package: str, manual: Manual | None, seen: set[str]
) -> Iterator[Document]:
    """The documents of a manual page, and a question and answer about its purpose."""
    blocks = man_blocks(read_text(root / name))
    origin = f"{package}/{os.path.basename(name)}"
    naming = next((below.text for block, below in pairwise(blocks) if block.text.upper() == "NAME"), "")
    names, _, purpose = naming.partition(" - ")
    command, section = names.split(",")[0].strip(), re.sub(r".*\.(\d)[^.]*(\.gz)?$", r"\1", name)
    found = [
        part
        for part in sections(blocks, seen, plain=not _is_about_debian(manual))
        if not _LEFT_OUT.fullmatch(part.title.strip())
    ]
    if not (purpose and found and re.fullmatch(r"[A-Za-z][\w.+@:-]*", command)):
        return
    titled = [Section(f"{command}({section}) - {purpose}", found[0].blocks)] + [
        Section(part.title.capitalize() if part.title.isupper() else part.title, part.blocks)
        for part in found[1:]
    ]
    yield from prose(titled, origin, _repeats(name, manual))
    draw = random.Random(number(origin))
    described = [block.text for part in found if part.title == "DESCRIPTION" for block in part.paragraphs]
    turns = chat.about_command(command, section, purpose, described, draw)
    yield from _conversations(turns, origin, (1, 2), draw)


_LEFT_OUT: Final = re.compile(
    r"(?i)name|synopsis|authors?|copyright.*|see also|report.*bugs.*|license|licence|colophon|history|availability|"
    r"bugs|credits|thanks|contact|resources|maintainers?|acknowledge?ments"
)


def _from_description(package: str, fields: dict[str, str]) -> Iterator[Document]:
    synopsis, _, long = fields.get("Description", "").partition("\n")
    blocks, synopsis = description_blocks(long), to_ascii(synopsis).strip()
    if (
        re.search("transitional|dummy|metapackage", synopsis)
        or len(synopsis.split()) < 2
        or not synopsis.isascii()
    ):
        return
    origin, draw = f"{package}/description", random.Random(number(package))
    readable = [
        block for block in blocks if is_prose(block.text) or (block.kind == "item" and _is_item(block.text))
    ]
    if readable:
        text = Section("", readable).render()
        yield Document("text", origin, (1, 1), f"{package}: {synopsis}\n\n{text}")
    yield from _conversations(chat.about_package(package, synopsis, blocks, draw), origin, (1, 2), draw)


def _conversations(
    turns: list[chat.Turn], origin: str, repeats: tuple[int, int], draw: random.Random
) -> Iterator[Document]:
    """Conversations, mostly single questions; some have a system prompt, and some several questions."""
    while turns:
        count = 1 if len({turn.answer for turn in turns[:3]}) < 3 else draw.choice((1, 1, 1, 2, 3))
        system = draw.choice(chat.SYSTEM_PROMPTS) if draw.random() < 0.15 else ""
        yield Document("chat", origin, repeats, chat.render(turns[:count], system))
        turns = turns[count:]


def _from_answers() -> Iterator[Document]:
    draw = random.Random(0)
    written = [*ANSWERS, *chat.about_programs(PROGRAMS)]
    answers: dict[str, str] = {}
    for questions, answer in written:
        for question in questions:
            answers.setdefault(question, answer)
    for question, answer in list(answers.items()):
        for other in chat.rephrase(question, draw):
            answers.setdefault(other, answer)
    turns = [chat.Turn(question, answer) for question, answer in answers.items()]
    for turn in turns:
        system = draw.choice(chat.SYSTEM_PROMPTS) if draw.random() < 0.15 else ""
        yield Document("answers", "answers", ANSWERS_REPEAT, chat.render([turn], system))
        yield Document("answers", "answers", (1, 2), f"{turn.question}\n\n{turn.answer}")
    draw.shuffle(turns)
    for first in range(0, len(turns) - 2, 3):
        yield Document("answers", "answers", (1, 1), chat.render(turns[first : first + 3]))
    for text in (
        *(answer for _, answer in ANSWERS),
        *PARAGRAPHS,
        *(f"{name} is {what}." for name, what in PROGRAMS.items()),
    ):
        yield Document("answers", "answers", (4, 6), text)


_TAKEN: Final = ("Description", "usr/share/man/man[1578]/*", "usr/share/doc/*.html")


def build(root: Path) -> Corpus:
    """The corpus of all packages below `root`: first the manuals, then all others with a cleared licence, by name."""
    manuals = {manual.package: manual for manual in MANUALS}
    packages = sorted(
        installed(root), key=lambda fields: (fields["Package"] not in manuals, fields["Package"])
    )
    documents: list[Document] = []
    sources: list[Source] = []
    seen: set[str] = set()
    for fields in packages:
        package, manual = fields["Package"], manuals.get(fields["Package"])
        licence = _licence(root, package, manual)
        if not licence:
            continue
        own = [] if manual else list(_from_description(package, fields))
        for name in sorted(_files(root, package)):
            wanted = not manual or any(fnmatch.fnmatch(name, page) for page in manual.pages)
            if not wanted or not (root / name).is_file():
                continue
            if is_page(name) or (manual and name.endswith(".html")):
                own += _from_page(name, root, package, manual, seen)
            elif re.fullmatch(r"usr/share/man/man[1578]/.+", name) and not (root / name).is_symlink():
                own += _from_manual_page(name, root, package, manual, seen)
        if own:
            texts = "\n".join(document.text for document in own).encode()
            digest = hashlib.sha256(texts).hexdigest()
            taken = list(manual.pages if manual else _TAKEN)
            sources.append(Source(package, fields["Version"], licence, taken, len(texts), digest))
            documents += own
    documents += _from_answers()
    return Corpus(list(dict.fromkeys(documents)), sources)


def _licence(root: Path, package: str, manual: Manual | None) -> str:
    """The licence under which the package's text is used, or an empty string if it may not be used."""
    path = root / f"usr/share/doc/{package}/copyright"
    if not path.is_file():
        return ""
    text = read_text(path)
    if not manual:
        return " and ".join(cleared_licences(text) or ())
    if " ".join(manual.quote.split()) not in " ".join(text.split()) or not is_allowed(manual.licence):
        raise SystemExit(
            f"{package}: its copyright file no longer grants {manual.licence} in the words quoted"
        )
    return manual.licence


def _files(root: Path, package: str) -> list[str]:
    """The paths of a package's files, relative to the root, as dpkg lists them."""
    info = root / "var/lib/dpkg/info"
    lists = [
        path for path in (info / f"{package}.list", *sorted(info.glob(f"{package}:*.list"))) if path.is_file()
    ]
    return (
        [line.removeprefix("/") for line in lists[0].read_text("utf-8").split("\n") if line] if lists else []
    )
