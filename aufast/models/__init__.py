"""The complete models: MARGL and AAR with their variants, and the ResNet-18 backbone."""

from aufast.models.aar import AAR, AARConfig, AAROutput
from aufast.models.inference import optimize_for_inference
from aufast.models.inputs import to_input
from aufast.models.margl import MARGL, MARGLConfig, MARGLOutput, relation_adjacency
from aufast.models.registry import create_model, list_models, load_model
from aufast.models.resnet import ResNet18, ResNetOutput
from aufast.models.streaming import AARStream

__all__ = [
    "AAR",
    "MARGL",
    "AARConfig",
    "AAROutput",
    "AARStream",
    "MARGLConfig",
    "MARGLOutput",
    "ResNet18",
    "ResNetOutput",
    "create_model",
    "list_models",
    "load_model",
    "optimize_for_inference",
    "relation_adjacency",
    "to_input",
]
