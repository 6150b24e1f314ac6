"""The GPU's checks, cases, record and table, as far as they can be exercised without one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from aufast import reference
from benchmarks import gpu, gpu_cases, gpu_checks, table
from benchmarks.bars import BARS
from benchmarks.harness import Run, compute, distance
from benchmarks.harness import check as check_run
from tests.packaging.conftest import needs_nvcc

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *gpu_cases.roi_crop_cases("cpu", 2),
    *gpu_cases.graph_conv_cases("cpu", (3,)),
    *gpu_cases.graph_gru_cases("cpu", (1,)),
    *gpu_cases.region_conv_cases("cpu", 1),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    monkeypatch.setattr(gpu, "ROUNDS", (2, 2))


@pytest.mark.parametrize("level", gpu_cases.LEVELS)
def test_boxes_lie_inside_and_away_from_where_gradients_jump(level: str) -> None:
    _, side, extent = gpu_cases.LEVELS[level]
    boxes = gpu_cases.boxes(3, side, extent, "cpu").double()
    assert boxes.shape == (3, 24, 4)
    length = boxes[..., 2:] - boxes[..., :2]
    assert (length >= 0.8 * extent - 1e-5).all() and (length <= 1.2 * extent + 1e-5).all()
    samples = boxes[..., :2, None] + (torch.arange(6) + 0.5) / 6 * length[..., None] - 0.5
    assert (samples > 0).all() and (samples < side - 1).all()
    assert ((samples - samples.round()).abs() > 1e-3).all()


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.operator}-{case.name}")
def test_everyone_who_is_timed_computes_the_operator(case) -> None:
    names = set()
    for run in gpu_cases.runs([case], "cpu"):
        names.add(run.provider)
        if run.provider not in (*gpu_cases.YARDSTICKS, *gpu_cases.COMPILED) and run.mode != "bwd":
            check_run(run)
    assert names >= {"reference", "cpu"} | ({"compiled"} if case.operator == "graph_gru" else set())


def test_cublas_does_the_products_of_graph_conv() -> None:
    (case,) = gpu_cases.graph_conv_cases("cpu", (5,))
    inputs = case.make(torch.float64)
    out = gpu_cases.CuBlas()(*inputs).transpose(0, 1)
    assert distance(out, reference.graph_conv(*inputs)) < 1e-12


def test_cudnn_does_as_many_products_as_graph_gru() -> None:
    (case,) = gpu_cases.graph_gru_cases("cpu", (2,))
    yardstick = gpu_cases.CuDnn()
    out, _ = yardstick(*case.make(torch.float32))
    assert out.shape == (2 * 12, 48, 96)
    weights = sum(weight.numel() for name, weight in yardstick.gru.named_parameters() if "weight" in name)
    mixes = 2 * 2 * 48 * 12 * 12 * 3 * 96
    theta = 2 * 12 * 8 * 192 * 288
    assert 2 * weights * 2 * 12 * 48 == case.flops - mixes - theta


def test_every_target_is_about_runs_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases, "find_spec", lambda name: True)  # torchvision may be missing here
    cases = [case for make in gpu_cases.CASES.values() for case in make("cpu")]
    timed = {
        (run.case.operator, run.case.name, run.mode, str(run.dtype)[6:], run.provider)
        for run in gpu_cases.runs(cases, "cpu")
    }
    for bar in BARS["cuda"]:
        about = bar.operator, bar.case, bar.mode, bar.dtype
        assert (*about, "cpu") in timed, bar
        if bar.against not in ("copy", "step", "graph"):  # two are no providers, a CUDA graph needs a GPU
            assert (*about, bar.against) in timed, bar


def test_bytes_and_operations_of_a_pass_add_up() -> None:
    facts = {
        mode: Run(SMALL[0], mode, torch.bfloat16, "cuda", reference.roi_crop).facts()
        for mode in gpu_cases.PASSES
    }
    for key in ("flops", "bytes"):
        assert facts["fwd"][key] + facts["bwd"][key] == facts["fwd+bwd"][key]
    features, crops, rois = 2 * 128 * 24 * 24, 2 * 24 * 128 * 36, 2 * 24 * 4
    assert facts["fwd"]["bytes"] == 2 * (features + crops + rois)
    assert facts["bwd"]["bytes"] == 2 * (2 * features + crops + 2 * rois)


def test_ceilings_and_a_record_and_its_table(quick: None, tmp_path: Path) -> None:
    found = gpu.ceilings("cpu", copied=1 << 12, matrix=32)
    assert set(found) == {"copy", "matmul float32", "matmul tf32", "matmul bfloat16"}
    assert all(ceiling["rate"] > 0 for ceiling in found.values())
    (case,) = gpu_cases.graph_conv_cases("cpu", (3,))
    runs = gpu_cases.runs([case], "cpu")

    def wrong(*inputs):
        return 1.001 * reference.graph_conv(*inputs)

    runs.insert(1, Run(case, "fwd", torch.float32, "wrong", wrong))
    written, left = gpu.record(runs, "cpu", 60.0, found, tmp_path / "record.json")
    assert (
        len(left) == 1 and "graph_conv batch3-fwd-float32-wrong" in left[0] and "float64 reference" in left[0]
    )
    assert len(written["results"]) == len(runs) - 1
    assert {"median", "iqr", "rounds", "flops", "bytes", "shape"} <= written["results"][0].keys()
    text = table.render(json.loads(json.dumps(written)))
    assert "graph_conv" in text and "cublas" in text


def test_a_killed_run_leaves_what_it_has_measured(quick: None, tmp_path: Path) -> None:
    (case,) = gpu_cases.graph_conv_cases("cpu", (3,))
    runs = gpu_cases.runs([case], "cpu")

    def killed(*inputs):
        raise KeyboardInterrupt

    runs.insert(2, Run(case, "fwd", torch.float32, "killed", killed))
    with pytest.raises(KeyboardInterrupt):
        gpu.record(runs, "cpu", 60.0, {}, tmp_path / "record.json")
    kept = json.loads((tmp_path / "record.json").read_text())
    assert [result["provider"] for result in kept["results"]] == [run.provider for run in runs[:2]]
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_compiled_peers_come_last_and_end_in_time(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = gpu_cases.graph_gru_cases("cpu", (1,))
    runs = gpu_cases.runs([case], "cpu")
    modes = [run.mode for run in runs if run.provider in gpu_cases.COMPILED]
    assert modes == ["fwd", "fwd+bwd"]
    assert [run.provider for run in runs[-2:]] == ["compiled", "compiled"]

    def never_ready(*inputs):
        while True:
            try:
                time.sleep(1)
            except Exception:  # as a compiler may
                pass

    monkeypatch.setattr(gpu, "COMPILING", 0.2)
    slow = [Run(case, "fwd", torch.float32, "compiled", never_ready), runs[0]]
    written, left = gpu.record(slow, "cpu", 60.0, {}, tmp_path / "record.json")
    assert left == ["graph_gru B1-fwd-float32-compiled: not compiled and timed within 0 s"]
    assert len(written["results"]) == 1 and written["not timed"] == left


def test_what_there_is_no_time_for_is_named(quick: None, tmp_path: Path) -> None:
    (case,) = gpu_cases.graph_conv_cases("cpu", (3,))
    runs = gpu_cases.runs([case], "cpu")
    written, left = gpu.record(runs, "cpu", -1.0, {}, tmp_path / "record.json")
    assert written["results"] == [] and len(left) == len(runs)
    assert all(line.endswith(": no time left") for line in left)


def test_the_backward_alone_computes_the_gradients() -> None:
    from benchmarks.harness import work

    (case,) = gpu_cases.graph_conv_cases("cpu", (3,))
    run = Run(case, "bwd", torch.float32, "reference", reference.graph_conv)
    expected = compute(run.function, case.make(torch.float32), "bwd")
    call = work(run)
    for gradients in (call(), call()):  # the graph stays
        for number, gradient in enumerate(gradients):
            assert torch.equal(gradient, expected[f"gradient {number}"])


def gpu_record() -> dict:
    """A record of round numbers, as a GPU would leave it."""

    def result(operator: str, case: str, mode: str, provider: str, median: float, **facts) -> dict:
        made = {"operator": operator, "case": case, "shape": case, "pass": mode, "dtype": "float32"}
        made |= {"provider": provider, "flops": 10**9, "bytes": 10**9, "median": median, "iqr": 0.0}
        return made | {"rounds": 10} | facts

    return {
        "date": "2026-01-01",
        "machine": {
            "cpu": "Sample CPU", "architecture": "x86_64", "cores": 16, "vectors": "AVX512",
            "AUFAST_CPU_ISA": "", "gpu": "Sample GPU", "driver": "1.2",
        },
        "versions": {"aufast": "0.1.0", "torch": "2.11.0", "compiler": "c++"},
        "backends": {"cuda": "ready: roi_crop, graph_gru"},
        "threads": 8,
        "ceilings": {
            "copy": {"unit": "1 GiB", "rate": 4e12},
            "matmul float32": {"unit": "torch", "rate": 5e13},
            "matmul bfloat16": {"unit": "torch", "rate": 7e14},
        },
        "results": [
            result("roi_crop", "layer2-nchw", "fwd", "cuda", 0.0005),
            result("roi_crop", "layer2-nchw", "fwd", "triton", 0.0004),
            result("roi_crop", "layer2-nchw", "fwd", "merged", 0.0015),
            result("graph_gru", "B1", "fwd", "cuda", 48 * 5e-6, bytes=10**6),
            result("graph_gru", "B1", "fwd", "cuda+graph", 48 * 4e-6),
            result("graph_gru", "B1", "fwd", "graph", 48 * 10e-6),
            result("graph_conv", "batch48", "fwd", "triton", 1e-4),
            result("graph_conv", "batch48", "fwd", "reference", 4e-4),
        ],
    }  # fmt: skip


def test_a_gpus_table_judges_what_auto_takes() -> None:
    text = table.render(gpu_record())
    lines = text.splitlines()
    crop = next(row for row in lines if row.startswith("roi_crop") and "500 µs" in row)
    assert "50% copy" in crop and "≥ 70% copy MISSED" in crop and "≥ 2× merged met" in crop
    assert "≥ 1.5× roi_align not measured" in crop
    beside = next(row for row in lines if row.startswith("roi_crop") and "400 µs" in row)
    assert "triton" in beside and "≥" not in beside
    gru = next(row for row in lines if row.startswith("graph_gru") and "240 µs" in row)
    assert "≤ 6 µs a step met" in gru and "≥ 3× graph MISSED" in gru and "matmul" in gru
    conv = next(row for row in lines if row.startswith("graph_conv"))
    assert "≥ 3× reference met" in conv and "triton" in conv
    assert "Sample GPU, driver 1.2" in text and "matmul bfloat16: 7e+05 GFLOP/s" in text
    assert f"bars: 3 met, 2 missed, {len(BARS['cuda']) - 5} not measured" in text


def test_without_a_gpu_every_target_is_open() -> None:
    record = gpu_record() | {"results": []}
    assert f"bars: 0 met, 0 missed, {len(BARS['cuda'])} not measured" in table.render(record)


@pytest.mark.parametrize("name", ["agreement", "same_bits_again"])
def test_the_checks_pass_on_this_processor(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_checks("cpu", [name]) == 0
    out = capsys.readouterr().out
    for operator in ("roi_crop", "graph_conv", "graph_gru", "region_conv"):
        assert f"  ok      {operator} cpu" in out


def test_the_check_of_large_tensors_runs_small() -> None:
    lines = list(gpu_checks.beyond_32_bits("cpu", 2**14))
    assert len(lines) == 5 and lines[0].startswith("roi_crop cpu: 2,097,152 elements")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda gradient: gradient[-1].zero_(), "gradient 0 is 1.5e-02 off beyond 16384 elements"),
        (lambda gradient: gradient[0].fill_(1), "gradient 0 is not zero where none came in"),
    ],
    ids=["last-row", "first-row"],
)
def test_the_check_of_large_tensors_sees_a_wrong_gradient(
    spoil, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grad = torch.autograd.grad

    def wrong(out, leaves, *rest):
        first, *others = grad(out, leaves, *rest)
        if len(first) > 4096:  # of the large call
            spoil(first)
        return first, *others

    calls = [call for call in gpu_checks._large_calls("cpu", 2**14) if call[0] == "graph_conv"]
    operator, call, shape, *rest = calls[0]
    monkeypatch.setattr(gpu_checks, "_large_calls", lambda *_: [(operator, call, (5000, *shape[1:]), *rest)])
    monkeypatch.setattr(torch.autograd, "grad", wrong)
    with pytest.raises(gpu_checks.Failed, match=what):
        list(gpu_checks.beyond_32_bits("cpu", 2**14))


def test_the_papers_sizes_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "graph_conv": lambda device: gpu_cases.graph_conv_cases(device, (3,)),
        "graph_gru": lambda device: gpu_cases.graph_gru_cases(device, (1,)),
    }
    found = list(gpu_checks.papers_sizes("cpu", small))
    assert found == ["graph_conv batch3 cpu", "graph_gru B1 cpu"]
    right = gpu_checks.harness.compute

    def off_by_a_little(function, inputs, mode):
        found = right(function, inputs, mode)
        exact = inputs[0].dtype == torch.float64
        return {name: value if exact else 1.001 * value for name, value in found.items()}

    monkeypatch.setattr(gpu_checks.harness, "compute", off_by_a_little)
    with pytest.raises(gpu_checks.Failed, match="graph_conv batch3-fwd-float32-cpu: output 0 is 1.0e-03"):
        list(gpu_checks.papers_sizes("cpu", small))


def test_bits_that_change_from_call_to_call_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [*gpu_cases.roi_crop_cases("cpu", 1)[:1], *gpu_cases.graph_gru_cases("cpu", (1,))]
    found = list(gpu_checks.same_bits_at_size("cpu", small))
    assert found[:2] == [f"roi_crop layer2-nchw-fwd+bwd-{dtype}-cpu" for dtype in ("float32", "bfloat16")]
    assert [line.split()[0] for line in found[2:]] == ["graph_gru"] * 2
    right, calls = gpu_checks.harness.compute, []

    def another_order_of_adding(function, inputs, mode):
        calls.append(found := right(function, inputs, mode))
        if len(calls) == 2:
            last = found["gradient 1"].view(-1)[-1]
            last.copy_(torch.nextafter(last, last + 1))
        return found

    monkeypatch.setattr(gpu_checks.harness, "compute", another_order_of_adding)
    with pytest.raises(gpu_checks.Failed, match="float32-cpu: gradient 1 differs from call to call"):
        list(gpu_checks.same_bits_at_size("cpu", small))


@pytest.mark.parametrize(
    ("launched_on", "asleep", "what"),
    [
        ("current", True, None),
        ("default", True, "output 0 differs on another stream"),
        ("current", False, "it waited for the default stream, or that one woke too early"),
    ],
)
def test_a_launch_on_the_default_stream_is_seen(
    launched_on: str, asleep: bool, what: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU: what is launched on the default stream while it sleeps is not there yet."""
    busy = False

    @contextmanager
    def sleeping(stream):
        nonlocal busy
        busy = asleep
        yield lambda: busy
        busy = False

    def computed(*_):
        out = torch.empty(3)  # poisoned
        if launched_on == "current" or not busy:
            out.fill_(2.0)
        return {"output 0": out}

    monkeypatch.setattr(gpu_checks, "beside_a_busy_stream", sleeping)
    monkeypatch.setattr(gpu_checks, "results", computed)
    monkeypatch.setattr(gpu_checks, "backends_for", lambda sample, device: ["cuda"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    check = gpu_checks.other_stream("cuda")
    if what is None:
        assert len(list(check)) == 4
    else:
        with pytest.raises(gpu_checks.Failed, match=what):
            list(check)


def test_a_wrong_result_and_a_skip_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = gpu_checks.on

    def off_by_a_little(device, sample, backend):
        return lambda tensors: tuple(1.001 * out for out in call(device, sample, backend)(tensors))

    monkeypatch.setattr(gpu_checks, "on", off_by_a_little)
    assert gpu.run_checks("cpu", ["agreement", "graph_replay"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  roi_crop-boxes cpu torch.float32: output 0 is 1.0e-03 off, allowed is 1.0e-05" in out
    assert "skipped CUDA graphs are a GPU's" in out and "1 of 2 checks passed" in out


def test_a_check_that_found_nothing_to_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_checks, "backends_for", lambda sample, device: [])
    assert gpu.run_checks("cpu", ["same_bits_again"]) == 1
    assert "no backend but the reference can run here" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["check", "time"])
def test_unknown_names_are_refused(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse([stage, "nonsense"])
    assert f"{stage}: no 'nonsense'; there are " in capsys.readouterr().err
    assert gpu.parse([stage]).names == list(gpu_checks.CHECKS if stage == "check" else gpu_cases.CASES)


def test_a_whole_run_on_this_processor(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"graph_conv": lambda device: gpu_cases.graph_conv_cases(device, (3,))}
    monkeypatch.setattr(gpu_cases, "CASES", small)
    monkeypatch.setattr(gpu.ceilings, "__defaults__", (1 << 12, 32))
    kept = tmp_path / "new" / "record.json"
    assert gpu.main(["--device", "cpu", "time", "--only", "fwd-float32", "--out", str(kept)]) == 0
    record = json.loads(kept.read_text())
    assert {result["provider"] for result in record["results"]} >= {"reference", "hoisted", "cublas", "cpu"}
    assert gpu.main(["bars", str(kept)]) == 0
    assert "kept in" in capsys.readouterr().out


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_script_says_how_it_is_used() -> None:
    done = script("nonsense")
    assert done.returncode == 2 and "benchmarks/gpu.sh build" in done.stderr and "set -eu" not in done.stderr


def test_the_script_measures_nothing_without_a_gpu() -> None:
    done = script("time", "roi_crop")
    assert done.returncode == 2 and "every GPU bar stays open" in done.stderr


def test_a_run_left_out_does_not_spare_the_sanitizers(tmp_path: Path) -> None:
    """Stand-ins for a GPU's Python, whose `time` leaves a run out, and for the sanitizer."""
    tree, tools = tmp_path / "copy", tmp_path / "tools"
    for folder in (tools, tree / "aufast", tree / "kernels", tree / "benchmarks"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", tree / "benchmarks")
    for name, lines in (
        ("python", 'echo "stage $3"\n[ "$3" != time ]'),
        ("compute-sanitizer", 'echo "watched by $2"'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHON": str(tools / "python"), "PATH": path}
    done = subprocess.run([tree / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True)
    said = done.stdout.splitlines()
    tools_of_it = ("memcheck", "racecheck", "initcheck")
    assert said[said.index("stage time") :] == [
        "stage time",
        *(line for tool in tools_of_it for line in (f"sanitize: {tool}", f"watched by {tool}")),
    ]
    assert done.returncode == 1, done.stderr


# What torch itself imports.
NEEDED = "torch torchgen functorch sympy mpmath networkx jinja2 markupsafe filelock fsspec typing_extensions"


@pytest.fixture
def torch_alone(tmp_path: Path) -> Path:
    """A Python that has torch alone: no NumPy, safetensors, setuptools, ninja, pytest or Triton."""
    site = tmp_path / "site"
    site.mkdir()
    for name in NEEDED.split():
        origin = Path(importlib.util.find_spec(name).origin)
        part = origin.parent if origin.name == "__init__.py" else origin
        (site / part.name).symlink_to(part)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return python


def test_checks_need_torch_alone(torch_alone: Path, tmp_path: Path) -> None:
    """The sources gathered as gpu.sh does it, with this build's libraries."""
    shutil.copytree(ROOT / "aufast", tmp_path / "package" / "aufast")
    shutil.copytree(ROOT / "kernels", tmp_path / "package" / "aufast" / "kernels")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'package')!r}, {str(ROOT)!r}]\n"
        "from aufast import cli\nfrom benchmarks import gpu\ncli.main(['backends'])\n"
        "hidden = {'numpy', 'safetensors', 'setuptools', 'ninja', 'pytest', 'triton'} & sys.modules.keys()\n"
        "sys.exit(str(hidden) if hidden else gpu.main(['--device', 'cpu', 'check', 'same_bits_again']))"
    )
    done = subprocess.run([torch_alone, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 checks passed" in done.stdout


@pytest.mark.slow
@needs_nvcc
def test_the_script_builds_with_torch_and_nvcc_alone(torch_alone: Path, tmp_path: Path) -> None:
    """Of small sources, in a copy of the repository."""
    tree = tmp_path / "a copy"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "results")
    for folder in ("aufast", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    shutil.copy(ROOT / "build_kernels.py", tree)
    for device, source in (("cpu", "one.cpp"), ("cuda", "one.cu")):
        (tree / "csrc" / device).mkdir(parents=True)
        (tree / "csrc" / device / source).write_text("int one() { return 1; }\n")
    environment = os.environ | {"PYTHON": str(torch_alone), "CUDA_VISIBLE_DEVICES": ""}
    for stage, code, said in (
        ("build", 0, "built, but this PyTorch sees no CUDA device"),
        ("build", 0, "no work to do"),
        ("check", 2, "every GPU bar stays open"),
    ):
        command = [tree / "benchmarks" / "gpu.sh", stage]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout + done.stderr
