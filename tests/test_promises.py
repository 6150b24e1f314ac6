"""The pages of promises: every test they name exists, every case is there, every recorded file is."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path

import pytest

from benchmarks.bars import BACKENDS
from benchmarks.table import by_run

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


def test_every_promise_leads_to_what_holds_it() -> None:
    section = PAGES["README.md"].split("## What it promises")[1].split("\n## ")[0]
    promises = re.split(r"^- ", section, flags=re.M)[1:]
    assert len(promises) >= 7
    for promise in promises:
        assert re.search(r"\]\((tests/|docs/|SECURITY\.md)", promise), promise


# The rows of README's table of speed, in the words of the records.
MEASURED = {
    "`roi_crop`, 16 maps 128×24×24, 24 boxes": ("roi_crop", "layer2-nchw"),
    "`graph_gru`, one clip of 48 frames": ("graph_gru", "B1"),
    "`graph_gru`, eight clips": ("graph_gru", "B8"),
    "`graph_conv`, 768 frames": ("graph_conv", "batch768"),
    "`region_conv`, 64 patches of 22×22": ("region_conv", "8x8"),
}


def is_rounded(shown: str, value: float) -> bool:
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5001 * 10**-digits


def test_the_speeds_are_those_of_the_record_that_is_named() -> None:
    section = PAGES["README.md"].split("## How fast")[1].split("\n## ")[0]
    (name,) = re.findall(r"\]\((benchmarks/results/[\w-]+\.json)\)", section)
    record = by_run(json.loads((ROOT / name).read_text(encoding="utf-8")))
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in section.splitlines() if "`, " in row]
    assert {row[0] for row in rows} == MEASURED.keys()
    for case, *cells in rows:
        for pass_, shown in (("fwd", cells[:3]), ("fwd+bwd", cells[3:])):
            found = record[(*MEASURED[case], pass_, "float32")]
            times = {provider: result["median"] for provider, result in found.items()}
            peers = [
                time for provider, time in times.items() if provider not in (*BACKENDS["cpu"], "reference")
            ]
            expected = (1e3 * times["cpu"], times["reference"] / times["cpu"], min(peers) / times["cpu"])
            assert all(
                is_rounded(text.removesuffix(" ms"), x) for text, x in zip(shown, expected, strict=True)
            ), case


def test_nothing_asks_for_the_time_of_day() -> None:
    """Time is measured with clocks that never go back."""
    for folder in ("aufast", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\btime\.time\(|\bdatetime\b|\bgmtime\(|\blocaltime\(", text), path
