"""The figures: what they draw where, read back from the artists and from the pixels."""

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra `plot`)")
from matplotlib.patches import Rectangle

from aufast import plot
from aufast.plot.figures import plot_curves

AUS = (1, 12, 23)


def pixels(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_centers_are_drawn_at_their_pixels():
    centers = np.array([[[10.0, 20], [30, 40], [50, 60]], [[70, 20], [80, 40], [50, 80]]])
    figure = plot.plot_centers(np.zeros((100, 100, 3), np.uint8), np.full((49, 2), 5.0), centers, AUS)
    axes = figure.axes[0]
    drawn = {tuple(c.get_offsets()[0]) for c in axes.collections[1:]}
    assert drawn == {tuple(p) for p in centers.reshape(-1, 2)}
    assert {t.get_text() for t in axes.texts} == {"1", "12", "23"}


def test_centers_at_one_place_share_a_label():
    centers = np.full((2, 3, 2), 30.0)
    figure = plot.plot_centers(np.zeros((60, 60, 3), np.uint8), np.zeros((49, 2)), centers, AUS)
    assert [t.get_text() for t in figure.axes[0].texts] == ["1,12,23,1,12,23"]


def test_rois_are_scaled_to_image_pixels():
    """A box over feature pixels 0..1 of a map of 4 covers image pixels -0.5..24.5 of 100."""
    boxes = np.tile(np.array([[0.0, 0, 1, 1]]), (6, 1))
    adapted = boxes * 2
    figure = plot.plot_rois(np.zeros((100, 100, 3), np.uint8), [boxes], [adapted], [4], AUS)
    patches = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert len(patches) == 4
    assert patches[0].get_bbox().extents == pytest.approx([-0.5, -0.5, 24.5, 24.5])
    assert patches[2].get_bbox().extents == pytest.approx([-0.5, -0.5, 49.5, 49.5])
    assert patches[0].get_edgecolor() != patches[2].get_edgecolor()


def test_attention_colours_what_is_attended():
    predefined, learned = np.zeros((2, 3, 11, 11))
    predefined[0, 5, 5] = learned[2, 0, 0] = 1.0
    figure = plot.plot_attention(np.zeros((44, 44, 3), np.uint8), predefined, learned, AUS)
    assert len(figure.axes) == 8
    combined = figure.axes[3].images[1].get_array()
    assert combined[5, 5] == 1 and combined.sum() == 1
    picture = pixels(figure)
    redder = picture[..., 0] - picture[..., 2] > 30
    assert redder.any() and redder.mean() < 0.1, "an attended place is red, and only that"


def test_graphs_have_a_panel_each_with_their_own_aus():
    figure = plot.plot_graphs({"one": (np.eye(3), AUS), "two": (np.ones((2, 2)), (4, 6))})
    titles = [a.get_title() for a in figure.axes if a.get_title()]
    assert titles == ["one", "two"]
    for axes, aus in zip(figure.axes[:2], (["1", "12", "23"], ["4", "6"]), strict=True):
        assert [t.get_text() for t in axes.get_xticklabels()] == aus
        assert [t.get_text() for t in axes.get_yticklabels()] == aus


def test_curves_have_a_panel_each():
    figure = plot_curves({"a: first": ([1, 5], [2.0, 1.0]), "a: second": ([7], [0.5])})
    lines = [axes.get_lines()[0] for axes in figure.axes]
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 2.0], [5, 1.0]], [[7, 0.5]]]
    assert [axes.get_title() for axes in figure.axes] == ["a: first", "a: second"]
