"""The first run: both models on a photograph, their pictures, and fused operators beside the reference."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from aufast import ops
from aufast.aus import AU_NAMES
from aufast.faces import (
    AlignedFace,
    FaceDetector,
    align_face,
    au_centers,
    crop_face,
    load_image,
)
from aufast.models import AAR, AAROutput, MARGLOutput, create_model, load_model, to_input
from aufast.ops.backends import choose

_MODELS = ("margl", "aar")


def run_demo(images: Sequence[str], *, weights: str | None = None, out: str = "demo") -> int:
    """Label photographs with both models, write pictures and print tables.

    Args:
        images: files; none means the photograph that scikit-image carries.
        weights: folder of saved models; None runs untrained ones, and says so.
        out: folder for the pictures, made if need be.

    Returns:
        The exit status: 0 if every image could be used.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    models = _load_models(weights)
    with _progress("loading the face detector"):
        detector = FaceDetector()
    failed, stems = 0, set()
    for name, image in _photographs(images):
        try:
            with _progress(f"{name}: finding the face"):
                face = _find_face(detector, name, image)
        except (ValueError, OSError) as error:
            print(f"aufast demo: {error}", file=sys.stderr)
            failed += 1
            continue
        stem = _free_stem(Path(name).stem, stems)
        _label(name, face, models, folder / stem)
    if failed < max(len(images), 1):
        compare_operators()
    return int(failed > 0)


def _photographs(images: Sequence[str]) -> Iterator[tuple[str, str | np.ndarray]]:
    if images:
        yield from ((str(path), str(path)) for path in images)
        return
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(
            "the demo's photograph comes with scikit-image: pip install scikit-image, or name an image"
        ) from error
    yield "astronaut", data.astronaut()


def _find_face(detector: FaceDetector, name: str, image: str | np.ndarray) -> AlignedFace:
    """The largest face of a photograph, aligned; every error names the photograph."""
    image = load_image(image) if isinstance(image, str) else image
    face = detector.detect_one(image, name)
    try:
        return align_face(image, face.landmarks)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _free_stem(stem: str, taken: set[str]) -> str:
    """A name for the pictures that no earlier photograph has: two folders may each hold a `1.jpg`."""
    free, count = stem, 1
    while free in taken:
        count += 1
        free = f"{stem}-{count}"
    taken.add(free)
    return free


def _load_models(weights: str | None) -> dict[str, nn.Module]:
    """The two models by name, trained ones where `weights` has them."""
    models: dict[str, nn.Module] = {}
    if weights is not None:
        root = Path(weights)
        folders = [root] if (root / "config.json").exists() else [root / name for name in _MODELS]
        for folder in folders:
            if folder.is_dir():
                with _progress(f"loading {folder}"):
                    model = load_model(folder).float()  # as the pixels
                models["aar" if isinstance(model, AAR) else "margl"] = model
        if not models:
            raise ValueError(f"--weights: no saved model in {root} or its folders {' and '.join(_MODELS)}")
    for name in _MODELS:
        if name not in models:
            print(
                f"{name}: UNTRAINED weights, so its numbers mean nothing; --weights DIR runs a trained model"
            )
            torch.manual_seed(0)
            models[name] = create_model(name).eval()
    return models


@torch.inference_mode()
def _label(name: str, face: AlignedFace, models: dict[str, nn.Module], target: Path) -> None:
    """Run both models on one aligned face, print its table and write its pictures, `target`-KIND.png."""
    margl, aar = models["margl"], models["aar"]
    small = crop_face(face, margl.config.image_size)
    centers = au_centers(small.landmarks, margl.config.aus, "margl")  # (2, m, 2)
    with _progress(f"{name}: MARGL"):
        points = torch.from_numpy(centers).float()[None]
        regions = margl(to_input(small.image, margl.config)[None], points)
    clip = crop_face(face, aar.config.image_size)
    with _progress(f"{name}: AAR"):
        frames = aar(to_input(clip.image, aar.config)[None, None])

    by_model = {
        "MARGL": dict(zip(margl.config.aus, regions.probabilities[0].tolist(), strict=True)),
        "AAR": dict(zip(aar.config.aus, frames.probabilities[0, 0].tolist(), strict=True)),
    }
    print(f"\n{name}: probability of each action unit\n  {'AU':<4} {'name':<22} {'MARGL':>6} {'AAR':>6}")
    for au in sorted(set(margl.config.aus) | set(aar.config.aus)):
        cells = " ".join(f"{row[au]:6.3f}" if au in row else f"{'-':>6}" for row in by_model.values())
        print(f"  {au:<4} {AU_NAMES[au]:<22} {cells}")
    with _progress(f"{name}: drawing"):
        written = _draw(target, small, centers, clip, models, regions, frames)
    print("  pictures: " + "  ".join(str(path) for path in written))


