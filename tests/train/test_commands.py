"""The commands train, evaluate and ablation: from a file of settings to the table, and their exit status."""

from __future__ import annotations

import json

import pytest

from aufast.cli import main
from aufast.train.loop import Trainer
from aufast.train.run import describe
from tests.train.runs import MAKERS


@pytest.fixture
def settings(packed, tmp_path):
    pytest.importorskip("jsonargparse", reason="reads the options")
    values = describe(MAKERS["margl"](packed, epochs=1))
    values = {key: value for key, value in values.items() if key not in ("format_version", "system")}
    (tmp_path / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
    return str(tmp_path / "run.yaml")


def test_train_stop_go_on_and_evaluate(settings, tmp_path, monkeypatch, capsys):
    run = str(tmp_path / "run")
    words = ["train", "margl", "--config", settings, "--out", run, "--data.part", "2"]
    inner = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *a: (*inner(self, *a)[:2], True))
    assert main(words) == 75
    assert "--resume goes on with" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["evaluate", run]) == 1
    assert "the run is not finished" in capsys.readouterr().err
    assert main(["train", "margl", "--resume", "--out", run]) == 0, "the settings are the run's own"
    assert main(["evaluate", run]) == 0
    out = capsys.readouterr().out
    assert "SYNTHETIC, part 2" in out
    assert (tmp_path / "run" / "evaluation.txt").read_text() == out
    assert main(words) == 1
    assert "already exists; --resume goes on with it" in capsys.readouterr().err


def test_ablation_prints_its_table(settings, tmp_path, monkeypatch, capsys):
    words = ["ablation", "margl", "--config", settings, "--out", str(tmp_path / "table"), "--parts", "3"]
    assert main([*words, "--variants", "resnet18"]) == 0
    out = capsys.readouterr().out
    assert "SYNTHETIC resnet18" in out and (tmp_path / "table" / "ablation.txt").read_text() == out
    monkeypatch.setenv("RANK", "1")
    assert main([*words, "--variants", "resnet18"]) == 0
    assert capsys.readouterr().out == "", "one of torchrun's processes prints it"


def test_several_runs_need_a_place_for_their_table(capsys):
    assert main(["evaluate", "a", "b"]) == 1
    assert "--out: name a folder for the table of several runs" in capsys.readouterr().err
