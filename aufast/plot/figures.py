"""The pictures of both papers, for any face: AU centres, regions, attention maps and the AU graph.

Every function takes arrays and returns a Matplotlib `Figure` to save or to embed; none opens a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INITIAL, _ADAPTED = "tab:blue", "tab:red"  # as in MARGL Fig. 1
_DPI = 110


def _panels(columns: int, rows: int = 1, side: float = 2.2) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side * columns, side * rows + 0.5), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image, interpolation="bilinear")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def _name_row(axes: Axes, name: str) -> None:
    """Write what a row shows left of its first panel."""
    axes.text(-0.06, 0.5, name, transform=axes.transAxes, rotation=90, va="center", ha="right")


def plot_centers(image: np.ndarray, landmarks: np.ndarray, centers: np.ndarray, aus: Sequence[int]) -> Figure:
    """An aligned face with its landmarks and the two centres of every AU.

    Args:
        image: uint8 (H, W, 3).
        landmarks: (49, 2) pixels.
        centers: (2, m, 2) pixels.
        aus: the m AU numbers.
    """
    figure, axes = _panels(1, side=6.0)
    _show(axes[0, 0], image, "landmarks and AU centres")
    axes[0, 0].scatter(*np.asarray(landmarks).T, s=6, c="white", linewidths=0)
    labels: dict[tuple[float, float], list[str]] = {}
    for half in np.asarray(centers):
        for au, point in zip(aus, half, strict=True):
            labels.setdefault((round(float(point[0]), 1), round(float(point[1]), 1)), []).append(str(au))
    for (x, y), names in labels.items():
        axes[0, 0].scatter([x], [y], s=26, c=_ADAPTED, edgecolors="white", linewidths=0.6)
        axes[0, 0].annotate(
            ",".join(names), (x, y), xytext=(4, -3), textcoords="offset points", color="yellow", fontsize=8
        )
    return figure


def plot_rois(
    image: np.ndarray,
    initial: Sequence[np.ndarray],
    adapted: Sequence[np.ndarray],
    sizes: Sequence[int],
    aus: Sequence[int],
) -> Figure:
    """MARGL's initial (blue) and adapted (red) regions, a row a level and a column an AU, as in its Fig. 1.

    Args:
        image: uint8 (H, W, 3), the model's input.
        initial: per level (2m, 4) boxes in that level's feature pixels, left half first.
        adapted: as `initial`, after the learned scale factors.
        sizes: side of each level's feature map.
        aus: the m AU numbers.
    """
    from matplotlib.patches import Rectangle

    figure, axes = _panels(len(aus), len(sizes), side=1.7)
    for row, (before, after, size) in enumerate(zip(initial, adapted, sizes, strict=True)):
        scale = image.shape[1] / size  # image pixels a feature pixel
        for column, au in enumerate(aus):
            panel = axes[row, column]
            _show(panel, image, f"AU{au}" if row == 0 else "")
            # Dashes keep the initial box in sight where the adapted one still lies on it.
            for boxes, color, line in ((before, _INITIAL, "-"), (after, _ADAPTED, (0, (3, 3)))):
                for x1, y1, x2, y2 in np.asarray(boxes)[[column, column + len(aus)]] * scale - 0.5:
                    panel.add_patch(
                        Rectangle(
                            (x1, y1),
                            x2 - x1,
                            y2 - y1,
                            fill=False,
                            edgecolor=color,
                            linestyle=line,
                            linewidth=1.2,
                        )
                    )
            panel.set_xlim(-0.5, image.shape[1] - 0.5)
            panel.set_ylim(image.shape[0] - 0.5, -0.5)
        _name_row(axes[row, 0], f"{size}×{size}")
    figure.suptitle("regions of interest: initial (blue) and adapted (red, dashed)", fontsize=10)
    return figure


def plot_attention(
    image: np.ndarray, predefined: np.ndarray, learned: np.ndarray, aus: Sequence[int]
) -> Figure:
    """AAR's attention maps over the face: predefined above, learned below, the last column all AUs.

    Args:
        image: uint8 (H, W, 3), the model's input.
        predefined: (m, s, s) targets in [0, 1].
        learned: (m, s, s) maps in [0, 1].
        aus: the m AU numbers.
    """
    figure, axes = _panels(len(aus) + 1, 2, side=1.7)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    for row, maps in enumerate((np.asarray(predefined), np.asarray(learned))):
        titles = [f"AU{au}" for au in aus] + ["all"]
        for column, (values, title) in enumerate(zip([*maps, maps.max(axis=0)], titles, strict=True)):
            _show(axes[row, column], image, title if row == 0 else "")
            axes[row, column].imshow(values, extent=extent, cmap="jet", alpha=0.5, vmin=0, vmax=1)
        _name_row(axes[row, 0], ("predefined", "learned")[row])
    figure.suptitle("attention maps (0 blue, 1 red)", fontsize=10)
    return figure


def plot_curves(curves: dict[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """The loss over the steps of training, a panel a stage.

    Args:
        curves: title to steps and losses.
    """
    figure, axes = _panels(max(len(curves), 1), side=3.4)
    for panel, (title, (steps, losses)) in zip(axes[0], curves.items(), strict=True):
        panel.plot(steps, losses, color=_ADAPTED, linewidth=1)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("loss")
    return figure


def mark_synthetic(figure: Figure) -> None:
    """Say in the heading of a picture that the faces it is about were drawn.

    Args:
        figure: gets the word before its heading, or as its heading.
    """
    before = figure.get_suptitle()
    figure.suptitle(f"SYNTHETIC faces: {before}" if before else "SYNTHETIC faces", fontsize=10)


def plot_graphs(graphs: dict[str, tuple[np.ndarray, Sequence[int]]]) -> Figure:
    """AU graphs as matrices, one panel each.

    Args:
        graphs: by title, the (m, m) weights of each graph and its m AU numbers; entry (i, j) is what node i
            takes from node j.
    """
    figure, axes = _panels(len(graphs), side=4.2)
    for panel, (title, (weights, aus)) in zip(axes[0], graphs.items(), strict=True):
        picture = panel.imshow(np.asarray(weights), cmap="viridis", vmin=0)
        panel.set_title(title, fontsize=9)
        panel.set_xticks(range(len(aus)), [str(au) for au in aus], fontsize=7)
        panel.set_yticks(range(len(aus)), [str(au) for au in aus], fontsize=7)
        panel.set_xlabel("from AU")
        panel.set_ylabel("to AU")
        figure.colorbar(picture, ax=panel, shrink=0.8)
    return figure
