"""What both models share: per-AU heads, activations, and checks of what a forward pass is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from aufast.ops.conv3x3 import conv3x3, serves

Output = TypeVar("Output", bound=type)


def _unchanged(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "none": _unchanged,
}


def overwriting(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An activation for maps that nothing else reads: ReLU then takes no memory of its own."""
    return torch.relu_ if activation is F.relu else activation


def exportable(output: Output) -> Output:
    """Let `torch.export.save` write programs that return this named tuple."""
    pytree._register_namedtuple(output, serialized_type_name=f"{output.__module__}.{output.__name__}")
    return output


class Stacked(nn.Module):
    """A module whose every tensor holds `networks` independent networks, one after the other along axis 0."""

    networks: int


class NodeLinear(Stacked):
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
        self.networks = nodes
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


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution, stride 1 and zero padding 1, by minimal filtering where that is faster on a CPU.

    Args:
        in_channels: of all groups.
        out_channels: of all groups.
        groups: networks side by side.
        bias: whether it has one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        options = {"groups": groups, "bias": bias, "device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, 3, padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W), or its groups apart (B, G, C_in / G, H, W), to (B, C_out, H, W)."""
        maps = x if x.dim() == 5 else x.unflatten(1, (self.groups, -1))
        if not serves(maps, self.weight):
            return super().forward(maps.flatten(1, 2))
        out = conv3x3(maps, self.weight)
        return out if self.bias is None else out + self.bias[:, None, None]


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
    fits = pictures.dtype in (parameter.dtype, torch.float32 if model.inference_dtype else None)
    if not fits and not torch.is_autocast_enabled(pictures.device.type):
        raise TypeError(
            f"{model.name}: {name} must have the model's dtype {parameter.dtype}, got {pictures.dtype}"
        )
