"""Small models, inputs for them, and the papers' losses, shared by the tests of the models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aufast.models import AAR, MARGL, create_model, list_models
from aufast.train import (
    AARWeights,
    attention_network_loss,
    margl_loss,
    occurrence_loss,
)

AUS = (1, 4, 12)
MARGL_NAMES = MARGL.variants
AAR_NAMES = AAR.variants
NAMES = list_models()
# Costly tests take these only with the slow ones: `roi` and `margl` have every part that these have.
BETWEEN = ("aroi", "aroi-intra", "maroi", "maroi-intra")
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in BETWEEN else name for name in NAMES]


def small(name: str, **options: object) -> MARGL | AAR:
    """A model that runs in milliseconds."""
    if name in MARGL_NAMES:
        sizes = {"image_size": 64, "squeeze": 8, "regional_channels": 8, "graph_width": 8, "crop_size": 4}
    else:
        sizes = {"image_size": 32, "width": 2, "embedding": 3}
    return create_model(name, **{"aus": AUS, **sizes, **options})


def inputs(
    model: MARGL | AAR, batch: int = 2, steps: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """What the model's forward takes: images and centres, or clips."""
    size, m = model.config.image_size, len(model.config.aus)
    if isinstance(model, MARGL):
        return torch.randn(batch, 3, size, size, dtype=dtype), torch.rand(batch, 2, m, 2, dtype=dtype) * size
    return (torch.randn(batch, steps, 3, size, size, dtype=dtype),)


def loss(model: MARGL | AAR, found: tuple, labels: Tensor) -> Tensor:
    """The paper's loss for this variant; AAR's two stages added up."""
    m = len(model.config.aus)
    if isinstance(model, MARGL):
        return margl_loss(found.level_logits, found.global_logits, labels, torch.ones(m))
    weights = AARWeights.uniform(m)
    total = occurrence_loss(found.logits, labels, weights)
    if found.attention is None:
        return total
    targets = torch.zeros_like(found.attention)
    targets[..., :2, :2] = 1
    return total + attention_network_loss(found.frame_logits, found.attention, targets, labels, weights)


def randomize(model: torch.nn.Module) -> None:
    """Move every parameter and running statistic away from its start."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith(("running_var", "adjacency")):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(0.05 * torch.randn_like(value))
