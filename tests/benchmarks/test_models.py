"""The models' benchmark: what is refused, what the picture needs, and that every bar has its runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bars, models, picture
from benchmarks.harness import WrongResultError, dtype_name


def test_every_bar_has_its_runs():
    lines = {
        (run.case.operator, run.case.case, run.case.mode, dtype_name(run.dtype), run.provider)
        for run in models.RUNS
    }
    lines |= {
        (run.case.operator, run.case.case, "memory", dtype_name(run.dtype), run.provider)
        for run in models.MEMORY_RUNS
    }
    wanted = bars._models()
    assert wanted
    for bar in wanted:
        for provider in ("cpu", bar.against):
            assert (bar.operator, bar.case, bar.mode, bar.dtype, provider) in lines, bar


def test_a_wrong_prediction_is_not_timed(monkeypatch):
    run = next(run for run in models.RUNS if str(run) == "aar-B1-infer-float32-cpu")
    monkeypatch.setattr(models, "work", lambda run: lambda: torch.full((1, 1, 12), 0.5))
    monkeypatch.setattr(models, "truth", lambda part: torch.full((1, 1, 12), 0.501, dtype=torch.float64))
    with pytest.raises(
        WrongResultError, match="is 1.0e-03 from the plain form, allowed is 0.0001; not timed"
    ):
        models.check(run)


def record():
    results = [
        {
            "operator": model,
            "case": "B1",
            "pass": part,
            "dtype": dtype,
            "provider": provider,
            "median": 0.001 * k,
        }
        for model, parts in picture.PARTS.items()
        for k, part in enumerate(parts, start=1)
        for dtype, provider in picture.FORMS.values()
    ]
    return {"machine": {"cpu": "CPU"}, "threads": 2, "date": "2026-01-01T00:00:00", "results": results}


def test_the_picture_is_drawn_from_a_record(tmp_path):
    assert picture.parts(record(), "aar") == {"stem": [1] * 3, "branches": [2] * 3, "relations": [3] * 3}
    picture.draw([record()], tmp_path / "parts.png")
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="the records hold no run of aar or margl"):
        picture.draw([{**record(), "results": []}], tmp_path / "none.png")


def test_a_missing_part_is_named():
    incomplete = record()
    incomplete["results"].pop()
    with pytest.raises(ValueError, match="no run of margl's after backbone, bfloat16"):
        picture.parts(incomplete, "margl")
