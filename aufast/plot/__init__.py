"""Pictures of faces, regions, attention and graphs (needs the extra `plot`)."""

from aufast.plot.figures import plot_attention, plot_centers, plot_graphs, plot_rois

__all__ = ["plot_attention", "plot_centers", "plot_graphs", "plot_rois"]
