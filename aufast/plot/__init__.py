"""Pictures of faces, regions, attention, graphs and training (needs the extra `plot`)."""

from aufast.plot.figures import (
    mark_synthetic,
    plot_attention,
    plot_centers,
    plot_curves,
    plot_graphs,
    plot_rois,
)
from aufast.plot.overlay import FaceView, draw_overlay
from aufast.plot.papers import attention_figure, learned_graphs, paper_figures, rois_figure

__all__ = [
    "FaceView",
    "attention_figure",
    "draw_overlay",
    "learned_graphs",
    "mark_synthetic",
    "paper_figures",
    "plot_attention",
    "plot_centers",
    "plot_curves",
    "plot_graphs",
    "plot_rois",
    "rois_figure",
]
