"""The page that adds an operator, followed: its files in a copy of the repository, compiled and run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, build, copy_tree, run

PAGE = (ROOT / "docs" / "adding_an_operator.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^\*\*`([\w/.]+)`\*\*\n\n```\w+\n(.*?)```", PAGE, re.M | re.S))
CHANGES = re.findall(r"```diff\n--- (\S+)\n(.*?)```", PAGE, re.S)
ROOMS = ("aufast/reference", "aufast/ops", "csrc/cpu", "csrc/cpu", "kernels", "tests/ops", "benchmarks")


def test_the_page_has_a_file_for_each_room() -> None:
    assert tuple(os.path.dirname(name) for name in FILES) == ROOMS
    assert len(CHANGES) == 4


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_the_lists_are_as_the_page_says(name: str, change: str) -> None:
    assert changed((ROOT / name).read_text(encoding="utf-8"), change)


def changed(text: str, change: str) -> str:
    """The text with the lines of a diff: those of minus must be there, once."""
    old, new = (
        "\n".join(line[1:] for line in change.splitlines() if line.startswith(sign)) for sign in ("-", "+")
    )
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.mark.slow
def test_the_operator_compiles_passes_and_is_timed(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "repository")
    for source in (tree / "csrc/cpu").glob("*.cpp"):
        source.unlink()  # the other operators work through their fallbacks, and need not be compiled
    for folder in ("benchmarks", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name, text in FILES.items():
        (tree / name).write_text(text, encoding="utf-8")
    for name, change in CHANGES:
        (tree / name).write_text(changed((tree / name).read_text(encoding="utf-8"), change), encoding="utf-8")
    done = build(tree, AUFAST_SKIP_CUDA="1")
    assert done.returncode == 0 and "cpu  built: 1 source" in done.stdout, done.stdout

    # An editable install, if there is one, leads to the checkout; the copy comes first, its kernels by name.
    (tree / "aufast/kernels").symlink_to(tree / "kernels")
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    where = run([sys.executable, "-c", "import aufast; print(aufast.__file__)"], tree, PYTHONPATH=str(tree))
    assert Path(where.stdout.strip()) == tree / "aufast/__init__.py", where.stdout
    environment = {"PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    has_triton = importlib.util.find_spec("triton") is not None
    for interpret, expected in (("0", "cpu"), ("1", "cpu triton" if has_triton else "cpu")):
        environment |= {"TRITON_INTERPRET": interpret, "EXPECTED_BACKENDS": expected}
        done = run([*pytest_, "-m", "", "tests/ops/test_attention_pool.py"], tree, **environment)
        assert done.returncode == 0, done.stdout[-6000:]
    environment["TRITON_INTERPRET"] = "0"
    done = run([*pytest_, "benchmarks/attention_pool.py", "--benchmark-disable"], tree, **environment)
    assert done.returncode == 0 and re.search(r"\b6 passed", done.stdout), done.stdout[-6000:]
