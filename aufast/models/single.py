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


def taps_to_one(weight: Tensor) -> Tensor:
    """The filter of a 3×3 convolution to one channel, (1, C, 3, 3), as `conv_to_one` takes it: (C, 9)."""
    # Pixel q reaches q + (1 - i, 1 - j) through tap (i, j): `fold` wants the taps the other way round.
    return weight[0].flip(1, 2).flatten(1)


def conv_to_one(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """A 3×3 convolution to one channel, which as a convolution would leave most of the machine idle.

    One matrix product gives what each pixel sends to the nine around it, which are then added up.

    Args:
        x: (N, C, h, w).
        taps: (C, 9), from `taps_to_one`.
        bias: (1,), in the dtype of the result.

    Returns:
        (N, 1, h, w).
    """
    sent = (x.permute(0, 2, 3, 1) @ taps).to(bias.dtype)  # (N, h, w, 9)
    return F.fold(sent.flatten(1, 2).mT, x.shape[2:], 3, padding=1) + bias


@dataclass(frozen=True)
class OneConv:
    """One network's part of a stacked 3×3 convolution."""

    weight: Tensor
    bias: Tensor
    groups = 1

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.weight) == 1:
            return conv_to_one(x, taps_to_one(self.weight), self.bias)
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
