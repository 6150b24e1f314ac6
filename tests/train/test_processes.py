"""Several processes take the steps that one takes, and count every test frame once."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from aufast.train import evaluate_runs, train
from tests.train.runs import MAKERS, metrics

WORLD = 2
SIZES = {
    "margl": {"epochs": 1, "batch": 6, "device": "cpu"},
    "aar": {"epochs": 2, "batch": 2, "device": "cpu"},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(rank: int, port: int, system: str, packed: Path, folder: Path) -> None:
    """One of the processes that torchrun would start: trains, then tests."""
    import os

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    config = MAKERS[system](packed, **SIZES[system])
    assert train(config, folder / "two")
    evaluation = evaluate_runs([folder / "two"], device="cpu")
    (folder / f"{rank}.json").write_text(json.dumps(dataclasses.asdict(evaluation)))


@pytest.mark.slow
@pytest.mark.parametrize("system", MAKERS)
def test_two_processes_take_the_steps_of_one(packed, tmp_path, system):
    """Labels are masked unevenly, so a mean of the processes' means would go elsewhere.

    One process that accumulates two batches sees what two processes see, also by batch normalisation. Its
    running statistics take both batches and those of the first process one, so they are not compared.
    """
    mp.spawn(work, (free_port(), system, packed, tmp_path), nprocs=WORLD)
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
