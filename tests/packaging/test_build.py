"""setup.py's build_ext on small sources: what is compiled, when again, and what it says where it cannot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import aufast
from tests.packaging.conftest import ROOT, build, needs_nvcc, run

USE = """
import torch
library = torch.library.Library("aufast_test", "DEF")
library.define("first(Tensor x) -> Tensor")
torch.ops.load_library("aufast/_cpu.so")
torch.use_deterministic_algorithms(True)  # fills what is allocated and not written, as `poisoned_empty` does
print(torch.ops.aufast_test.first(torch.zeros(1, 3)))
"""


def facts(tree: Path) -> dict:
    return json.loads((tree / "aufast/_build.json").read_text())


def test_builds_a_library_that_torch_loads(small_tree: Path) -> None:
    done = build(small_tree)
    assert done.returncode == 0, done.stdout
    assert "cpu  built: 2 sources with " in done.stdout
    assert facts(small_tree)["cpu"]["built"] is True
    assert facts(small_tree)["cuda"] == {"built": False, "reason": "there are no sources in csrc/cuda"}
    used = run([sys.executable, "-c", USE], small_tree)
    assert "tensor([[nan, nan, nan]])" in used.stdout, used.stdout


def test_compiles_again_only_what_changed(plain_tree: Path) -> None:
    cpu = plain_tree / "csrc/cpu"
    (cpu / "alone.cpp").write_text("int alone() { return 1; }\n")
    assert build(plain_tree).stdout.count("compile ") == 3
    assert "no work to do" in build(plain_tree).stdout
    with open(cpu / "common.h", "a") as header:
        header.write("\n")
    changed = build(plain_tree).stdout
    assert changed.count("compile ") == 2 and "alone.cpp" not in changed
    (cpu / "alone.cpp").unlink()
    assert build(plain_tree).stdout.count("compile ") == 0
    assert facts(plain_tree)["cpu"]["reason"].startswith("2 sources")


def test_other_flags_compile_again(plain_tree: Path) -> None:
    assert build(plain_tree).returncode == 0
    assert build(plain_tree, CXXFLAGS="-DANOTHER").stdout.count("compile ") == 2
    assert build(plain_tree, DEBUG="1").stdout.count("compile ") == 2
    assert facts(plain_tree)["cpu"]["reason"].endswith("debug")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"AUFAST_SKIP_EXT": "1"}, "AUFAST_SKIP_EXT is set"),
        (
            {"CXX": "/nonexistent"},
            "no C++ compiler was found (tried /nonexistent); install g++ 11 or later, then aufast again",
        ),
    ],
    ids=["skip", "no-compiler"],
)
def test_without_a_compiled_part_it_says_why(
    small_tree: Path, variables: dict[str, str], reason: str
) -> None:
    (small_tree / "aufast/_cpu.so").write_bytes(b"of an older build")
    done = build(small_tree, **variables)
    assert done.returncode == 0, done.stdout
    assert f"cpu  not built: {reason}\n" in done.stdout
    assert facts(small_tree)["cpu"] == {"built": False, "reason": reason}
    assert not (small_tree / "aufast/_cpu.so").exists()


def test_an_old_compiler_is_named(small_tree: Path) -> None:
    old = small_tree / "old-g++"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "old-g++ (Vendor) 8.3.0" && exit\nexit 1\n')
    old.chmod(0o755)
    done = build(small_tree, CXX=f"'{old}'")
    assert done.returncode == 0
    assert "cpu  not built: old-g++ 8.3.0 cannot compile C++20 (g++ 11 or later can)\n" in done.stdout


def test_an_error_in_a_source_stops_the_build(plain_tree: Path) -> None:
    (plain_tree / "csrc/cpu/broken.cpp").write_text("this is no C++\n")
    done = build(plain_tree)
    assert done.returncode != 0
    assert "broken.cpp:1" in done.stdout and "AUFAST_SKIP_EXT=1 installs aufast without" in done.stdout


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_max_jobs_must_be_a_number(plain_tree: Path, jobs: str) -> None:
    done = build(plain_tree, MAX_JOBS=jobs)
    assert done.returncode != 0
    assert f"MAX_JOBS must be a positive whole number, got '{jobs}'" in done.stdout


def test_two_builds_at_once_both_succeed(small_tree: Path) -> None:
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: build(small_tree), range(2)))
    assert [one.returncode for one in done] == [0, 0], [one.stdout for one in done]
    assert sum(one.stdout.count("compile ") for one in done) == 2


def test_cuda_sources_say_why_they_were_left_out(small_tree: Path) -> None:
    (small_tree / "csrc/cpu").rename(small_tree / "csrc/cuda")  # its .cpp files are no CUDA sources
    (small_tree / "csrc/cuda/fill.cu").write_text("__global__ void fill(float* x) { x[threadIdx.x] = 1; }\n")
    assert "cuda not built: AUFAST_SKIP_CUDA is set" in build(small_tree, AUFAST_SKIP_CUDA="1").stdout
    missing = build(small_tree, FORCE_CUDA="1", CUDA_HOME="/nonexistent").stdout
    assert "cuda not built: nvcc was not found (looked for /nonexistent/bin/nvcc); set CUDA_HOME" in missing


@needs_nvcc
def test_force_cuda_compiles_for_the_listed_architectures(small_tree: Path) -> None:
    (small_tree / "csrc/cpu").rename(small_tree / "csrc/cuda")  # its .cpp files are no CUDA sources
    (small_tree / "csrc/cuda/fill.cu").write_text("__global__ void fill(float* x) { x[threadIdx.x] = 1; }\n")
    done = build(small_tree, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a;8.0+PTX")
    assert done.returncode == 0, done.stdout
    assert facts(small_tree)["cuda"]["built"] is True
    assert "compute_80 sm_80 sm_90a" in facts(small_tree)["cuda"]["reason"]
    needed = subprocess.run(
        ["readelf", "-d", small_tree / "aufast/_cuda.so"], capture_output=True, text=True
    ).stdout
    assert "libtorch_cuda.so" in needed and "libcudart" not in needed and "RUNPATH" not in needed
    wrong = build(small_tree, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="Hopper")
    assert wrong.returncode != 0 and "takes entries like 8.0, 9.0a or 9.0+PTX, got 'Hopper'" in wrong.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with 3.11")
def test_editable_install_maps_the_kernels(tmp_path: Path) -> None:
    # From another folder, so that nothing but the installation can find them.
    where = run([sys.executable, "-P", "-c", "import aufast.kernels as k; print(k.__file__)"], tmp_path)
    assert Path(where.stdout.strip()) == ROOT / "kernels/__init__.py", where.stdout


def test_one_version() -> None:
    assert aufast.__version__ == importlib.metadata.version("aufast")


@pytest.mark.slow
def test_a_killed_build_leaves_the_old_library_and_the_next_one_ends(small_tree: Path) -> None:
    assert build(small_tree).returncode == 0
    library = small_tree / "aufast/_cpu.so"
    before = library.read_bytes()
    with open(small_tree / "csrc/cpu/common.h", "a") as header:
        header.write("#define CHANGED\n")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    for seconds in (0.3, 1.0, 2.0):
        process = subprocess.Popen(command, cwd=small_tree, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the compilers too
            process.wait()
            assert library.read_bytes() == before
    done = build(small_tree)
    assert done.returncode == 0, done.stdout
    assert "tensor([[nan, nan, nan]])" in run([sys.executable, "-c", USE], small_tree).stdout
