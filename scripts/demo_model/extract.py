"""Converting HTML pages, manual pages and package descriptions to clean ASCII prose: a list of blocks of some kinds."""

import re
import textwrap
import unicodedata
from html.parser import HTMLParser
from typing import Final, NamedTuple


class Block(NamedTuple):
    """A piece of text. `kind` is `heading`, `paragraph`, `item`, `code`, or `term` (explained by the next
    paragraph)."""

    kind: str
    text: str


_ASCII: Final = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\u2022", "-"),
        **dict.fromkeys("\u2014\u2015", "--"),
        **dict.fromkeys("\u00a0\u2009\u202f", " "),
        **dict.fromkeys("\u200a\u200b\ufeff\u00ad\u00b6\uf0c1\u00ae\u2122", ""),
        **{"\u2026": "...", "\u2192": "->", "\u2190": "<-", "\u00d7": "x", "\u00a9": "(c)"},
    }
)


def to_ascii(text: str) -> str:
    """The text with typographic signs and accents replaced by ASCII; characters without a replacement are kept."""
    folded = unicodedata.normalize("NFKD", text.translate(_ASCII))
    return "".join(sign for sign in folded if not unicodedata.combining(sign))


def is_prose(text: str) -> bool:
    """Whether a paragraph consists of English sentences, not of a table, a signature or symbols."""
    letters = sum(sign.isalpha() or sign in " ,.'" for sign in text)
    words = text.lower().split()
    common = sum(word in _COMMON for word in words)
    return (
        text.isascii()
        and text.rstrip("\"')").endswith((".", "!", "?", ":"))
        and letters >= 0.86 * len(text)
        and len(words) >= 5
        and common >= 0.12 * len(words)
        and max(map(len, words)) <= 50
    )


def is_plain(text: str) -> bool:
    """Whether nearly all words of a paragraph are ordinary: without digits, inner capitals or code symbols."""
    words = text.split()
    plain = sum(bool(_PLAIN.fullmatch(word)) for word in words)
    return plain >= 0.93 * len(words)


_PLAIN: Final = re.compile(r"""["'(]*([A-Za-z]?[a-z']+(-[a-z]+)*|[AI]|[A-Z]{2,5}|--?)[.,;:?!)"']*""")
_COMMON: Final = frozenset(
    """a an and are as at be been but by can do does for from has have how if in into is it its may more must no
    not of on one or other should so such than that the their then there these they this to use used using
    was we when where which will with would you your""".split()
)


