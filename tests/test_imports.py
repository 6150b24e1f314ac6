"""Imports run one way, from a room to its own level and lower ones, never higher; functions are short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = (
    ("aus", "files", "labels", "typed"),
    ("reference", "kernels"),
    ("ops",),
    ("nn",),
    ("accelerate", "data", "faces", "models"),
    ("train", "label", "plot"),
    ("demo", "cli"),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("aufast."): path
    for folder in ("aufast", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "aufast" / "__init__.py"
}


def imported(path: Path) -> set[str]:
    """The rooms of aufast that a file imports from, inside functions too, but not for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = []
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("aufast.")}


def test_every_room_has_a_level() -> None:
    rooms = {name.split(".")[0] for name in FILES}
    assert rooms <= LEVEL.keys(), rooms - LEVEL.keys()


@pytest.mark.parametrize("name", FILES)
def test_nothing_lower_imports_anything_higher(name: str) -> None:
    level = LEVEL[name.split(".")[0]]
    higher = {room for room in imported(FILES[name]) if LEVEL.get(room, 0) > level}
    assert not higher, f"{name} imports {', '.join(sorted(higher))}"


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for folder in ("aufast", "kernels", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 70:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []
