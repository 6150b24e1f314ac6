"""Each example runs, in seconds, and learns."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(arguments))


def test_agcrn_forecaster_beats_the_last_value(capsys: pytest.CaptureFixture) -> None:
    error, last_value = run("agcrn_forecaster", "--nodes", "16", "--iterations", "60")
    assert error < 0.95 * last_value
    assert "generated data" in capsys.readouterr().out


def test_stn_classifier_learns() -> None:
    assert run("stn_classifier", "--iterations", "150") > 0.6


def test_detector_boxes_move_onto_the_objects() -> None:
    before, after = run("detector_head", "--iterations", "80")
    assert after < 0.3 * before


def test_every_example_is_tested() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"agcrn_forecaster", "stn_classifier", "detector_head"}
