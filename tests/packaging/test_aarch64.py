"""The CPU kernels compile for aarch64 from the same source; a cross compiler is all that is needed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build_kernels

CSRC = Path(__file__).parents[2] / "csrc" / "cpu"


def cross_compiler() -> list[str] | None:
    gcc = shutil.which("aarch64-linux-gnu-g++")
    if gcc:
        return [gcc]
    if importlib.util.find_spec("ziglang"):  # Clang with the headers of every target, from PyPI
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return None


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cpp")), ids=lambda path: path.stem)
def test_compiles_for_aarch64(source: Path, tmp_path: Path) -> None:
    compiler = cross_compiler()
    if compiler is None:
        pytest.skip("no compiler for aarch64: neither aarch64-linux-gnu-g++ nor the package ziglang")
    include = Path(torch.__file__).parent / "include"
    flags = [build_kernels.STANDARD, build_kernels.TARGET, "-fPIC", "-Wno-psabi", "-isystem", str(include)]
    target = tmp_path / "kernel.o"
    done = subprocess.run([*compiler, *flags, "-c", "-o", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    machine = int.from_bytes(target.read_bytes()[18:20], "little")  # of the ELF header
    assert machine == 183
