"""All the way on synthetic faces: draw, pack, train a small MARGL and a small AAR, test and picture them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from aufast.data import PackedVideo, Recipe, prepare_dataset, synthesize
from aufast.faces import attention_targets, au_centers
from aufast.models import AAR, MARGL, load_model, to_input
from aufast.train.batches import make_split
from aufast.train.config import AARRun, MARGLRun, recipe
from aufast.train.loop import train
from aufast.train.report import evaluate_runs
from aufast.train.run import METRICS

FACES = Recipe(subjects=24, videos=2, frames=100, seed=5)
SIZE = 100  # of a packed face; what the small recipes crop from


def short_run(
    out: str | os.PathLike[str],
    *,
    runs: tuple[MARGLRun | AARRun, ...] = (recipe("margl-synthetic"), recipe("aar-synthetic")),
    faces: Recipe = FACES,
    size: int = SIZE,
    workers: int = 2,
    say: Callable[[str], None] = print,
) -> bool:
    """Train small models on drawn faces, test them on faces of other subjects, and write tables and pictures.

    What is there already is kept, so a run that was stopped goes on.

    Args:
        out: a folder; OUT/synthetic, OUT/packed, OUT/margl and OUT/aar are made, and OUT/*.png.
        runs: what is trained; their data's root is replaced.
        faces: what is drawn.
        size: side of a packed face.
        workers: processes that draw and pack.
        say: is given the tables and the pictures' names.

    Returns:
        True when it is done; False when SIGTERM stopped a training.
    """
    out = Path(out)
    if not (out / "synthetic").exists():
        synthesize(out / "synthetic", faces, workers)
    prepare_dataset(out / "synthetic", out / "packed", size=size, workers=workers)
    curves = {}
    for run in runs:
        name = run.model.variant
        run = replace(run, data=replace(run.data, root=str(out / "packed"), part=3))
        if not train(run, out / name, resume=True):
            return False
        evaluation = evaluate_runs([out / name])
        evaluation.save(out / name)
        say(f"\n{evaluation.text()}\n")
        curves |= _curves(name, out / name / METRICS)
        test = make_split(run.data, run.model.aus).test
        say(f"picture: {_picture(out, load_model(out / name / 'best'), test[0])}")
    say(f"picture: {_save_curves(out, curves)}")
    return True


def _curves(name: str, path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and losses of each stage of a run."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "loss" in line:
            steps, losses = curves.setdefault(f"{name}: {line['stage']}", ([], []))
            steps.append(line["step"])
            losses.append(line["loss"])
    return curves


def _save_curves(out: Path, curves: dict[str, tuple[list[int], list[float]]]) -> Path:
    from aufast.plot import mark_synthetic
    from aufast.plot.figures import plot_curves

    path = out / "curves.png"
    figure = plot_curves(curves)
    mark_synthetic(figure)
    figure.savefig(path)
    return path


@torch.inference_mode()
def _picture(out: Path, model: MARGL | AAR, video: PackedVideo) -> Path:
    """Draw what a model learned to look at, on the frame of a video that shows the most AUs."""
    from aufast import plot

    frame, side, aus = int(video.labels.sum(1).argmax()), model.config.image_size, model.config.aus
    edge = (video.frames.shape[1] - side) // 2
    image = np.array(video.frames[frame, edge : edge + side, edge : edge + side])
    points = torch.from_numpy(video.landmarks[frame] - edge)
    pixels = to_input(image, model.config)[None]
    if isinstance(model, MARGL):
        centers = au_centers(points, aus, "margl")[None]
        boxes = [
            [level[0].numpy() for level in rois]
            for rois in (model.initial_rois(centers), model(pixels, centers).rois)
        ]
        figure = plot.plot_rois(image, *boxes, model.level_sizes, aus)
    else:
        targets = attention_targets(au_centers(points, aus, "attention"), model.attention_size, side)
        learned = model(pixels[None]).attention[0, 0]
        figure = plot.plot_attention(image, targets.numpy(), learned.numpy(), aus)
    plot.mark_synthetic(figure)
    path = out / f"{model.name}-{'rois' if isinstance(model, MARGL) else 'attention'}.png"
    figure.savefig(path)
    return path
