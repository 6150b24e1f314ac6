"""Runs that take a second: small synthetic data, small models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from aufast.models import AARConfig, MARGLConfig
from aufast.train.config import AARRun, DataConfig, MARGLRun, OptimizerConfig, StageConfig

AUS = (12, 6, 10)  # often present, and not in the order of the data's columns


def data(root: Path, /, **options: Any) -> DataConfig:
    return DataConfig(**{"root": str(root), "crop": (36, 40), "loaders": 0, "part": 3, **options})


def margl(root: Path, *, epochs: int = 2, batch: int = 8, **options: Any) -> MARGLRun:
    sizes = {"image_size": 32, "backbone_width": 4, "squeeze": 4, "regional_channels": 4, "graph_width": 4}
    model = {"aus": AUS, "crop_size": 2, "roi_sizes": (2, 2, 1), **sizes, **options.pop("model", {})}
    stage = {"epochs": epochs, "batch": batch, **options.pop("stage", {})}
    return MARGLRun(
        data=data(root, **options.pop("data", {})),
        model=MARGLConfig(**model),
        regions=StageConfig(**{"optimizer": OptimizerConfig(lr=0.01, schedule="step"), **stage}),
        **{"log_every": 1, "save_every": 3, **options},
    )


def aar(root: Path, *, epochs: int = 2, batch: int = 2, **options: Any) -> AARRun:
    model = {"aus": AUS, "image_size": 32, "width": 1, "embedding": 2, **options.pop("model", {})}
    stage = {"epochs": epochs, "batch": batch, "clip": 6, **options.pop("stage", {})}
    adam = OptimizerConfig(kind="adam", lr=0.006)
    return AARRun(
        data=data(root, **{"crop": (32, 32), **options.pop("data", {})}),
        model=AARConfig(**model),
        attention=StageConfig(**{"optimizer": OptimizerConfig(nesterov=True, weight_decay=5e-4), **stage}),
        graph=StageConfig(**{"optimizer": adam, **stage}),
        **{"log_every": 1, "save_every": 3, **options},
    )


MAKERS = {"margl": margl, "aar": aar}


def outcome(run: Path) -> dict[str, Any]:
    """What a run came to: its weights, moments and measurements, without the times."""
    sums = {
        name: hashlib.sha256((run / "last" / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    }
    return {**sums, "metrics": metrics(run)}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
