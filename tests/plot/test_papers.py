"""The papers' figures for a model and a face, the overlay's geometry, and `aufast plot`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra `plot`)")
pytest.importorskip("dlib", reason="finding the face needs dlib (extra `faces`)")
from skimage import data

from aufast import plot
from aufast.cli import main
from aufast.faces import FaceDetector, align_face
from aufast.plot.overlay import COLORS, PANEL
from tests.models.examples import EACH, NAMES, small


@pytest.fixture(scope="module")
def aligned():
    photograph = data.astronaut()
    return align_face(photograph, FaceDetector().detect_one(photograph).landmarks)


KINDS = {
    **dict.fromkeys(NAMES, {"centers", "rois", "graph"}),
    "resnet18": {"centers"},
    **dict.fromkeys(("roi", "aroi", "maroi"), {"centers", "rois"}),
    **dict.fromkeys(("b-net", "bw-net"), {"centers"}),
    "aa": {"centers", "attention"},
    **dict.fromkeys(("aa-gsh", "aa-gsp", "aa-gsp-tavg", "aar"), {"centers", "attention", "graph"}),
}


@pytest.mark.parametrize("name", EACH)
def test_every_variant_draws_what_it_has(name: str, aligned) -> None:
    assert plot.paper_figures(small(name).eval(), aligned).keys() == KINDS[name]


def test_the_graph_is_the_learned_one() -> None:
    model = small("aar")
    (first, aus), _ = plot.learned_graphs(model).values()
    raw = torch.relu(model.graph[0].U @ model.graph[0].U.T)
    np.testing.assert_allclose(first, (raw / raw.sum()).detach(), rtol=1e-5)
    assert aus == model.config.aus


def test_the_command_writes_pictures(tmp_path: Path, capsys) -> None:
    from PIL import Image

    Image.fromarray(data.astronaut()).save(tmp_path / "face.png")
    small("aar").save_pretrained(tmp_path / "model")
    arguments = ["plot", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert main([*arguments, str(tmp_path / "face.png")]) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["face-attention.png", "face-centers.png", "face-graph.png"]
    assert capsys.readouterr().out.count(".png") == 3
    assert main([*arguments, str(tmp_path / "none.png")]) == 1


# ---- overlays ------------------------------------------------------------------------------------

IMAGE = np.full((400, 300, 3), 40, np.uint8)
# The aligned face, 100 wide, is the image's part from (50, 80) on, at half the size.
MATRIX = np.array([[0.5, 0, -25], [0, 0.5, -40]])


def changed(face: plot.FaceView, aus=(1,), image=IMAGE) -> np.ndarray:
    """Where the picture differs from one without the face, (H, W) bool, without the bars."""
    drawn, plain = (plot.draw_overlay(image, faces, aus) for faces in ([face], []))
    return (drawn != plain).any(axis=2)[:, :-PANEL]


def test_attention_lies_where_the_face_was_cut() -> None:
    attention = np.zeros((10, 10))
    attention[3, 6] = 1.0  # aligned pixels 60 to 70 across, 30 to 40 down: image from (170, 140), 20 wide
    face = plot.FaceView(0, (0, 0, 0, 0), attention=attention, matrix=MATRIX, size=100)
    rows, columns = np.nonzero(changed(face))
    weight = rows.mean(), columns.mean()
    assert weight == pytest.approx((149.5, 179.5), abs=1.0)
    assert columns.max() - columns.min() <= 40, "the cell and its bilinear foot"


def test_regions_lie_where_the_face_was_cut() -> None:
    face = plot.FaceView(0, (0, 0, 0, 0), rois=np.array([[10.0, 20, 30, 60]]), matrix=MATRIX, size=100)
    rows, columns = np.nonzero(changed(face))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (70, 110, 120, 200)


def test_landmarks_and_boxes_lie_at_their_pixels() -> None:
    rows, columns = np.nonzero(changed(plot.FaceView(0, (0, 0, 0, 0), points=np.array([[120.0, 33.0]]))))
    assert (rows.mean(), columns.mean()) == pytest.approx((33, 120), abs=0.6)
    rows, columns = np.nonzero(changed(plot.FaceView(0, (20, 30, 60, 90))))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((20, 60, 30, 90), abs=1)


def test_small_frames_are_drawn_larger_and_sides_are_even() -> None:
    for height, width in ((120, 160), (401, 333), (1, 1)):
        picture = plot.draw_overlay(np.zeros((height, width, 3), np.uint8), [], (1, 2))
        assert picture.shape[0] >= 360 and picture.shape[0] % 2 == picture.shape[1] % 2 == 0


@pytest.mark.parametrize("shape", [(10, 30_000), (30_000, 10), (1, 9_000), (5_000, 7_000)])
def test_overlays_of_thin_and_huge_frames_stay_small(shape: tuple[int, int]) -> None:
    """A strip of 10 pixels is not to be enlarged to 360: it would be a million wide."""
    picture = plot.draw_overlay(np.full((*shape, 3), 200, np.uint8), [], (1, 2))
    assert max(picture.shape) <= 4096 + PANEL and picture.shape[0] >= 360
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
    assert (picture[0, 0] == 200).all(), "the frame is there"


def test_bars_are_as_long_as_probabilities_and_dim_below_the_threshold() -> None:
    face = plot.FaceView(1, (0, 0, 0, 0), probabilities=np.array([0.25, 1.0]))
    panel = plot.draw_overlay(IMAGE, [face], (1, 2))[:, -PANEL:].astype(int)
    dim = (panel == [v // 2 for v in COLORS[1]]).all(axis=2).sum(axis=1).max()
    bright = (panel == COLORS[1]).all(axis=2).sum(axis=1).max()
    assert dim == pytest.approx(bright / 4, abs=2) and bright > 80


def test_landmarks_that_are_nowhere_are_not_drawn() -> None:
    assert not changed(plot.FaceView(0, (0, 0, 0, 0), points=np.full((49, 2), np.nan))).any()
