"""A run that was stopped, in whatever way, ends as one that was not: bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aufast.train import checkpoint, evaluate_runs, loop
from aufast.train.checkpoint import load_checkpoint
from aufast.train.loop import Trainer, train
from tests.train.runs import MAKERS, outcome

ROOT = Path(__file__).parents[2]
# A run in a process of its own, which ends itself without a word after some calls of a function.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from aufast.train import checkpoint, loop
from tests.train.runs import MAKERS
system, packed, out, where, calls = sys.argv[1:]
owner = {"_step": loop.Trainer, "sync_folder": checkpoint, "write_whole": checkpoint}[where]
left, inner = int(calls), getattr(owner, where)
def count(*arguments, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*arguments, **options)
setattr(owner, where, count)
loop.train(MAKERS[system](Path(packed), data={"loaders": 1}), out, resume=True)
"""


@pytest.mark.parametrize("system", MAKERS)
def test_sigterm_saves_and_the_run_goes_on(packed, tmp_path, monkeypatch, system):
    config = MAKERS[system](packed)
    assert train(config, tmp_path / "whole")
    inner, calls = Trainer._step, []

    def step(self, *arguments):
        calls.append(1)
        if len(calls) in (4, 11):  # in the first and in the second epoch or stage
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", step)
    handler = signal.getsignal(signal.SIGTERM)
    assert not train(config, tmp_path / "stopped")
    assert not train(config, tmp_path / "stopped", resume=True)
    assert train(config, tmp_path / "stopped", resume=True)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    steps = len(calls)
    assert train(config, tmp_path / "stopped", resume=True), "a finished run is finished"
    assert len(calls) == steps, "and nothing is done again: no step was taken twice either"
    assert steps == sum(1 for line in outcome(tmp_path / "whole")["metrics"] if "loss" in line)


@pytest.mark.slow
@pytest.mark.parametrize("system", MAKERS)
def test_kill_at_random_moments(packed, tmp_path, system):
    """SIGKILL before a random step, and twice inside the writing of a checkpoint; loaders outlive nothing."""
    chance = random.Random(system)
    train(MAKERS[system](packed), tmp_path / "whole")
    places = [("_step", chance.randrange(1, 11)), ("write_whole", 3), ("sync_folder", chance.randrange(3, 6))]
    for where, calls in places:
        words = [system, packed, tmp_path / "killed", where, calls]
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *map(str, words)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert train(MAKERS[system](packed), tmp_path / "killed", resume=True)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert names == {(tmp_path / "killed" / link).resolve().name for link in ("last", "best")}


def test_best_moves_though_the_kill_came_after_last_had_moved(packed, tmp_path, monkeypatch):
    inner = checkpoint._move_link

    def move(run, link, name):
        if link == "best" and (run / "best").exists():  # of the first epoch
            raise KeyboardInterrupt
        inner(run, link, name)

    config, run = MAKERS["margl"](packed), tmp_path / "run"
    monkeypatch.setattr(checkpoint, "_move_link", move)
    with pytest.raises(KeyboardInterrupt):
        train(config, run)
    assert (run / "best").resolve() != (run / "last").resolve()
    monkeypatch.undo()
    tested = evaluate_runs([run])
    assert tested.text() == evaluate_runs([run], link="last").text(), "known before the move"
    assert (run / "best").resolve() != (run / "last").resolve(), "and nothing was written"
    assert train(config, run, resume=True)
    (kept,) = (run / "checkpoints").iterdir()
    assert kept == (run / "best").resolve() == (run / "last").resolve()


def test_a_line_of_steps_done_again_is_not_there_twice(packed, tmp_path, monkeypatch):
    """Measured after the last checkpoint, then killed: those steps are measured again, once."""
    config = MAKERS["margl"](packed, save_every=0)
    monkeypatch.setattr(loop, "save_checkpoint", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True)
    steps = [line["step"] for line in outcome(tmp_path / "run")["metrics"]]
    assert steps == sorted(set(steps))


def test_a_checkpoint_is_a_model_folder(packed, tmp_path):
    from aufast.models import load_model

    train(MAKERS["aar"](packed, epochs=1), tmp_path / "run")
    model, moments, position = load_checkpoint(tmp_path / "run" / "last")
    assert position.finished and not moments
    for key, value in load_model(tmp_path / "run" / "best").state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
