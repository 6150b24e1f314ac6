"""Stacked networks run one after the other, on the parameters that hold them all.

A CPU is faster so: the maps of one network fit its caches, those of all together go to memory for every
normalisation, activation and gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class OneConv:
    """One network's part of a stacked 3×3 convolution."""

    weight: Tensor
    bias: Tensor
    groups = 1

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


@dataclass(frozen=True)
class OneNorm:
    """One network's part of a stacked batch normalisation."""

    norm: nn.BatchNorm2d
    index: int
    networks: int
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if norm.training and self.index == 0:
            norm.num_batches_tracked.add_(1)
        # Looked up at every call: gradient checkpointing puts others in their place.
        mean, variance = (b.chunk(self.networks)[self.index] for b in (norm.running_mean, norm.running_var))
        own = (self.weight, self.bias, norm.training, norm.momentum, norm.eps)
        return F.batch_norm(x, mean, variance, *own)


def apart(stacked: nn.Module, names: Iterable[str], networks: int) -> list[SimpleNamespace]:
    """The single networks of a stacked module.

    Args:
        stacked: whose layers hold `networks` networks along axis 0 of their parameters.
        names: of its layers: convolutions, batch normalisations, identities or None.
        networks: how many.

    Returns:
        For each network an object with its layers under the same names.
    """
    layers = {name: _cut(getattr(stacked, name), networks) for name in names}
    return [
        SimpleNamespace(**{name: parts[index] for name, parts in layers.items()}) for index in range(networks)
    ]


def _cut(layer: nn.Module | None, networks: int) -> list[Callable[[Tensor], Tensor] | None]:
    """One layer's parts, all cut from its parameters at once: their gradients come together in one piece."""
    if layer is None or isinstance(layer, nn.Identity):
        return [layer] * networks
    parts = zip(layer.weight.chunk(networks), layer.bias.chunk(networks), strict=True)
    if isinstance(layer, nn.Conv2d):
        return [OneConv(*part) for part in parts]
    return [OneNorm(layer, index, networks, *part) for index, part in enumerate(parts)]
