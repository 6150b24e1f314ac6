"""aufast: fused operators for facial action unit recognition and adaptive-graph recurrent networks."""

from aufast import models, nn, ops
from aufast.accelerate import accelerate
from aufast.models.inference import optimize_for_inference
from aufast.ops.backends import backends, explain, use_backend

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "accelerate",
    "backends",
    "explain",
    "models",
    "nn",
    "ops",
    "optimize_for_inference",
    "use_backend",
]
