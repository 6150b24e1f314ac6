"""Training and evaluation: losses, class weights and F1-frame of both papers, runs and their tables."""

from __future__ import annotations

from aufast.train.ablation import ablate
from aufast.train.config import (
    RECIPES,
    AARRun,
    DataConfig,
    MARGLRun,
    OptimizerConfig,
    StageConfig,
    recipe,
)
from aufast.train.loop import train
from aufast.train.losses import attention_loss, attention_network_loss, margl_loss, occurrence_loss
from aufast.train.metrics import F1Frame, F1Result
from aufast.train.report import Evaluation, evaluate_runs, published
from aufast.train.weights import AARWeights, class_weights, occurrence_rates

__all__ = [
    "RECIPES",
    "AARRun",
    "AARWeights",
    "DataConfig",
    "Evaluation",
    "F1Frame",
    "F1Result",
    "MARGLRun",
    "OptimizerConfig",
    "StageConfig",
    "ablate",
    "attention_loss",
    "attention_network_loss",
    "class_weights",
    "evaluate_runs",
    "margl_loss",
    "occurrence_loss",
    "occurrence_rates",
    "published",
    "recipe",
    "train",
]
