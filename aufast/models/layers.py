"""What both models share: per-AU heads, activations, and checks of what a forward pass is given."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


class NodeLinear(nn.Module):
    """One fully connected output of its own for every node: a row of `weight` and an entry of `bias` each.

    Args:
        nodes: n.
        features: width of a node's features.
    """

    def __init__(
        self,
        nodes: int,
        features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nodes, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(nodes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map node features (..., n, features) to one number each (..., n)."""
        return (x * self.weight).sum(-1) + self.bias

    def extra_repr(self) -> str:
        return f"nodes={self.weight.shape[0]}, features={self.weight.shape[1]}"


def full_precision(logits: Tensor) -> Tensor:
    """Logits in at least float32: a loss and a threshold need more than eight bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_pictures(model: nn.Module, name: str, pictures: Tensor, axes: str) -> None:
    """Check images or clips: rank, channels, size, dtype and device.

    Args:
        model: has `name` and `config.image_size`.
        name: of the argument.
        pictures: its value.
        axes: the axes before (3, H, W), "B" or "B, T".
    """
    size = model.config.image_size
    wanted = f"a float tensor of shape ({axes}, 3, {size}, {size})"
    if not isinstance(pictures, Tensor):
        raise TypeError(f"{model.name}: {name} must be {wanted}, got {type(pictures).__name__}")
    rank = 4 + axes.count(",")
    if pictures.dim() != rank or pictures.shape[-3:] != (3, size, size):
        raise ValueError(f"{model.name}: {name} must be {wanted}, got shape {tuple(pictures.shape)}")
    if not pictures.is_floating_point():
        raise TypeError(
            f"{model.name}: {name} must be {wanted}, got {pictures.dtype}; scale pixel values to floats first"
        )
    parameter = next(model.parameters())
    if pictures.device != parameter.device:
        raise ValueError(
            f"{model.name}: {name} must be on the model's device {parameter.device}, got {pictures.device}"
        )
    if pictures.dtype != parameter.dtype and not torch.is_autocast_enabled(pictures.device.type):
        raise TypeError(
            f"{model.name}: {name} must have the model's dtype {parameter.dtype}, got {pictures.dtype}"
        )