class _Page(HTMLParser):
    """Collects the blocks of one HTML page, leaving out navigation, tables and scripts."""

    SKIPPED: Final = frozenset(
        "script style nav table footer form aside svg button head title select template".split()
    )
    SKIPPED_CLASS: Final = re.compile(
        r"\b(toc|toctree-wrapper|docnav|nav|navheader|navfooter|sphinxsidebar|related|headerlink|footer|breadcrumbs?|banner|"
        r"wy-nav-side|menu|qv|top|bottomlang|toplang|nvcs|admonition-todo|versionmodified|footnote|version|lang|clocation|navig)\b"
    )
    SKIPPED_ID: Final = re.compile(
        r"title|banner|quickview|preamble|path|comments_section|sidebar|menu-bar|footer"
    )
    BLOCKS: Final = {
        **dict.fromkeys("h1 h2 h3 h4 h5 h6".split(), "heading"),
        **dict.fromkeys(
            "p div section dd blockquote article main ul ol dl tr hr figure".split(), "paragraph"
        ),
        **{"li": "item", "dt": "term", "pre": "code"},
    }
    VOID: Final = frozenset("img br hr input meta link col area base wbr".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.kind = "paragraph"
        self.text = ""
        self.skipping = ""
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipping:
            self.depth += tag == self.skipping
            return
        values = {name: value or "" for name, value in attrs}
        hidden = self.SKIPPED_CLASS.search(values.get("class", "")) or self.SKIPPED_ID.fullmatch(
            values.get("id", "")
        )
        if tag in self.SKIPPED or (hidden and tag not in self.VOID and tag not in ("body", "html")):
            self.skipping, self.depth = tag, 1
        elif tag in self.BLOCKS:
            item_goes_on = self.kind == "item" and tag in ("p", "div") and not self.text.strip()
            self.flush()
            self.kind = "item" if item_goes_on else self.BLOCKS[tag]
        elif tag == "br":
            self.text += "\n"

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            self.depth -= tag == self.skipping
            if not self.depth:
                self.skipping = ""
        elif tag in self.BLOCKS:
            self.flush()
            self.kind = "paragraph"

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.text += data

    def flush(self) -> None:
        """End the current block."""
        text = to_ascii(self.text)
        self.text = ""
        if self.kind == "code":
            text = textwrap.dedent(text.expandtabs()).strip("\n").rstrip()
        else:
            text = " ".join(text.split())
        if self.kind == "heading":
            text = re.sub(
                r"^((Chapter|Appendix|Section) )?([A-Z]|[0-9]+)((\.[0-9]+)*\.?)(?<!^[A-Z])[ :]\s*", "", text
            )
        if text:
            self.blocks.append(Block(self.kind, text))


def html_blocks(page: str) -> list[Block]:
    """The blocks of an HTML page, or of its main part if that is marked."""
    main = re.search(
        r'<(main|div|section|article)\b[^>]*(role="main"|class="body"|itemprop="articleBody"|id="docs-content"|id="page-content")',
        page,
    )
    parser = _Page()
    parser.feed(page[main.start() :] if main else page)
    parser.close()
    parser.flush()
    return parser.blocks


_ESCAPES: Final = (
    (r"\\\".*", ""),
    (r"\\f(\[[^]]*\]|\(..|.)", ""),
    (r"\\s(\[[^]]*\]|[-+]?\d+|[-+]?'[^']*')", ""),
    (r"\\[mMRFYV](\[[^]]*\]|\(..|.)", ""),
    (r"\\\*\(Aq|\\\(aq|\\\[aq\]", "'"),
    (r"\\\((?:oq|cq)|\\\[(?:oq|cq)\]|\\['`]", "'"),
    (r"\\\*\((?:lq|rq)|\\\*\(L\"|\\\*\(R\"|\\\((?:lq|rq|dq)|\\\[(?:lq|rq|dq)\]|\\\*\(C\+", '"'),
    (r"\\\(em|\\\[em\]|\\\*\(--", "--"),
    (r"\\\(en|\\\[en\]|\\\(hy|\\\(mi|\\-", "-"),
    (r"\\\(bu|\\\[bu\]", "-"),
    (r"\\\(co|\\\[co\]", "(c)"),
    (r"\\\(ti|\\\[ti\]", "~"),
    (r"\\\(ha|\\\[ha\]", "^"),
    (r"\\\((?:rs|bs)|\\\[rs\]|\\e|\\\\", "\\\\"),
    (r"\\\(->|\\\[->\]", "->"),
    (r"\\\(ga|\\\[ga\]", "`"),
    (r"\\[&:%/,|^!{}ducpz)]", ""),
    (r"\\[ ~0]", " "),
    (r"\\[hvwXlLDbonk](['\"])[^'\"]*\1", ""),
    (r"\\\[[^]]*\]|\\\(..|\\\*(\[[^]]*\]|\(..|.)|\\n(\[[^]]*\]|\(..|[-+]?.)", ""),
    (r"\\t", " "),
    (r"\\(.)", r"\1"),
)


def _unescape(line: str) -> str:
    for pattern, plain in _ESCAPES:
        line = re.sub(pattern, plain, line)
    return line


def _arguments(line: str) -> list[str]:
    """The arguments of a macro call; double quotes group words."""
    return [
        quoted.replace('""', '"') if quoted else word
        for quoted, word in re.findall(r'"((?:[^"]|"")*)"?|(\S+)', line)
    ]


def man_blocks(page: str) -> list[Block]:
    """The blocks of a manual page in man(7) format; none for other formats (mdoc) and for references to other pages."""
    blocks: list[Block] = []
    kind, words, in_code, skip_until, tag_next = "paragraph", list[str](), False, "", False

    def flush(then: str = "paragraph") -> None:
        nonlocal kind, words
        text = "\n".join(words).strip("\n") if kind == "code" else " ".join(" ".join(words).split())
        if text.strip():
            blocks.append(Block(kind, to_ascii(text)))
        kind, words = then, []

    _, start, body = page.partition("\n.SH")
    for line in (start + body).splitlines():
        if skip_until:
            skip_until = "" if line.startswith(skip_until) else skip_until
            continue
        if not line.startswith((".", "'")):
            if tag_next and line.strip():
                words.append(_unescape(line))
                tag_next = False
                flush()
            elif in_code or line.strip():
                words.append(_unescape(line))
            else:
                flush()
            continue
        name, _, rest = line[1:].strip().partition(" ")
        if name in ("SH", "SS"):
            flush("heading")
            words = [_unescape(" ".join(_arguments(rest)))]
            flush()
            in_code = False
        elif name in ("PP", "P", "LP", "sp", "HP", "RS", "RE"):
            if in_code and name == "sp":
                words.append("")
            elif not in_code:
                flush()
        elif name in ("TP", "TQ"):
            flush("term")
            tag_next = True
        elif name == "IP":
            flush("term")
            mark = _unescape(_arguments(rest)[0]) if rest.strip() else ""
            words = [] if mark in ("", "-", "*", "o", "\\(bu") or mark.rstrip(".").isdigit() else [mark]
            flush("item" if rest.strip() and not words else "paragraph")
        elif name in ("nf", "EX", "Vb"):
            flush("code")
            in_code = True
        elif name in ("fi", "EE", "Ve"):
            flush()
            in_code = False
        elif name in ("B", "I", "SM", "SB", "R"):
            words.append(_unescape(" ".join(_arguments(rest))))
        elif name in ("BR", "RB", "IR", "RI", "BI", "IB"):
            words.append(_unescape("".join(_arguments(rest))))
        elif name in ("de", "ig", "TS"):
            skip_until = ".." if name != "TS" else ".TE"
        elif name in ("UR", "MT"):
            words.append(_unescape(rest))
        if tag_next and name in ("B", "I", "SM", "SB", "BR", "RB", "IR", "RI", "BI", "IB"):
            tag_next = False
            flush()
    flush()
    return blocks


def description_blocks(description: str) -> list[Block]:
    """The blocks of a package's long description (the lines after its synopsis)."""
    blocks: list[Block] = []
    for part in re.split(r"\n\s*\.\s*(?:\n|$)", description):
        lines = [line[1:] for line in part.split("\n") if line.strip()]
        kind, words = "paragraph", list[str]()
        for line in [*lines, ""]:
            item = re.match(r"\s*[-*+o]\s+(?=\S)", line)
            if item or not line:
                if words:
                    blocks.append(Block(kind, to_ascii(" ".join(" ".join(words).split()))))
                kind, words = "item", [line[item.end() :]] if item else []
            elif line.startswith("  ") and kind == "paragraph":
                kind, words = "paragraph", []
                break  # set verbatim: a table, an example
            else:
                words.append(line)
    return blocks
