"""The two Debian source packages: what can be checked without building them."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vllmlite
from vllmlite.backends.base import API
from vllmlite.cli import COMMANDS, main, serve
from vllmlite.cli.parser import OptionParser
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import EXTRAS
from vllmlite.server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[2]

needs_dpkg = pytest.mark.skipif(
    not (shutil.which("dpkg-source") and shutil.which("git")), reason="needs dpkg-dev and git"
)

CHANGELOG = """\
vllmlite (0.1.0-2) unstable; urgency=medium

  * Mend it. (Closes: #1234567, #7654321)

 -- Some One <some.one@example.org>  Sun, 22 Nov 2026 00:00:00 +0000

vllmlite (0.1.0-1) unstable; urgency=medium

  * Initial release. (Closes: #1000000)

 -- Some One <some.one@example.org>  Sat, 21 Nov 2026 00:00:00 +0000
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(tree: Path, message: str, date: str) -> None:
    run("git", "add", "--all", cwd=tree)
    identity = ("-c", "user.name=Some One", "-c", "user.email=some.one@example.org")
    dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    run("git", *identity, "commit", "-qm", message, cwd=tree, **dates)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real packaging and little else."""
    tree = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "debian", tree / "debian", ignore=shutil.ignore_patterns("generated", ".debhelper")
    )
    (tree / "debian/changelog").write_text(CHANGELOG)
    (tree / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/make-orig", tree / "scripts")
    (tree / "upstream.txt").write_text("upstream\n")
    run("git", "init", "-q", cwd=tree)
    commit(tree, "first", "2026-11-21T00:00:00Z")
    return tree


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_services_options_file_shows_every_default(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    shipped = run(sys.executable, "debian/serverconfig.py", cwd=ROOT, PYTHONPATH=str(ROOT))
    defaults = configurations_of(tmp_path, "")
    assert configurations_of(tmp_path, shipped) == defaults
    assert configurations_of(tmp_path, re.sub(r"^#(?=\S)", "", shipped, flags=re.MULTILINE)) == defaults
    shown = {name.replace("-", "_") for name in re.findall(r"^#([a-z0-9-]+):", shipped, re.MULTILINE)}
    assert shown == set().union(*(config.__dataclass_fields__ for config in defaults))


@needs_dpkg
def test_a_manual_page_shows_what_help_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(sys.executable, "debian/manpages.py", str(tmp_path), cwd=ROOT, PYTHONPATH=str(ROOT))
    pages = {path.stem: re.sub(r"\\f[BIR]|\\(?=-)", "", path.read_text()) for path in tmp_path.iterdir()}
    listed = re.findall(r"see (vllmlite-[a-z-]+)\(1\)", pages.pop("vllmlite"))
    assert (
        sorted(listed) == sorted(pages) == sorted(f"vllmlite-{name.replace(' ', '-')}" for name in COMMANDS)
    )
    for name in COMMANDS:
        assert main([*name.split(), "--help"]) == 0
        said, page = capsys.readouterr().out, pages[f"vllmlite-{name.replace(' ', '-')}"]
        (usage,) = re.findall(r"^usage: (.*)$", said, re.MULTILINE)
        assert f".SH SYNOPSIS\n{usage}\n" in page
        options = r"(?<!\S)--?[a-z][\w-]*"
        assert {*re.findall(options, said)} == {*re.findall(options, page)}


def configurations_of(directory: Path, content: str) -> tuple[EngineConfig, ServerConfig]:
    """The configurations that ``serve --config`` reads from a file."""
    file = directory / "server.yaml"
    file.write_text(content)
    parser = OptionParser()
    serve.add_arguments(parser)
    return serve.configurations(parser.parse(["--config", str(file)]))


def test_the_services_stop_timeout_covers_the_programs() -> None:
    pytest.importorskip("uvicorn")
    from vllmlite.server.run import CLOSING_SECONDS

    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", text("debian/systemd-unit"), re.MULTILINE)
    engine = 10
    assert int(seconds) >= ServerConfig().shutdown_timeout + CLOSING_SECONDS + engine


def test_the_changelog_has_the_programs_version() -> None:
    assert re.match(rf"vllmlite \({re.escape(vllmlite.__version__)}-", text("debian/changelog"))


def test_the_interface_version_is_the_same_everywhere() -> None:
    assert re.findall(r"kInterfaceVersion = (\d+);", text("csrc/contract/bind.hpp")) == [str(API)]
    show = ("--eval", "show: ; @echo $(API)", "show")
    assert run("make", "-sf", "debian/rules", *show, cwd=ROOT).split() == [str(API)]
    for control in ("debian/control", "debian/control.cuda"):
        versions = re.findall(r"vllmlite-\w+-api-(\S+?)[ ,]", text(control))
        assert versions and {*versions} == {"${vllmlite:API}"}


def test_nothing_that_brings_torch_is_recommended() -> None:
    control = (ROOT / "debian/control").read_text()
    for field in re.findall(r"^(?:Pre-Depends|Recommends):\n((?: .*\n)+)", control, re.MULTILINE):
        assert not re.search(r"torch|transformers|xgrammar", field), field
    depends = re.findall(r"^Depends:\n((?: .*\n)+)", control, re.MULTILINE)
    needing_torch = [
        line for field in depends for line in field.splitlines() if re.search("torch|xgrammar", line)
    ]
    assert all("vllmlite-cpu-api" in line for line in needing_torch) and needing_torch


def test_packages_that_demo_and_test_install_are_pinned() -> None:
    pinned = set(re.findall(r"^([\w-]+)==\S+( ;.*)?$", text("scripts/constraints.txt"), re.MULTILINE))
    shell = (
        '. scripts/venv.sh; printf "%s\n" "$TORCH" "${RUN_NEEDS[@]}" "${TEST_NEEDS[@]}" "${ALONE_NEEDS[@]}"'
    )
    needs = run("bash", "-c", shell, cwd=ROOT).split()
    assert {need.partition("==")[0].lower() for need in needs} <= {name for name, _ in pinned}


def test_pip_extras_match_the_demo_and_error_messages() -> None:
    (call,) = (
        node
        for node in ast.walk(ast.parse(text("setup.py")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setup"
    )
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    needs = run("bash", "-c", '. scripts/venv.sh; echo "${RUN_NEEDS[@]}"', cwd=ROOT).split()
    assert sorted(needs) == ast.literal_eval(arguments["install_requires"])
    extras = ast.literal_eval(arguments["extras_require"])
    assert extras == {
        extra: [name.replace("_", "-") for name in modules] for extra, modules in EXTRAS.items()
    }


@pytest.mark.parametrize("file", sorted((ROOT / "csrc").glob("**/*.cu*")), ids=lambda file: file.name)
def test_two_builds_of_cuda_code_are_the_same(file: Path) -> None:
    assert "namespace {" not in file.read_text(encoding="utf-8"), (
        "nvcc names it after the path that it builds in"
    )


@needs_dpkg
def test_the_orig_tarball_depends_on_upstream_alone(checkout: Path, tmp_path: Path) -> None:
    orig = Path(run("scripts/make-orig", str(tmp_path), cwd=checkout).strip())
    before = orig.read_bytes()
    (checkout / "debian/new").write_text("packaging\n")
    commit(checkout, "packaging", "2026-11-23T00:00:00Z")
    run("scripts/make-orig", str(tmp_path), cwd=checkout)
    assert orig.read_bytes() == before
    names = run("tar", "-tf", str(orig), cwd=tmp_path).split()
    assert names == [
        f"vllmlite-0.1.0/{name}" for name in ("", "scripts/", "scripts/make-orig", "upstream.txt")
    ]


@needs_dpkg
def test_cudabuild_makes_the_other_source_and_leaves_the_checkout_alone(
    checkout: Path, tmp_path: Path
) -> None:
    area = tmp_path / "area"
    run("debian/cudabuild.sh", str(area), cwd=checkout)
    assert run("git", "status", "--porcelain", "--ignored", cwd=checkout) == ""

    origs = [(area / f"{name}_0.1.0.orig.tar.xz").read_bytes() for name in ("vllmlite", "vllmlite-cuda")]
    assert origs[0] == origs[1]
    run("dpkg-source", "--extract", "vllmlite-cuda_0.1.0-2.dsc", "out", cwd=area)
    out = area / "out" / "debian"
    assert (out / "control").read_text() == text("debian/control.cuda")
    assert (out / "tests/control").read_text() == text("debian/tests/control.cuda")
    assert [path.name for path in out.glob("*vllmlite*-*")] == ["python3-vllmlite-cuda.install"]
    top, _, rest = (out / "changelog").read_text().partition("\n\nvllmlite ")
    assert top.startswith("vllmlite-cuda (0.1.0-2)")
    assert "Mend it.\n" in top
    assert "Closes" not in top
    assert rest == CHANGELOG.partition("\n\nvllmlite ")[2]


@needs_dpkg
def test_the_cuda_variant_without_nvcc_is_one_error_and_can_still_be_cleaned(checkout: Path) -> None:
    shutil.copy(checkout / "debian/control.cuda", checkout / "debian/control")
    path = ":".join(d for d in os.environ["PATH"].split(":") if not (Path(d) / "nvcc").exists())
    if not shutil.which("dpkg-architecture", path=path):
        pytest.skip("nvcc and the packaging tools share a directory")
    rules = ["make", "-f", "debian/rules"]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        [*rules, "-s", "override_dh_auto_configure-arch"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error:" in line] == [
        "error: debian/control names python3-vllmlite-cuda, but nvcc is not on the PATH (nvidia-cuda-toolkit-gcc)"
    ]
    subprocess.run([*rules, "--dry-run", "clean"], cwd=checkout, env=environment, check=True)


@needs_dpkg
@pytest.mark.parametrize("nvcc", [False, True])
def test_the_cpu_variant_does_not_look_for_nvcc(checkout: Path, tmp_path: Path, nvcc: bool) -> None:
    if nvcc:
        (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "nvcc").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    plan = run(
        "make", "-f", "debian/rules", "--dry-run", "override_dh_auto_configure-arch", cwd=checkout, PATH=path
    )
    assert "-DVLLMLITE_CPU=ON" in plan
    assert "CUDA" not in plan
    assert "nvcc" not in plan
