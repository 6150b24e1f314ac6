"""Every .cu compiles for both GPUs it is written for: no spills, no local memory, nothing exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.conftest import build, copy_tree, needs_nvcc
from tests.packaging.test_wheel import ALLOWED, symbols

pytestmark = [pytest.mark.slow, needs_nvcc]
ARCHITECTURES = ("sm_80", "sm_90a")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
USAGE = re.compile(  # of a kernel, or of a function that it calls
    r"Function properties for (?P<name>\w+)\n"
    r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The package and what ptxas said, from the build that an installation runs."""
    tree = copy_tree(tmp_path_factory.mktemp("cuda") / "source")
    for source in (tree / "csrc" / "cpu").glob("*.cpp"):
        source.unlink()
    done = build(tree, FORCE_CUDA="1", NVCC_FLAGS="-Xptxas=-v")
    assert done.returncode == 0, done.stdout
    yield tree / "aufast", done.stdout
    shutil.rmtree(tree)


def test_the_default_build_is_for_both_and_for_later_ones(built: tuple[Path, str]) -> None:
    facts = json.loads((built[0] / "_build.json").read_text())["cuda"]
    assert facts["built"] is True
    assert "for compute_80 sm_80 sm_90a, torch" in facts["reason"]


def test_no_kernel_spills(built: tuple[Path, str]) -> None:
    kernels = ENTRY.findall(built[1])
    used = [match.groupdict() for match in USAGE.finditer(built[1])]
    assert len(kernels) == built[1].count("Compiling entry function")
    assert len(used) == built[1].count("bytes stack frame")
    names = {name for name, _ in kernels}
    assert sorted(each["name"] for each in used if each["name"] in names) == sorted(n for n, _ in kernels)
    for architecture in ARCHITECTURES:
        names = [name for name, target in kernels if target == architecture]
        assert len(names) == len(set(names))
        for operator in ("roi_crop_boxes", "roi_crop_gradients", "graph_gru_forward", "graph_gru_backward"):
            assert any(operator in name for name in names), f"{operator} for {architecture}"
    assert [u for u in used if int(u["stack"]) or int(u["stores"]) or int(u["loads"])] == []


def test_the_library_exports_nothing_and_needs_only_torch(built: tuple[Path, str]) -> None:
    library = built[0] / "_cuda.so"
    assert [name for name in symbols(library, "--undefined-only") if not ALLOWED.match(name)] == []
    assert symbols(library, "--defined-only") == []
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"NEEDED.*\[([\w+-]+)\.so", needed))
    system = {"libc", "libm", "libdl", "librt", "libpthread", "libgcc_s", "libstdc++", "ld-linux-x86-64"}
    assert libraries - system == {"libtorch_cpu", "libtorch_cuda"}
