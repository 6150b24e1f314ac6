"""Several processes take the steps that one takes, and count every test frame once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aufast.train import evaluate_runs, train
from aufast.train.checkpoint import load_checkpoint
from tests.train.runs import MAKERS, metrics

ROOT = Path(__file__).parents[2]
WORLD = 2
SIZES = {
    "margl": {"epochs": 1, "batch": 6, "device": "cpu"},
    "aar": {"epochs": 2, "batch": 2, "device": "cpu"},
}


# What each process does: trains, tests, and writes down what it found.
SCRIPT = """
import atexit, dataclasses, json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from aufast.train import evaluate_runs, train
from aufast.train.checkpoint import load_checkpoint
from tests.groups import group_threads
from tests.train.runs import MAKERS
from tests.train.test_processes import SIZES
system, packed, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
left = folder / (os.environ["RANK"] + ".left")
atexit.register(lambda: left.write_text(json.dumps(group_threads())))  # what comes first runs last
assert train(MAKERS[system](packed, **SIZES[system]), folder / "two")
found = dataclasses.asdict(evaluate_runs([folder / "two"], device="cpu"))
assert group_threads()
(folder / (os.environ["RANK"] + ".json")).write_text(json.dumps(found))
"""


def torchrun(folder: Path, script: str, *words: object) -> subprocess.Popen:
    """Start a script as two processes that find each other over gloo."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command += [str(folder / "script.py"), *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("system", MAKERS)
def test_two_processes_take_the_steps_of_one(packed, tmp_path, system):
    """Labels are masked unevenly, so a mean of the processes' means would go elsewhere.

    One process that accumulates two batches sees what two processes see, also by batch normalisation. Its
    running statistics take both batches and those of the first process one, so they are not compared.
    """
    process = torchrun(tmp_path, SCRIPT, system, packed, tmp_path)
    _, error = process.communicate()
    assert process.returncode == 0, error
    config = MAKERS[system](packed, stage={"accumulate": WORLD}, **SIZES[system])
    train(config, tmp_path / "one")
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    first_stage = [line["loss"] for line in one if line["stage"] != "graph"]
    assert len(one) == len(two) and len(first_stage) >= 6
    torch.testing.assert_close(
        torch.tensor([line["loss"] for line in two][: len(first_stage)]),
        torch.tensor(first_stage),
        rtol=1e-4,
        atol=0,
    )
    if system == "margl":  # AAR's second stage reads the running statistics of the first
        expected, found = (
            load_file(tmp_path / name / "last" / "model.safetensors") for name in ("one", "two")
        )
        for key, value in expected.items():
            if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)
    # Both tested the run together; each found what one process finds that tests it all.
    alone = json.dumps(dataclasses.asdict(evaluate_runs([tmp_path / "two"], device="cpu")))
    assert [(tmp_path / f"{rank}.json").read_text() for rank in range(WORLD)] == [alone] * WORLD
    assert sum(json.loads(alone)["pooled"]["frames"]) > 0
    assert [(tmp_path / f"{rank}.left").read_text() for rank in range(WORLD)] == ["[]"] * WORLD


@pytest.mark.parametrize("system", MAKERS)
def test_gradients_of_one_step_add_up(packed, tmp_path, monkeypatch, system):
    """A step over accumulated batches has the gradient of the batches' summed parts, by autograd itself."""
    from aufast.train.loop import Trainer
    from aufast.train.processes import join

    config = MAKERS[system](packed, batch=2, stage={"accumulate": 3})
    seen = []
    inner = Trainer._step

    def step(self, wrapped, optimizer, batches):
        counts = sum(wrapped.counts(batch) for batch in batches)
        state = {key: value.clone() for key, value in wrapped.state_dict().items()}
        total = sum(wrapped(batch, counts) for batch in batches)
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        expected = torch.autograd.grad(total, parameters)
        wrapped.load_state_dict(state)
        loss, norm, stop = inner(self, wrapped, optimizer, batches)
        seen.append(norm)
        assert loss == pytest.approx(float(total), rel=1e-5)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        return loss, norm, stop

    monkeypatch.setattr(Trainer, "_step", step)
    assert train(config, tmp_path / "run")
    assert len(seen) > 2 and min(seen) > 0
    processes = join("cpu")
    assert (processes.rank, processes.world) == (0, 1)


STOPPED = """
import sys
import time
from pathlib import Path
import torch
torch.set_num_threads(1)
from aufast.train import train
from tests.train.runs import MAKERS
config = MAKERS["margl"](Path(sys.argv[1]), epochs=500, batch=6, device="cpu")
sys.exit(0 if train(config, sys.argv[2]) else 75)
"""


@pytest.mark.slow
def test_sigterm_reaches_all_processes_and_one_saves(packed, tmp_path):
    run = tmp_path / "run"
    process = torchrun(tmp_path, STOPPED, packed, run)
    deadline = time.monotonic() + 120
    while not (run / "last").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1, "torchrun's own status"
    steps = [line["step"] for line in metrics(run)]
    position = load_checkpoint(run / "last")[2]
    assert position.step == steps[-1] == len(steps), error
    assert not position.finished
