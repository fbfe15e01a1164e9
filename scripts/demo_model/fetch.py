"""Downloading the corpus's packages from a Debian mirror, with apt in a scratch directory, without root."""

import fnmatch
import gzip
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .sources import MANUALS, is_page

PACKAGES: Final = Path(__file__).with_name("packages.txt")
_KEPT: Final = re.compile(r"usr/share/(doc/[^/]+/copyright|man/man[1578]/.+)")


def wanted() -> list[str]:
    """The packages of the corpus, sorted: the manuals and those in `packages.txt`."""
    return sorted({manual.package for manual in MANUALS} | set(PACKAGES.read_text("ascii").split()))


def configured_mirror() -> str:
    """The first Debian archive in this machine's apt configuration."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(COMPONENT)", "Created-By: Packages"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.splitlines()
    mirrors = [line.split()[0] for line in listed if line.endswith(" Debian main") and "security" not in line]
    if not mirrors:
        raise SystemExit("apt knows no Debian mirror; name one with --mirror URL")
    return mirrors[0]


def fetch(directory: Path, mirror: str, suite: str = "sid") -> Path:
    """Download the packages, unpack the parts that the corpus needs, and return the root to build it from. This takes
    less than 1 GB and some minutes. A snapshot mirror, with a date in its address, gives exactly a manifest's versions.
    """
    apt, debs, root = (directory / name for name in ("apt", "debs", "root"))
    for folder in (apt / "lists/partial", apt / "cache/archives/partial", debs, root / "var/lib/dpkg/info"):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text(f"deb [check-valid-until=no] {mirror} {suite} main\n")
    (apt / "status").touch()
    options = [
        f"-oDir::Etc::SourceList={apt}/sources.list", "-oDir::Etc::SourceParts=-", f"-oDir::State::Lists={apt}/lists",
        f"-oDir::State::status={apt}/status", f"-oDir::Cache={apt}/cache", "-oAcquire::Languages=none",
        "-oAPT::Architecture=amd64", "-oAPT::Architectures=amd64", "-oAPT::Sandbox::User=root",
        "-oAPT::Update::Post-Invoke-Success=",
    ]  # fmt: skip
    subprocess.run(["apt-get", *options, "update"], check=True)
    subprocess.run(["apt-get", *options, "download", *wanted()], cwd=debs, check=True)
    release = next((apt / "lists").glob("*InRelease")).read_text("utf-8", "replace")
    (root / "snapshot").write_text(re.findall(r"^Date: (.*)$", release, re.M)[0] + "\n")
    stanzas = [_unpack(deb, root) for deb in sorted(debs.glob("*.deb"))]
    (root / "var/lib/dpkg/status").write_text("\n".join(stanzas), "utf-8")
    return root


def _unpack(deb: Path, root: Path) -> str:
    """Unpack the parts of a package that the corpus needs, and return the package's stanza for dpkg's status file."""
    control = subprocess.run(
        ["dpkg-deb", "--field", deb], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    package = re.findall(r"^Package: (\S+)$", control, re.M)[0]
    pages = [page for manual in MANUALS if manual.package == package for page in manual.pages]
    kept: list[str] = []
    unpacked = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
    with unpacked, tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            page = any(fnmatch.fnmatch(name, page) for page in pages) if pages else is_page(name)
            if member.isdir() or not (page or _KEPT.fullmatch(name)):
                continue
            kept.append(f"/{name}\n")
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if member.issym():
                target.symlink_to(member.linkname)
            elif (source := archive.extractfile(member)) is not None:
                with target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    (root / f"var/lib/dpkg/info/{package}.list").write_text("".join(kept), "utf-8")
    return control.replace("\n", "\nStatus: install ok installed\n", 1)


def read_text(path: Path) -> str:
    """The contents of a text file, decompressed if necessary."""
    packed = path.read_bytes()
    return (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8", "replace")


def installed(root: Path) -> Iterator[dict[str, str]]:
    """The control fields of every package installed below `root`, sorted by name."""
    stanzas = (root / "var/lib/dpkg/status").read_text("utf-8").split("\n\n")
    fields = [
        dict(re.findall(r"^([A-Za-z0-9-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.M)) for stanza in stanzas
    ]
    present = (entry for entry in fields if entry.get("Status", "").endswith(" installed"))
    yield from sorted(present, key=lambda entry: entry["Package"])
