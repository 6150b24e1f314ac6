"""The table: ratios, best peer, fraction of the ceiling and bars, of a run small enough to check by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import table

ROOT = Path(__file__).resolve().parents[2]


def timed(provider: str, median: float, **facts) -> dict:
    info = {
        "operator": "graph_gru",
        "case": "B1",
        "shape": "B=1 T=48",
        "pass": "fwd",
        "dtype": "float32",
        "provider": provider,
        "flops": 100_000_000,
        "bytes": 1_000_000,
    }
    return {"extra_info": info | facts, "stats": {"median": median, "iqr": 0.0, "rounds": 7}}


def ceiling(name: str, best: float, **facts) -> dict:
    info = {"ceiling": name, "unit": "AVX-512", **facts}
    return {"extra_info": info, "stats": {"min": best, "median": 2 * best, "iqr": 0.0, "rounds": 7}}


@pytest.fixture
def raw() -> dict:
    """A run of round numbers, in the layout of pytest-benchmark's file."""
    region = {"operator": "region_conv", "case": "8x8", "shape": "8×8", "bytes": 40_000_000}
    low = {"case": "B8", "dtype": "bfloat16"}
    memory = {"case": "B8", "pass": "memory"}
    benchmarks = [
        ceiling("fma float32", 0.01, flops=5_000_000_000),
        ceiling("fma bfloat16", 0.01, flops=10_000_000_000),
        ceiling("copy", 0.1, bytes=1_000_000_000),
        timed("reference", 0.031),
        timed("hoisted", 0.002),
        timed("compiled", 0.0015),
        timed("cpu", 0.001),
        timed("cpu", 0.004, case="B8"),
        timed("reference", 0.02, **low),
        timed("cpu", 0.002, **low),
        timed("reference", 9.0, memory=100_000_000, **memory),
        timed("cpu", 9.0, memory=20_000_000, **memory),
        timed("reference", 0.05, **region),
        timed("grouped", 0.03, **region),
    ]
    return {
        "datetime": "2026-01-01T00:00:00+00:00",
        "commit_info": {"id": "abc", "dirty": False},
        "machine_info": {
            "cpu": {"brand_raw": "Sample CPU"},
            "processor": "x86_64",
            "machine": "x86_64",
            "system": "Linux",
            "release": "6.1",
            "python_version": "3.11.7",
            "aufast": {
                "version": "0.1.0",
                "torch": "2.13.0",
                "threads": 2,
                "cores": 2,
                "vectors": "AVX512",
                "AUFAST_CPU_ISA": "",
                "compiler": "/usr/bin/c++",
                "backends": {"cpu": "ready: graph_gru"},
            },
        },
        "benchmarks": benchmarks,
    }


def line(text: str, *parts: str) -> str:
    found = [row for row in text.splitlines() if all(part in row for part in parts)]
    assert len(found) == 1, f"{parts} in {len(found)} lines of\n{text}"
    return found[0]


def test_ratios_best_peer_ceiling_and_bars(raw: dict) -> None:
    row = line(table.render(table.condense(raw)), "graph_gru", "1 ms", "31.0×")
    assert "31.0× (31 ms)" in row
    assert "compiled 1.5× (1.5 ms)" in row
    assert "20% FMA" in row  # 0.1 GFLOP in 1 ms of 500 GFLOP/s
    assert "≥ 30× reference met" in row and "≥ 3× compiled MISSED" in row


def test_the_fitting_ceiling_is_the_one_that_asks_for_more_time(raw: dict) -> None:
    raw["benchmarks"].append(
        timed("cpu", 0.008, operator="region_conv", case="8x8", shape="8×8", bytes=40_000_000)
    )
    assert "50% copy" in line(
        table.render(table.condense(raw)), "region_conv", "8 ms"
    )  # 4 ms of copy, 0.2 of FMA


