"""The figures of both papers for one face and one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from aufast.faces import AlignedFace, attention_targets, au_centers, crop_face
from aufast.models import AAR, MARGL, AAROutput, MARGLOutput, to_input
from aufast.plot.figures import plot_attention, plot_centers, plot_graphs, plot_rois
from aufast.reference.graph_conv import global_adjacency

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.inference_mode()
def paper_figures(model: MARGL | AAR, face: AlignedFace) -> dict[str, Figure]:
    """Run a model on a face and draw what it has: some variants have no regions, no attention or no graph.

    Args:
        model: in evaluation mode, on the CPU.
        face: aligned, at least as large as the model's input.

    Returns:
        "centers", "rois" (MARGL), "attention" (AAR) and "graph", those that there are.

    Raises:
        ValueError: the face is smaller than the model's input.
    """
    config = model.config
    face = crop_face(face, config.image_size)
    pixels = to_input(face.image, config)
    figures = {}
    if isinstance(model, MARGL):
        centers = au_centers(face.landmarks, config.aus, "margl")  # (2, m, 2)
        found = model(pixels[None], torch.from_numpy(centers).float()[None])
        if found.rois:
            figures["rois"] = rois_figure(model, face, centers, found)
    else:
        centers = au_centers(face.landmarks, config.aus, "attention")
        found = model(pixels[None, None])
        if found.attention is not None:
            figures["attention"] = attention_figure(model, face, found)
    if graphs := learned_graphs(model):
        figures["graph"] = plot_graphs(graphs)
    return {"centers": plot_centers(face.image, face.landmarks, centers, config.aus), **figures}


def rois_figure(model: MARGL, face: AlignedFace, centers: np.ndarray, found: MARGLOutput) -> Figure:
    """Initial and adapted regions of every AU at every level (MARGL Fig. 1).

    Args:
        model: that gave `found`.
        face: its input, of the model's size.
        centers: (2, m, 2), its AU centres.
        found: for a batch of one.
    """
    initial = model.initial_rois(torch.from_numpy(centers).float()[None])
    boxes = ([level[0].numpy() for level in levels] for levels in (initial, found.rois))
    return plot_rois(face.image, *boxes, model.level_sizes, model.config.aus)


def attention_figure(model: AAR, face: AlignedFace, found: AAROutput) -> Figure:
    """Predefined and learned attention of every AU, and of all together.

    Args:
        model: that gave `found`.
        face: its input, of the model's size.
        found: for one clip of one frame.
    """
    config = model.config
    centers = au_centers(face.landmarks, config.aus, "attention")
    targets = attention_targets(centers, size=model.attention_size, image_size=config.image_size)
    return plot_attention(face.image, targets.numpy(), found.attention[0, 0].numpy(), config.aus)


def learned_graphs(model: MARGL | AAR) -> dict[str, tuple[np.ndarray, tuple[int, ...]]]:
    """The AU graphs of `model` by title, as `plot_graphs` takes them; none where it has none."""
    aus = model.config.aus
    if isinstance(model, MARGL):
        return {} if model.graph is None else {"MARGL: relations A0": (model.adjacency.numpy(), aus)}
    with torch.no_grad():
        return {
            f"AAR: N(ReLU(UUᵀ)) of graph layer {k}": (global_adjacency(layer.U).numpy(), aus)
            for k, layer in enumerate(model.graph, 1)
        }
