"""Training does what it is for, with fused and with reference operators, in memory that does not grow."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aufast.data import Recipe, prepare_dataset, synthesize
from aufast.train import DataConfig, OptimizerConfig, evaluate_runs, recipe, train
from aufast.train.run import Log
from tests.train.runs import MAKERS, metrics


@pytest.mark.slow
@pytest.mark.parametrize("system", MAKERS)
def test_fused_and_reference_operators_train_alike(packed, tmp_path, system):
    """From one seed the losses of 50 steps differ by less than 1e-4."""
    gentle = {"optimizer": OptimizerConfig(lr=0.003, nesterov=True)}
    epochs, batch = {"margl": (7, 12), "aar": (7, 2)}[system]
    for backend in ("cpu", "reference"):
        config = MAKERS[system](
            packed, epochs=epochs, batch=batch, stage=gentle, backend=backend, save_every=0
        )
        train(config, tmp_path / backend)
    fused, reference = (
        torch.tensor([line["loss"] for line in metrics(tmp_path / backend)])
        for backend in ("cpu", "reference")
    )
    assert len(fused) >= 50
    assert (fused - reference).abs()[:50].max() < 1e-4
    assert fused[40:50].mean() < fused[:10].mean(), "and they learn"


@pytest.mark.slow
@pytest.mark.parametrize("system", MAKERS)
def test_memory_stays_flat_over_ten_thousand_frames(packed, tmp_path, monkeypatch, system):
    """Anonymous memory after 10,000 frames beside that after 2,500; mapped pixels are the system's."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc/self/status")
    frames, sizes = {"margl": 96, "aar": 16 * 6}[system], {}
    epochs = -(-10_000 // frames)

    def remember(self, step, values):
        (kib,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        sizes[step] = int(kib) / 1024

    monkeypatch.setattr(Log, "write", remember)
    stage = {"batch": {"margl": 48, "aar": 8}[system]}
    config = MAKERS[system](packed, epochs=epochs, stage=stage, save_every=0)
    if system == "aar":  # the second stage is no other loop
        config = replace(config, model=replace(config.model, variant="aa"))
    assert train(config, tmp_path / "run")
    steps = max(sizes)
    assert steps * frames / 2 >= 10_000
    assert sizes[steps] < sizes[steps // 4] + 16


@pytest.mark.slow
def test_a_small_margl_learns_synthetic_faces(tmp_path):
    """Unseen synthetic subjects, a minute of training; the whole recipe and its baselines are on record."""
    synthesize(tmp_path / "synthetic", Recipe(subjects=18, videos=2, frames=60, seed=8), workers=2)
    prepare_dataset(tmp_path / "synthetic", tmp_path / "packed", size=100, workers=2)
    small = recipe("margl-synthetic")
    data = DataConfig(root=str(tmp_path / "packed"), crop=small.data.crop, loaders=1)
    run = replace(small, data=data, regions=replace(small.regions, epochs=7))
    assert train(run, tmp_path / "run")
    evaluation = evaluate_runs([tmp_path / "run"])
    assert evaluation.synthetic and evaluation.pooled.mean >= 70
