"""The GPU's checks, cases, record and table, as far as they can be exercised without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aufast import reference
from benchmarks import gpu, gpu_cases, gpu_checks, table
from benchmarks.bars import BARS
from benchmarks.harness import Run, compute, distance
from benchmarks.harness import check as check_run

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *gpu_cases.roi_crop_cases("cpu", 2),
    *gpu_cases.graph_conv_cases("cpu", (3,)),
    *gpu_cases.graph_gru_cases("cpu", (1,)),
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
    for run in gpu_cases.runs([case], "cpu", False):
        names.add(run.provider)
        if run.provider not in gpu_cases.YARDSTICKS and run.mode != "bwd":
            check_run(run)
    assert names >= {"reference", "cpu"}


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


def test_every_target_is_about_runs_that_exist() -> None:
    cases = [case for make in gpu_cases.CASES.values() for case in make("cpu")]
    runs = gpu_cases.runs(cases, "cpu", compile_=True)
    timed = {(run.case.operator, run.case.name, run.mode, str(run.dtype)[6:]) for run in runs}
    peers = {(run.case.operator, run.provider) for run in runs}
    peers |= {("roi_crop", "roi_align"), ("graph_gru", "graph")}  # need torchvision, a GPU
    for bar in BARS["cuda"]:
        assert (bar.operator, bar.case, bar.mode, bar.dtype) in timed, bar
        assert bar.against in ("copy", "step") or (bar.operator, bar.against) in peers, bar


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


def test_ceilings_and_a_record_and_its_table(quick: None) -> None:
    found = gpu.ceilings("cpu", copied=1 << 12, matrix=32)
    assert set(found) == {"copy", "matmul float32", "matmul tf32", "matmul bfloat16"}
    assert all(ceiling["rate"] > 0 for ceiling in found.values())
    (case,) = gpu_cases.graph_conv_cases("cpu", (3,))
    runs = gpu_cases.runs([case], "cpu", False)

    def wrong(*inputs):
        return 1.001 * reference.graph_conv(*inputs)

    runs.insert(1, Run(case, "fwd", torch.float32, "wrong", wrong))
    written, left = gpu.record(runs, "cpu", 60.0, found)
    assert (
        len(left) == 1 and "graph_conv batch3-fwd-float32-wrong" in left[0] and "float64 reference" in left[0]
    )
    assert len(written["results"]) == len(runs) - 1
    assert {"median", "iqr", "rounds", "flops", "bytes", "shape"} <= written["results"][0].keys()
    text = table.render(json.loads(json.dumps(written)))
    assert "graph_conv" in text and "cublas" in text


def test_what_there_is_no_time_for_is_named(quick: None) -> None:
    (case,) = gpu_cases.graph_conv_cases("cpu", (3,))
    runs = gpu_cases.runs([case], "cpu", False)
    written, left = gpu.record(runs, "cpu", -1.0, {})
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
