"""The packages of the corpus, and the licences under which text may enter it.

There are two ways in. A *manual* (`MANUALS`) is a package whose documentation is used by name: the table states its
licence and quotes the words of its copyright file that grant it, and the quote is checked whenever the corpus is built.
Any other package enters with its description, manual pages and HTML pages, but only if *every* licence in its
machine-readable copyright file is on the allow-list (`cleared_licences`).
"""

import re
from dataclasses import dataclass
from typing import Final

ALLOWED: Final = frozenset(
    """0bsd apache-2.0 artistic-2.0 bsd-1-clause bsd-2-clause bsd-3-clause cc0-1.0 expat fsful fsfullr
    gpl-1+ gpl-2+ gpl-3+ isc lgpl-2+ lgpl-2.1+ lgpl-3+ mit mit-0 postgresql psf-2 public-domain unlicense wtfpl x11
    zlib""".split()
)
"""Licences of text that may enter, by their short names; all of them may be combined under GPL-3+."""

RESULT: Final = "GPL-3+"
"""The strictest of these licences, and so that of the weights."""


@dataclass(frozen=True, slots=True)
class Manual:
    """A package whose documentation is used by name, under `licence`, as granted by `quote` in its copyright file.

    `pages` are globs (whose `*` also matches `/`) of the package's files, `title` is the book's usual name, and
    `repeat` says how often an epoch shows its text. Text with `about_debian` makes up most of the second stage.
    """

    package: str
    title: str
    licence: str
    quote: str
    pages: tuple[str, ...]
    repeat: int = 1

    @property
    def about_debian(self) -> bool:
        """Whether the book is about Debian, and not about one of its programs."""
        return self.repeat > 1


_DOC: Final = "usr/share/doc/"
_MAN: Final = "usr/share/man/"
_OR_LATER: Final = "either version 2 of the License, or (at your option) any later version"