def _draw(
    target: Path,
    small: AlignedFace,
    centers: np.ndarray,
    clip: AlignedFace,
    models: dict[str, nn.Module],
    regions: MARGLOutput,
    frames: AAROutput,
) -> list[Path]:
    """Draw what these variants have: some have no regions, no attention or no graph."""
    from aufast import plot

    margl, aar = models["margl"], models["aar"]
    figures = {"centers": plot.plot_centers(small.image, small.landmarks, centers, margl.config.aus)}
    if regions.rois:
        figures["rois"] = plot.rois_figure(margl, small, centers, regions)
    if frames.attention is not None:
        figures["attention"] = plot.attention_figure(aar, clip, frames)
    if graphs := plot.learned_graphs(aar) | plot.learned_graphs(margl):
        figures["graph"] = plot.plot_graphs(graphs)
    written = []
    for kind, figure in figures.items():
        written.append(target.with_name(f"{target.name}-{kind}.png"))
        figure.savefig(written[-1])
    return written


def compare_operators() -> None:
    """Time each operator, fused against reference, at the papers' sizes on random numbers; print a table."""
    print(
        f"\nfused operators against the reference: float32, no gradients, {torch.get_num_threads()} threads,"
        " random input\n"
        f"  {'operator':<12} {'size':<38} {'by':<9} {'fused':>10} {'reference':>10} {'ratio':>7}"
        f" {'largest relative error':>23}"
    )
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    corners = torch.rand(4, 24, 2, generator=generator) * 14
    boxes = torch.cat([corners, corners + 10], dim=-1)  # (4, 24, 4)
    nodes = (draw(12, 8), draw(12, 8, scale=0.35))
    pools = [draw(8, 192, 96, scale=0.1) for _ in range(3)]
    cases = {
        "roi_crop": ("4 maps 128×24×24, 24 boxes to 6×6", (draw(4, 128, 24, 24), boxes)),
        "graph_conv": ("48×12 nodes, 192 to 96", (draw(48, 12, 192), *nodes, pools[0])),
        "graph_gru": ("clip of 48 frames, 12 nodes, 96", (draw(1, 48, 12, 96), *nodes, *pools)),
        "region_conv": (
            "8×8 patches of 176×176, 32 to 16",
            (
                draw(1, 32, 176, 176),
                draw(8, 8, 16, 32, 3, 3, scale=0.06),
                draw(8, 8, 16),
                draw(8, 8, 32),
                draw(8, 8, 32),
            ),
        ),
    }
    chosen = {name: choose(name, arguments[0], "auto") for name, (_, arguments) in cases.items()}
    for name, (size, arguments) in cases.items():
        operator = getattr(ops, name)
        with torch.inference_mode(), _progress(f"timing {name}"):
            fused, reference = (operator(*arguments, backend=backend) for backend in ("auto", "reference"))
            if isinstance(fused, tuple):
                fused, reference = fused[0], reference[0]
            error = float((fused - reference).abs().max() / reference.abs().max())
            times = _median_times(lambda b: operator(*arguments, backend=b), ("auto", "reference"))  # noqa: B023
        ours, theirs = (f"{1e3 * t:.3f} ms" for t in times)
        print(
            f"  {name:<12} {size:<38} {chosen[name]:<9} {ours:>10} {theirs:>10} {times[1] / times[0]:6.1f}×"
            f" {error:>23.1e}"
        )
    if "reference" in chosen.values():
        print("  by reference: no fused kernel of it can run here; `aufast backends` says why")


def _median_times(call, names: Sequence[str], seconds: float = 0.6) -> list[float]:
    """Median seconds of `call(name)` for each name, taken in turns so that a slow moment hits all alike."""
    times: list[list[float]] = [[] for _ in names]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for name, row in zip(names, times, strict=True):
            start = time.perf_counter()
            call(name)
            row.append(time.perf_counter() - start)
    return [float(np.median(row)) for row in times]


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Say what is being done while it is done; on a terminal the line goes away again."""
    watched = sys.stderr.isatty()
    print(f"  {what} …", end="\r" if watched else "\n", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if watched:
            print(" " * (len(what) + 4), end="\r", file=sys.stderr, flush=True)
