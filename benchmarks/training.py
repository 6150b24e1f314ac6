"""What training waits for: preparing, loading, and the models themselves. `python -m benchmarks.training`

Drawn faces, packed at the papers' 200 pixels; figures are frames a second. Preparing is timed with one
process and with two; then one loader, and forward and backward of the first stage at the papers' sizes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from aufast.data import Recipe, prepare_dataset, synthesize
from aufast.train.batches import Batches, make_loader
from aufast.train.config import AARRun, MARGLRun, recipe
from aufast.train.loop import Trainer
from aufast.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
FACES = Recipe(subjects=12, videos=2, frames=150, seed=1)


def prepare_rates(root: Path, folder: Path) -> Iterator[tuple[str, float]]:
    """Frames a second of `aufast data prepare`, start of the processes included."""
    for workers in (1, 2):
        start = time.perf_counter()
        summary = prepare_dataset(root, folder / f"packed-{workers}", workers=workers)
        yield f"prepare, {workers} processes", summary.frames / (time.perf_counter() - start)


def run_rates(run: MARGLRun | AARRun, folder: Path) -> Iterator[tuple[str, float]]:
    """Frames a second of a loader, and of training steps in the first stage."""
    torch.manual_seed(0)
    trainer = Trainer(
        replace(run, data=replace(run.data, root=str(folder / "packed-1"))), folder / "run", ALONE
    )
    name, stage = next(iter(trainer.config.stages.items()))
    dataset = trainer._dataset(stage)
    batches = Batches(len(dataset), stage.batch, 1, 0, 1, 0)
    frames = stage.batch * (stage.clip if isinstance(run, AARRun) else 1)
    loader = make_loader(dataset, batches, 1, ALONE.device)
    for epoch in range(2):  # the first epoch starts the process and maps the files
        batches.set_epoch(epoch, 0)
        start = time.perf_counter()
        *_, batch = loader
    yield f"{run.model.variant}: one loader", batches.steps * frames / (time.perf_counter() - start)
    objective = trainer._objective(name).train()
    if isinstance(run, AARRun):  # a whole clip takes a minute here
        batch = {key: value[:, :8] if value.dim() > 1 else value for key, value in batch.items()}
    counts, times = objective.counts(batch), []
    for _ in range(3):
        start = time.perf_counter()
        objective(batch, counts).backward()
        times.append(time.perf_counter() - start)
    yield f"{run.model.variant}: forward and backward", float(counts[-1]) / min(times)


def main() -> None:
    """Measure, print, and save where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="FILE", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = synthesize(folder / "synthetic", FACES, workers=2)
        rates = dict(prepare_rates(root, folder))
        for run in (recipe("margl-bp4d"), recipe("aar-bp4d")):
            rates |= run_rates(run, folder)
    for what, rate in rates.items():
        print(f"{what:<40} {rate:10.1f} frames/s")
    if options.save:
        from benchmarks.gpu import about

        options.save.write_text(json.dumps({**about("cpu"), "frames a second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
