"""The pages of promises: every test they name exists, every case is there, every recorded file is."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/traps.md", "docs/bad_input.md")
}
NAMED = sorted({found for text in PAGES.values() for found in re.findall(r"tests/[\w/]+\.py::\w+", text)})


@functools.cache
def defined_in(path: Path) -> frozenset[str]:
    """The test functions that a file defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("name", NAMED)
def test_a_named_test_exists(name: str) -> None:
    path, _, function = name.partition("::")
    assert (ROOT / path).is_file(), path
    assert function.startswith("test_") and function in defined_in(ROOT / path)


def test_every_row_names_a_test() -> None:
    for page in ("docs/traps.md", "docs/bad_input.md"):
        rows = re.findall(r"^\| (?!case|given|trap).*\|$", PAGES[page], re.M)
        assert len(rows) > 30
        assert [row for row in rows if "tests/" not in row] == []
        assert [row for row in rows if re.search(r"\|\s*\|", row)] == [], "a cell is empty"


def test_every_case_says_what_happened_before_and_now() -> None:
    heads = re.findall(r"^\|.* test \|$", PAGES["docs/bad_input.md"], re.M)
    ours = [head for head in heads if not head.startswith(("| case |", "| given |"))]
    assert len(heads) == 6 and not ours and all("| before | now |" in head for head in heads)


def test_every_case_has_its_place() -> None:
    page = PAGES["docs/bad_input.md"]
    assert set(map(int, re.findall(r"^\| (\d+) \|", page, re.M))) >= set(range(1, 82))
    first, last = map(int, re.search(r"## Cases (\d+) to (\d+): images", page).groups())
    assert (first, last) == (1, 47) and "## Case 82" in page


def test_nothing_asks_for_the_time_of_day() -> None:
    """Time is measured with clocks that never go back."""
    for folder in ("aufast", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\btime\.time\(|\bdatetime\b|\bgmtime\(|\blocaltime\(", text), path