def test_low_precision_is_held_against_our_float32(raw: dict) -> None:
    text = table.render(table.condense(raw))
    assert "≥ 1.6× float32 met (2.00×)" in line(text, "bfloat16", "10.0×")
    raw["benchmarks"] = [b for b in raw["benchmarks"] if b["extra_info"].get("ceiling") != "fma bfloat16"]
    assert "≥ 1.6× float32 not measured" in line(table.render(table.condense(raw)), "bfloat16", "10.0×")


@pytest.mark.parametrize(("seconds", "share"), [(0.01, "5% FMA"), (0.1, "10% FMA")], ids=["faster", "slower"])
def test_low_precision_is_held_against_the_faster_unit(raw: dict, seconds: float, share: str) -> None:
    low = next(b for b in raw["benchmarks"] if b["extra_info"].get("ceiling") == "fma bfloat16")
    low["stats"]["min"] = seconds  # 1000 or 100 GFLOP/s, beside 500 in float32; the run does 50
    assert share in line(table.render(table.condense(raw)), "bfloat16", "10.0×")


def test_memory_is_compared_as_peaks(raw: dict) -> None:
    row = line(table.render(table.condense(raw)), "memory")
    assert "20.0 MB" in row and "5.0× (100.0 MB)" in row and "≥ 4× reference met" in row


def test_an_operator_without_a_kernel_still_has_its_line(raw: dict) -> None:
    row = line(table.render(table.condense(raw)), "region_conv")
    assert "no kernel" in row and "50 ms" in row and "grouped 30 ms" in row


def test_missing_ceilings_are_said_and_not_invented(raw: dict) -> None:
    raw["benchmarks"] = [b for b in raw["benchmarks"] if "ceiling" not in b["extra_info"]]
    raw["machine_info"]["aufast"]["compiler"] = ""
    text = table.render(table.condense(raw))
    assert "FMA float32: not measured: no compiler" in text and "copy: not measured" in text
    assert "not measured" in line(text, "graph_gru", "31.0×")


def test_the_summary_counts_every_bar_once(raw: dict) -> None:
    record = table.condense(raw)
    text = table.summary(record)
    met, missed, absent = (
        int(text.split(word)[0].split()[-1]) for word in (" met", " missed", " not measured")
    )
    assert met + missed + absent == len(table.BARS["cpu"])
    assert (met, missed) == (
        3,
        2,
    )  # B1: reference met, compiled missed; B8: FMA missed; memory and bfloat16 met
    assert "graph_gru B1 fwd float32: 1.5 of 3 against compiled" in text


def test_a_record_gives_the_same_table_as_its_run(raw: dict, tmp_path: Path, capsys) -> None:
    run, kept = tmp_path / "run.json", tmp_path / "new" / "record.json"
    run.write_text(json.dumps(raw))
    table.main([str(run), "--save", str(kept)])
    first = capsys.readouterr().out
    table.main([str(kept)])
    assert first.startswith(capsys.readouterr().out.rstrip("\n"))
    record = json.loads(kept.read_text())
    assert record["machine"]["cpu"] == "Sample CPU" and record["threads"] == 2
    assert record["versions"]["torch"] == "2.13.0" and record["commit"] == "abc"
    assert {"shape", "dtype", "median", "rounds"} <= record["results"][0].keys()


@pytest.mark.slow
def test_a_real_run_becomes_a_table(tmp_path: Path) -> None:
    run, kept = tmp_path / "run.json", tmp_path / "record.json"
    selected = ["-k", "fill or batch48-fwd-float32-hoisted or batch48-fwd-float32-reference"]
    pytest_run = [
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        f"--benchmark-json={run}",
        "-q",
        *selected,
    ]
    subprocess.run([sys.executable, *pytest_run], cwd=ROOT, check=True, capture_output=True)
    made = subprocess.run(
        [sys.executable, "-m", "benchmarks.table", str(run), "--save", str(kept)],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "hoisted" in line(made.stdout, "graph_conv", "batch=48")
    assert json.loads(kept.read_text())["ceilings"]["fill"]["rate"] > 0
