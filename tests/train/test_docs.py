"""The page that walks to the tables: every command on it is one, and its choices are the recipes'."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from aufast import cli
from aufast.train import recipe
from aufast.train.evaluate import score

PAGE = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
    if line.startswith("aufast ")
]


def test_the_page_has_commands():
    assert len(COMMANDS) > 20
    for name in ("train margl", "train aar", "evaluate", "ablation margl", "ablation aar", "data prepare"):
        assert any(line.startswith(f"aufast {name}") for line in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, monkeypatch):
    pytest.importorskip("jsonargparse", reason="reads the options")
    options = cli._parser().parse_args(shlex.split(command)[1:])
    if options.run not in (cli._train, cli._ablation):
        return
    taken = {}
    monkeypatch.setattr(
        "aufast.train.loop.train", lambda config, out, resume: taken.update(run=(config, out))
    )
    monkeypatch.setattr(
        "aufast.train.ablation.ablate", lambda config, out, **o: taken.update(run=(config, out))
    )
    options.run(options)
    config, out = taken["run"]
    words = shlex.split(command)
    assert type(config) is type(recipe(words[words.index("--config") + 1])) and out.startswith("runs/")
    assert config.data.root == words[words.index("--data.root") + 1]


def test_the_choices_are_the_recipes():
    stage = recipe("margl-bp4d").regions
    o = stage.optimizer
    said = (
        f"momentum {o.momentum} (Nesterov), weight decay {o.weight_decay}, ×{o.step_factor} every "
        f"{o.step_epochs} epochs, {stage.epochs} epochs: AAR's; batches of {stage.batch} frames"
    )
    assert said in PAGE
    run = recipe("aar-bp4d")
    assert run.attention.batch == run.graph.batch == 1 and "1 clip of 48 frames" in PAGE
    assert run.data.validation == "none" and recipe("aar-disfa").initial_aus == "shared"
    assert f"**{cli.STOPPED}**" in PAGE and "carried" in PAGE and "carried" in score.__doc__


def test_what_training_waits_for_is_what_was_measured():
    record = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-28-training-2-threads.json"
    assert f"../benchmarks/results/{record.name}" in PAGE
    (found,) = re.findall(r"forward and backward on two threads take ([\d.]+) and ([\d.]+) of them", PAGE)
    text = record.read_text()
    for system, value in zip(("margl", "aar"), found, strict=True):
        assert f'"{system}: forward and backward": {value},' in text


def results(name):
    return json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / name).read_text())


def test_the_recorded_runs_hold_the_bars():
    """Mean F1 of 75 in five minutes on two cores, and above the ablated baseline over three seeds."""
    record = results("2026-11-28-synthetic-faces.json")
    means = {}
    for run in record["runs"]:
        means.setdefault(run["variant"], {})[run["seed"]] = run["mean"]
    assert all(sorted(found) == [0, 1, 2] for found in means.values())
    means = {variant: sum(found.values()) / 3 for variant, found in means.items()}
    assert means["margl"] > means["resnet18"] and means["aar"] > means["b-net"]
    timed = {name.split(",")[0]: run for name, run in record["two cores"].items() if name != "about"}
    for system in ("margl", "aar"):
        assert timed[system]["seconds"] <= 300 and timed[system]["mean"] >= 75 and means[system] >= 75


def test_the_recorded_loader_feeds_three_times_what_a_model_takes():
    speeds = results("2026-11-28-training-2-threads.json")["frames a second"]
    for system in ("margl", "aar"):
        assert speeds[f"{system}: one loader"] >= 3 * speeds[f"{system}: forward and backward"]


def test_the_record_is_what_the_page_says():
    record = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-28-synthetic-faces.json"
    assert f"../benchmarks/results/{record.name}" in PAGE
    runs = {(run["variant"], run["seed"]): run for run in json.loads(record.read_text())["runs"]}
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `([\w-]+)` \|(.*)\|(.*)\|(.*)\|(.*)\|$", PAGE, re.M)}
    assert rows.keys() == {"resnet18", "margl", "b-net", "aar"}
    for variant, cells in rows.items():
        found = [runs.get((variant, seed)) for seed in range(3)]
        said = [f"{run['mean']:.1f}" if run else "not run" for run in found]
        means = [run["mean"] for run in found if run]
        assert [cell.strip() for cell in cells] == [*said, f"{sum(means) / len(means):.1f}"]
        for run in filter(None, found):
            assert run["mean"] == pytest.approx(sum(run["f1"]) / 12, abs=0.01)
