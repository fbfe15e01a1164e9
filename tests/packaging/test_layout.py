"""How the source files depend on one another."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """Names of those of ``modules`` that ``source`` imports anywhere, for type checking alone included."""
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
    """Return the modules of a cycle of imports among the files of ``package``, the first one again at the end."""
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
