"""Small source trees to build, so that no test touches the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

import build_kernels

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = (
    "AUFAST_SKIP_EXT",
    "AUFAST_SKIP_CUDA",
    "AUFAST_SANITIZE",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
)
SWITCHES += (
    "AUFAST_TEST_TORCH",
    "AUFAST_TEST_WHEEL",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "NVCC_FLAGS",
    "DEBUG",
    "PYTHONPATH",
)

HEADER = "#pragma once\n#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/ops.h>\n"
OPERATOR = """
#include "common.h"
torch::stable::Tensor NAME(const torch::stable::Tensor& x) { return torch::stable::empty_like(x); }
STABLE_TORCH_LIBRARY_IMPL(aufast_test, CPU, library) { library.impl("NAME", TORCH_BOX(&NAME)); }
"""


def run(command: list[str | Path], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with only these of the build's switches set; `stdout` gets stderr too."""
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES} | variables
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )


def build(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, **variables)


def nvcc_missing() -> str:
    """Why the build finds no nvcc here, else nothing."""
    try:
        build_kernels.find_nvcc()
    except build_kernels.Unavailable as reason:
        return str(reason)
    return ""


needs_nvcc = pytest.mark.skipif(bool(nvcc_missing()), reason=nvcc_missing())


def copy_tree(target: Path) -> Path:
    """The sources as they are in a fresh clone, without what was built."""
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for folder in ("aufast", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, target / folder, ignore=built)
    for name in ("setup.py", "build_kernels.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture
def full_tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path / "aufast-source")


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """setup.py over two small operators of one header, in a folder whose name holds a space."""
    tree = tmp_path / "a folder"
    for folder in ("aufast", "kernels", "csrc/cpu"):
        (tree / folder).mkdir(parents=True)
    (tree / "aufast/__init__.py").touch()
    (tree / "kernels/__init__.py").touch()
    for name in ("setup.py", "build_kernels.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    (tree / "csrc/cpu/common.h").write_text(HEADER)
    for name in ("first", "second"):
        (tree / f"csrc/cpu/{name}.cpp").write_text(OPERATOR.replace("NAME", name))
    return tree


@pytest.fixture
def plain_tree(small_tree: Path) -> Path:
    """The same without a word of torch, for what is compiled when: its headers take seconds."""
    (small_tree / "csrc/cpu/common.h").write_text("#pragma once\n")
    for name in ("first", "second"):
        (small_tree / f"csrc/cpu/{name}.cpp").write_text(
            f'#include "common.h"\nint {name}() {{ return 1; }}\n'
        )
    return small_tree


@pytest.fixture
def only_setuptools(tmp_path: Path) -> Path:
    """A site folder with this interpreter's setuptools and nothing else."""
    folder = tmp_path / "only-setuptools"
    folder.mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for part in (*installed.glob("setuptools*"), installed / "_distutils_hack"):
        (folder / part.name).symlink_to(part)
    return folder


@pytest.fixture
def bare_python(tmp_path: Path, only_setuptools: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in an interpreter that has setuptools and nothing else; `folders` come first on its path."""
    venv = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)

    def run_code(code: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, [*folders, only_setuptools]))
        return run([venv / "bin/python", "-c", code], ROOT, PYTHONPATH=path, **variables)

    return run_code
