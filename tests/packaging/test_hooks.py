"""The build requirement: torch only where the interpreter has none, and never imported."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, run

ASK = """
import sys
import setup
print(setup.get_requires_for_build_wheel(), setup.get_requires_for_build_editable(), sep=";", end=";")
print("torch" in sys.modules)
"""


def answer(text: str) -> tuple[list[str], list[str], bool]:
    wheel, editable, imported = map(ast.literal_eval, text.strip().splitlines()[-1].split(";"))
    return wheel, editable, imported


def test_installed_torch_is_used_under_isolation(only_setuptools: Path) -> None:
    # As pip does it: the interpreter is the user's, a sitecustomize takes its site-packages off the path.
    hide = (
        "import site, sys\nsys.path[:] = [path for path in sys.path if path not in site.getsitepackages()]\n"
    )
    (only_setuptools / "sitecustomize.py").write_text(hide)
    assert run([sys.executable, "-c", "import torch"], ROOT, PYTHONPATH=str(only_setuptools)).returncode != 0
    done = run([sys.executable, "-c", ASK], ROOT, PYTHONPATH=str(only_setuptools))
    assert done.returncode == 0, done.stdout
    assert answer(done.stdout) == ([], [], False)


def test_without_torch_the_build_requires_one(bare_python) -> None:
    assert answer(bare_python(ASK).stdout) == (["torch>=2.11"], ["torch>=2.11"], False)


@pytest.mark.parametrize(
    ("version", "required"),
    [
        ("2.10.1", True),
        ("2.9.0a0+git", True),
        ("2.11.0", False),
        ("2.14.0.dev20261101+cu130", False),
        ("3.0.0", False),
    ],
)
def test_torch_below_the_floor_does_not_count(
    bare_python, tmp_path: Path, version: str, required: bool
) -> None:
    folder = tmp_path / "site"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = None\n")
    wheel, _, _ = answer(bare_python(ASK, folder).stdout)
    assert wheel == (["torch>=2.11"] if required else [])


def test_without_a_compiled_part_no_torch_is_required(bare_python) -> None:
    assert answer(bare_python(ASK, AUFAST_SKIP_EXT="1").stdout)[0] == []


@pytest.mark.parametrize(
    ("line", "cuda"), [("cuda: str | None = '13.0'", "13.0"), ("cuda: str | None = None", None)]
)
def test_torchs_cuda_is_read_from_its_files(bare_python, tmp_path: Path, line: str, cuda: str | None) -> None:
    folder = tmp_path / "site"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: str | None = '6'\n")
    found = bare_python("import build_kernels; print(build_kernels.find_torch())", folder)
    assert found.stdout.strip().endswith(f"version='2.13.0', cuda={cuda!r})"), found.stdout
