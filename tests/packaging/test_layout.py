"""Source files import one another without a cycle, and share code instead of repeating it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_REPEATED = 8
"""Lines of an identical run that may stand in two places."""


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """The names in ``modules`` that ``source`` imports, also those for type checking only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, "relative imports are not followed here"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in modules:
                    yield submodule
                elif node.module in modules:
                    yield node.module


def import_cycle(root: Path, package: str) -> list[str]:
    """Return the modules of an import cycle among the files of ``package``, with the first repeated at the end."""
    modules = {module_name(path, root): path for path in (root / package).rglob("*.py")}
    graph = {
        name: set(imported(path.read_text(encoding="utf-8"), modules)) - {name}
        for name, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def test_no_files_import_one_another() -> None:
    assert import_cycle(ROOT, "vllmlite") == []


@pytest.mark.parametrize(
    "line",
    [
        "from p.b import B",
        "from p import b",
        "import p.b",
        "def f():\n    from p.b import B",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B",
    ],
)
def test_a_cycle_of_imports_is_found(line: str, tmp_path: Path) -> None:
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text(line)
    (package / "b.py").write_text("from p.a import A")
    assert set(import_cycle(tmp_path, "p")) == {"p.a", "p.b"}


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Number and stripped text of the lines of a file that are neither blank nor imports."""
    text = path.read_text(encoding="utf-8")
    imports: set[int] = set()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imports.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and number not in imports and not line.startswith("#include")
    ]


def repeated_runs(paths: Iterable[Path]) -> list[list[str]]:
    """Return the places, as ``file:line``, of each run of more than :data:`MOST_REPEATED` identical lines."""
    places: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in paths:
        lines = code_lines(path)
        for first in range(len(lines) - MOST_REPEATED):
            run = tuple(text for _, text in lines[first : first + MOST_REPEATED + 1])
            places[run].append(f"{path}:{lines[first][0]}")
    return [found for found in places.values() if len(found) > 1]


def test_no_long_run_of_lines_stands_twice() -> None:
    sources = [path for folder in ("vllmlite", "csrc") for path in sorted((ROOT / folder).rglob("*"))]
    code = [path for path in sources if path.suffix in (".py", ".cpp", ".hpp", ".cu", ".cuh")]
    assert len(code) > 100
    assert repeated_runs(code) == []


@pytest.mark.parametrize(("lines", "found"), [(8, 0), (9, 1), (10, 2)])
def test_a_repeated_run_is_found(lines: int, found: int, tmp_path: Path) -> None:
    """Indentation, blank lines and imports do not hide a repetition."""
    run = [f"x = {n}" for n in range(lines)]
    (tmp_path / "a.py").write_text("\n".join(["first = 1", *run, "last = 1"]))
    indented = [f"    {line}" for line in run]
    body = "\n\n".join(["def f():", *indented[:4], "    import os", *indented[4:]])
    (tmp_path / "b.py").write_text(body)
    places = repeated_runs([tmp_path / "a.py", tmp_path / "b.py"])
    assert len(places) == found
    assert not found or places[0] == [f"{tmp_path}/a.py:2", f"{tmp_path}/b.py:3"]


def test_a_token_passes_through_few_files() -> None:
    """The README lists the files, and each of them exists."""
    section = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("### Follow a token")[2]
        .partition("\n## ")[0]
    )
    files = re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE)
    assert 10 <= len(files) <= 15
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_script_is_explained() -> None:
    readme = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in readme.splitlines() if line.startswith("| `")]
    named = [name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)]
    there = {path.name for path in (ROOT / "scripts").iterdir()} - {"README.md", "__pycache__"}
    assert sorted(named) == sorted(there)


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by these names, and fails if a whole run finds one twice."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