MANUALS: Final = (
    Manual(
        "apache2-doc",
        "the Apache manual",
        "Apache-2.0",
        "License: Apache-2.0",
        (_DOC + "apache2-doc/manual/en/*.html",),
    ),
    Manual(
        "apt",
        "APT",
        "GPL-2+",
        "We believe that this was not meant to exclude later versions",
        (_MAN + "man[58]/apt*",),
        2,
    ),
    Manual(
        "apt-doc",
        "the APT User's Guide",
        "GPL-2+",
        "the overall license statement for the project has always been GPL-2+",
        (_DOC + "apt-doc/guide.html/*.html", _DOC + "apt-doc/offline.html/*.html"),
        2,
    ),
    Manual(
        "aptitude-doc-en", "the aptitude manual", "GPL-2+", _OR_LATER, (_DOC + "aptitude/html/en/*.html",), 2
    ),
    Manual(
        "debian-edu-doc-en",
        "the Debian Edu manual",
        "GPL-2+",
        "License: GPL-2+",
        (_DOC + "debian-edu-doc-en/debian-edu-trixie-manual.html",),
        2,
    ),
    Manual(
        "debian-handbook",
        "the Debian Administrator's Handbook",
        "GPL-2+",
        _OR_LATER,
        (_DOC + "debian-handbook/html/en-US/*.html",),
        2,
    ),
    Manual(
        "debian-history",
        "A Brief History of Debian",
        "GPL-2+",
        "either version 2 of the License, or (at your option) any",
        (_DOC + "debian-history/docs/*.en.html",),
        2,
    ),
    Manual(
        "debian-kernel-handbook",
        "the Debian Kernel Handbook",
        "GPL-2+",
        _OR_LATER,
        (_DOC + "debian-kernel-handbook/kernel-handbook.html/*.html",),
        2,
    ),
    Manual(
        "debian-policy",
        "Debian Policy",
        "GPL-2+",
        "License: GPL-2+",
        (_DOC + "debian-policy/policy.html/*.html",),
        2,
    ),
    Manual(
        "debian-reference-en",
        "the Debian Reference",
        "GPL-2+",
        "version 2 or higher",
        (_DOC + "debian-reference-common/docs/*.en.html",),
        2,
    ),
    Manual(
        "debmake-doc",
        "the Guide for Debian Maintainers",
        "Expat",
        "License:   Expat",
        (_DOC + "debmake-doc/html/*.en.html",),
        2,
    ),
    Manual(
        "developers-reference",
        "the Developer's Reference",
        "GPL-2+",
        "either version 2, or (at your option) any later version",
        ("usr/share/developers-reference/*.html",),
        2,
    ),
    Manual(
        "exim4-doc-html",
        "the Exim specification",
        "GPL-2+",
        "GPL v2+",
        (_DOC + "exim4-doc-html/spec_html/ch-*.html",),
    ),
    Manual(
        "harden-doc",
        "the Securing Debian Manual",
        "GPL-2+",
        _OR_LATER,
        (_DOC + "harden-doc/html/en-US/*.html",),
        2,
    ),
    Manual("lintian-doc", "Lintian", "GPL-2+", "License: GPL-2+", (_DOC + "lintian-doc/html/tags/*.html",)),
    Manual(
        "live-manual-html",
        "the Live Systems Manual",
        "GPL-3+",
        "either version 3 of the License, or (at your option)",
        (_DOC + "live-manual/html/live-manual/*.en.html",),
        2,
    ),
    Manual(
        "perl-doc",
        "the Perl documentation",
        "GPL-1+ or Artistic",
        "License: GPL-1+ or Artistic",
        (_MAN + "man1/perl*",),
    ),
    Manual(
        "postgresql-doc-18",
        "the PostgreSQL documentation",
        "PostgreSQL",
        "License: PostgreSQL",
        (_DOC + "postgresql-doc-18/html/[!r]*.html",),
    ),
    Manual(
        "python-django-doc",
        "the Django documentation",
        "BSD-3-clause",
        "License: BSD-3-Clause",
        (_DOC + "python-django-doc/html/[!r]*.html", _DOC + "python-django-doc/html/ref/*.html"),
    ),
    Manual(
        "python3.14-doc",
        "the Python documentation",
        "PSF-2",
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
        tuple(
            _DOC + f"python3.14/html/{part}/*.html"
            for part in ("tutorial", "faq", "howto", "using", "library", "reference")
        ),
    ),
    Manual(
        "rust-doc",
        "the Rust book",
        "MIT or Apache-2.0",
        "License: MIT or Apache-2.0",
        (_DOC + "rust-doc/html/book/*.html",),
    ),
    Manual(
        "sqlite3-doc",
        "the SQLite documentation",
        "public-domain",
        "License: public-domain",
        (_DOC + "sqlite3/*.html",),
    ),
    Manual("systemd", "systemd", "LGPL-2.1+", "License: LGPL-2.1+", (_MAN + "man[1578]/*",), 2),
    Manual("udev", "udev", "LGPL-2.1+", "License: LGPL-2.1+", (_MAN + "man[578]/*",)),
    Manual("ant-doc", "the Ant manual", "Apache-2.0", "License: Apache-2.0", (_DOC + "ant/manual/*.html",)),
    Manual(
        "cmake-doc",
        "the CMake documentation",
        "BSD-3-clause",
        "License: BSD-3-clause",
        (
            _DOC + "cmake/html/manual/*.html",
            _DOC + "cmake/html/guide/*.html",
            _DOC + "cmake/html/command/*.html",
        ),
    ),
    Manual(
        "cinder-doc",
        "the Cinder documentation",
        "Apache-2.0",
        "License: Apache-2",
        (_DOC + "cinder-doc/html/admin/*.html",),
    ),
    Manual(
        "docutils-doc",
        "the Docutils documentation",
        "public-domain",
        "License: public-domain",
        (_DOC + "docutils-doc/docs/user/*.html", _DOC + "docutils-doc/docs/ref/*.html"),
    ),
    Manual(
        "erlang-doc",
        "the Erlang documentation",
        "Apache-2.0",
        "License: Apache-2.0",
        (_DOC + "erlang-doc/doc/*.html",),
    ),
    Manual(
        "ghc-doc",
        "the GHC User's Guide",
        "BSD-3-clause",
        "License: BSD-3-clause",
        (_DOC + "ghc-doc/html/users_guide/*.html",),
    ),
    Manual(
        "keystone-doc",
        "the Keystone documentation",
        "Apache-2.0",
        "License: Apache-2",
        (_DOC + "keystone-doc/html/admin/*.html", _DOC + "keystone-doc/html/user/*.html"),
    ),
    Manual(
        "knot-doc", "the Knot DNS documentation", "GPL-2+", "License: GPL-2+", (_DOC + "knot-doc/*.html",)
    ),
    Manual(
        "neutron-doc",
        "the Neutron documentation",
        "Apache-2.0",
        "License: Apache-2.0",
        (_DOC + "neutron-doc/html/admin/*.html",),
    ),
    Manual(
        "nova-doc",
        "the Nova documentation",
        "Apache-2.0",
        "License: Apache-2",
        (
            _DOC + "nova-doc/html/admin/*.html",
            _DOC + "nova-doc/html/user/*.html",
            _DOC + "nova-doc/html/reference/*.html",
        ),
    ),
    Manual(
        "python-scrapy-doc",
        "the Scrapy documentation",
        "BSD-3-clause",
        "License: BSD-3-clause",
        (_DOC + "python-scrapy-doc/html/topics/*.html", _DOC + "python-scrapy-doc/html/intro/*.html"),
    ),
    Manual(
        "python-setuptools-doc",
        "the Setuptools documentation",
        "Expat",
        "with a MIT license",
        (_DOC + "python-setuptools-doc/html/userguide/*.html",),
    ),
    Manual(
        "python-sqlalchemy-doc",
        "the SQLAlchemy documentation",
        "Expat",
        "License: Expat",
        (_DOC + "python-sqlalchemy-doc/html/orm/*.html", _DOC + "python-sqlalchemy-doc/html/core/*.html"),
    ),
    Manual(
        "sphinx-doc",
        "the Sphinx documentation",
        "BSD-2-clause",
        "License: BSD-2-clause",
        (_DOC + "sphinx-doc/html/usage/*.html", _DOC + "sphinx-doc/html/tutorial/*.html"),
    ),
    Manual(
        "swift-doc",
        "the Swift documentation",
        "Apache-2.0",
        "License: Apache-2",
        (_DOC + "swift-doc/base/*.html",),
    ),
    Manual(
        "tomcat11-docs",
        "the Tomcat documentation",
        "Apache-2.0",
        "License: Apache-2.0",
        ("usr/share/tomcat11-docs/docs/[!c]*.html",),
    ),
    Manual(
        "twisted-doc",
        "the Twisted documentation",
        "Expat",
        "License: Expat",
        (
            _DOC + "twisted-doc/html/core/*.html",
            _DOC + "twisted-doc/html/web/*.html",
            _DOC + "twisted-doc/html/names/*.html",
        ),
    ),
    Manual(
        "wireshark-doc",
        "the Wireshark User's Guide",
        "GPL-2+",
        "License: GPL-2+",
        (_DOC + "wireshark/wsug_html_chunked/*.html",),
    ),
    Manual(
        "clang-19-doc",
        "the Clang documentation",
        "Apache-2.0",
        "License: APACHE-2-LLVM-EXCEPTIONS",
        (_DOC + "clang-19/html/*.html",),
    ),
    Manual("grass-doc", "the GRASS manual", "GPL-2+", "License: GPL-2+", (_DOC + "grass-doc/html/*.html",)),
    Manual(
        "libvirt-doc",
        "the libvirt documentation",
        "LGPL-2.1+",
        "License: LGPL-2.1+",
        (_DOC + "libvirt-doc/html/*.html",),
    ),
    Manual(
        "openvswitch-doc",
        "the Open vSwitch documentation",
        "Apache-2.0",
        "License: Apache-2.0",
        (_DOC + "openvswitch-doc/html/*.html",),
    ),
    Manual(
        "python-numpy-doc",
        "the NumPy guide",
        "BSD-3-clause",
        "License: BSD-3-Clause",
        (_DOC + "python-numpy/html/user/*.html",),
    ),
    Manual(
        "python-pandas-doc",
        "the pandas guide",
        "BSD-3-clause",
        "License: BSD-3",
        (_DOC + "python-pandas-doc/html/user_guide/*.html",),
    ),
    Manual(
        "python-scipy-doc",
        "the SciPy tutorial",
        "BSD-3-clause",
        "License: BSD-3-clause",
        (_DOC + "python-scipy-doc/html/tutorial/*.html",),
    ),
    Manual(
        "python-sklearn-doc",
        "the scikit-learn guide",
        "BSD-3-clause",
        "License: BSD-3-Clause",
        (_DOC + "python-sklearn-doc/html/modules/[a-z]*.html",),
    ),
    Manual(
        "slurm-wlm-doc",
        "the Slurm documentation",
        "GPL-2+",
        "License: GPL-2+ with OpenSSL exception",
        (_DOC + "slurm-wlm/html/*.html",),
    ),
)

