"""What a stage of training minimises: a batch of packed faces in, a loss out."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from aufast.faces import attention_targets, au_centers
from aufast.models import AAR, MARGL, relation_adjacency, to_input
from aufast.train.losses import attention_network_loss, margl_loss, occurrence_loss
from aufast.train.weights import AARWeights, class_weights, occurrence_rates


class Objective(nn.Module):
    """A model, or a part of it, and its loss.

    Called with a batch and the counts of the whole step, it gives this batch's part of the step's loss: the
    parts of all batches and processes add up to it.

    Args:
        model: what is trained.
        columns: (m,) of the labels, those of the model's AUs.
    """

    def __init__(self, model: MARGL | AAR, columns: Tensor):
        super().__init__()
        self.model = model
        self.columns = columns.to(next(model.parameters()).device)

    def targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Labels and mask (..., m) of the model's AUs."""
        return batch["labels"][..., self.columns], batch["mask"][..., self.columns]

    def counts(self, batch: dict[str, Tensor]) -> Tensor:
        """float64 (m + 1,): the frames in which each AU is coded, and all frames but padding."""
        _, mask = self.targets(batch)
        frames = batch["valid"].sum() if "valid" in batch else torch.tensor(len(mask), device=mask.device)
        return torch.cat([mask.reshape(-1, mask.shape[-1]).sum(0), frames[None]]).double()


class RegionObjective(Objective):
    """MARGL's loss, eq. (6)."""

    def __init__(self, model: MARGL, columns: Tensor, weights: Tensor):
        super().__init__(model, columns)
        self.weights = weights

    def forward(self, batch: dict[str, Tensor], counts: Tensor) -> Tensor:
        """This batch's part of the loss, a scalar."""
        config = self.model.config
        centers = au_centers(batch["landmarks"], config.aus, "margl")  # (B, 2, m, 2)
        found = self.model(to_input(batch["image"], config), centers)
        labels, mask = self.targets(batch)
        return margl_loss(found.level_logits, found.global_logits, labels, self.weights, mask, counts[:-1])


class AttentionObjective(Objective):
    """The loss of AAR's first stage, L_AA of eq. (6); without attention maps, Lu of eq. (4)."""

    def __init__(
        self, model: AAR, columns: Tensor, weights: AARWeights, attention_weight: float, delta: float
    ):
        super().__init__(model, columns)
        self.weights, self.attention_weight, self.delta = weights, attention_weight, delta
        for part in (model.graph, model.head):
            if part is not None:
                part.requires_grad_(False)
        model.frame.requires_grad_(True)

    def forward(self, batch: dict[str, Tensor], counts: Tensor) -> Tensor:
        """This batch's part of the loss, a scalar."""
        config = self.model.config
        frames = to_input(batch["images"], config).flatten(0, 1)  # (B·T, 3, l, l)
        _, attention, logits = self.model.frame(frames)  # (B·T, m, l/4, l/4), (B·T, m)
        labels, mask = (value.flatten(0, 1) for value in self.targets(batch))
        if attention is None:
            return occurrence_loss(logits, labels, self.weights, mask, counts[:-1])
        centers = au_centers(batch["landmarks"].flatten(0, 1), config.aus, "attention")
        targets = attention_targets(centers, self.model.attention_size, config.image_size, self.delta)
        return attention_network_loss(
            logits,
            attention,
            targets,
            labels,
            self.weights,
            mask,
            batch["valid"].flatten()[:, None].expand_as(mask),
            self.attention_weight,
            counts[:-1],
            counts[-1] * len(config.aus),
        )


class GraphObjective(Objective):
    """The loss of AAR's second stage, Lu⁽¹⁾ of eq. (14); the network of the first stage is frozen."""

    def __init__(self, model: AAR, columns: Tensor, weights: AARWeights):
        super().__init__(model, columns)
        self.weights = weights
        model.requires_grad_(True)
        model.frame.requires_grad_(False)

    def train(self, mode: bool = True) -> GraphObjective:
        """Training mode for the graph alone: the frozen network's statistics are frozen too."""
        super().train(mode)
        self.model.frame.eval()
        return self

    def forward(self, batch: dict[str, Tensor], counts: Tensor) -> Tensor:
        """This batch's part of the loss, a scalar."""
        found = self.model(to_input(batch["images"], self.model.config))
        labels, mask = self.targets(batch)
        return occurrence_loss(found.logits, labels, self.weights, mask, counts[:-1])


def training_weights(model: MARGL | AAR, labels: Tensor, mask: Tensor) -> Tensor | AARWeights:
    """Class weights of a model from the labels (n, m) it is trained on.

    Args:
        model: what is trained; "b-net" has no weights.
        labels, mask: (n, m) of the training videos alone.

    Raises:
        ValueError: an AU never occurs, or is coded nowhere.
    """
    aus = model.config.aus
    rates = occurrence_rates(labels, mask, aus=aus)
    kind: Literal["margl", "aar"] = "margl" if isinstance(model, MARGL) else "aar"
    weights = class_weights(rates, aus=aus, kind=kind)
    return AARWeights.uniform(len(aus)) if model.name == "b-net" else weights


def set_relations(model: MARGL | AAR, labels: Tensor, mask: Tensor, threshold: float) -> None:
    """Set MARGL's graph A0 from the labels (n, m) it is trained on, where the variant has one."""
    if isinstance(model, MARGL) and model.graph is not None:
        model.set_adjacency(relation_adjacency(labels, mask, aus=model.config.aus, threshold=threshold))
