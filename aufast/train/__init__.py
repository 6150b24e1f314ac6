"""Training: losses, class weights and F1-frame of both papers."""

from __future__ import annotations

from aufast.train.losses import attention_loss, attention_network_loss, margl_loss, occurrence_loss
from aufast.train.metrics import F1Frame, F1Result
from aufast.train.weights import AARWeights, class_weights, occurrence_rates

__all__ = [
    "AARWeights",
    "F1Frame",
    "F1Result",
    "attention_loss",
    "attention_network_loss",
    "class_weights",
    "margl_loss",
    "occurrence_loss",
    "occurrence_rates",
]