_DULL: Final = re.compile(
    r"/(_\w+|api|generated|releases?|release_?notes|relnotes|whats_?new|changelogs?|announce|auto_examples|gallery|history)/|"
    r"/(genindex|py-modindex|search|changes|changelog|news|releases?|rel-?notes?|openapi)[^/]*$|[-_]api[-_.]"
)


def is_page(name: str) -> bool:
    """Whether a file is an English page of documentation, not an index, a changelog or an API reference."""
    return bool(
        re.fullmatch(r"usr/share/doc/.+(?<!\.[a-z][a-z])(?<!\.[a-z][a-z][-_][a-zA-Z][a-zA-Z])\.html", name)
    ) and not _DULL.search(name)


def canonical(name: str) -> str:
    """The canonical short name of a licence: `GPL-2.0-or-later` and `gpl-2+ with OpenSSL exception` become `gpl-2+`."""
    name = name.strip(" ().").lower().replace("-or-later", "+").replace("public_domain", "public-domain")
    name = re.sub(r"[ ~-]+with[ -].*exception$", "", name)  # an exception only grants more
    return re.sub(r"(?<=gpl-[123])\.0|(?<=^apache-2)$", lambda found: "" if found[0] else ".0", name)


def is_allowed(expression: str) -> bool:
    """Whether a licence expression (`A and B`, `A or B`) is on the allow-list: all terms of an "and", one of an
    "or"."""
    return all(
        any(canonical(choice) in ALLOWED for choice in re.split(r"\s+or\s+|\s*/\s*", part, flags=re.I))
        for part in re.split(r"\s*,?\s+and\s+|\s*,\s*", expression, flags=re.I)
    )


def cleared_licences(copyright_file: str) -> tuple[str, ...] | None:
    """The licences of the files in a machine-readable copyright file.

    None if one of them, or of the licences that it merely quotes, is not allowed, or if the file has another form.
    """
    if "copyright-format" not in copyright_file[:400]:
        return None
    given: set[str] = set()
    for stanza in re.split(r"\n\s*\n", copyright_file):
        found = re.search(r"^License:[ \t]*(.*)$", stanza, re.M | re.I)
        if found is None:
            continue
        licence = " ".join(found[1].split())
        for_files = re.search(r"^Files:", stanza, re.M | re.I)
        if not is_allowed(licence) and (for_files or canonical(licence) not in _QUOTED):
            return None
        if for_files:
            given.add(licence)
    return tuple(sorted(given)) or None


_QUOTED: Final = frozenset("artistic artistic-1 artistic-1.0 perl".split())
"""Licences that may appear as one choice, as in `Artistic or GPL-1+`, but do not suffice alone."""
