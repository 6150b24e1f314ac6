"""Both models as one would write them down from the papers: a module for every patch, branch and region.

These are what the fast forms are compared with, in tests and benchmarks. They compute the same numbers from
the same parameters, with PyTorch's own operators and the definitions in `aufast.reference`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aufast.models.aar import AUBranches
from aufast.models.layers import Conv3x3, NodeLinear
from aufast.models.layout import separate
from aufast.models.margl import RegionalNetworks
from aufast.models.pretrained import Pretrained
from aufast.nn import GraphConv, GraphGRU, RegionConv, RoiCrop

Model = TypeVar("Model", bound=Pretrained)


class PatchConv(nn.Conv2d):
    """Batch normalisation, ReLU and convolution of one patch."""

    def __init__(self, layer: RegionConv, factory: dict):
        super().__init__(layer.in_channels, layer.out_channels, 3, padding=1, **factory)
        options = {"eps": layer.norm.eps, "momentum": layer.norm.momentum}
        self.norm = nn.BatchNorm2d(layer.in_channels, **options, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(self.norm(x)))


class PatchGrid(nn.ModuleList):
    """The patches of a `RegionConv`, row by row."""

    def __init__(self, layer: RegionConv, factory: dict):
        super().__init__(PatchConv(layer, factory) for _ in range(layer.grid**2))
        self.grid = layer.grid

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        patches, rows = iter(self), []
        for row in x.chunk(self.grid, dim=2):
            rows.append(torch.cat([next(patches)(patch) for patch in row.chunk(self.grid, dim=3)], dim=3))
        return torch.cat(rows, dim=2)


def _conv(whole: nn.Conv2d, networks: int, channels: int, factory: dict) -> nn.Conv2d:
    """One network's part of a convolution that holds several."""
    bias = whole.bias is not None
    return nn.Conv2d(channels, whole.out_channels // networks, 3, padding=1, bias=bias, **factory)


def _norm(whole: nn.Module | None, networks: int, factory: dict) -> nn.Module | None:
    if not isinstance(whole, nn.BatchNorm2d):
        return copy.deepcopy(whole)
    return nn.BatchNorm2d(whole.num_features // networks, eps=whole.eps, momentum=whole.momentum, **factory)


class Branch(nn.Module):
    """The five convolutions of one AU, and its attention map."""

    def __init__(self, branches: AUBranches, factory: dict):
        super().__init__()
        m = branches.networks
        for k in range(1, 6):
            whole = getattr(branches, f"conv{k}")
            self.add_module(f"conv{k}", _conv(whole, m, whole.weight.shape[1], factory))
            self.add_module(f"bn{k}", _norm(getattr(branches, f"bn{k}"), m, factory))
        maps = branches.attention
        self.attention = None if maps is None else _conv(maps, m, maps.weight.shape[1], factory)
        self.multiply_first, self.activation = branches.multiply_first, branches.activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (N, 8c, h, w) to the AU's feature (N, 12c) and its attention map (N, 1, h, w) or None."""
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.activation(self.bn2(self.conv2(x)))
        x = self.activation(self.bn3(self.conv3(x)))
        attention = None if self.attention is None else self.attention(x).sigmoid()
        x = self.conv4(x)
        if attention is not None and self.multiply_first:
            x = x * attention
        x = self.activation(self.bn4(x))
        if attention is not None and not self.multiply_first:
            x = x * attention
        x = self.conv5(x)
        if self.bn5 is not None:
            x = self.activation(self.bn5(x))
        return x.mean((2, 3)), attention


class Branches(nn.ModuleList):
    """`AUBranches` as a list of branches."""

    def __init__(self, branches: AUBranches, factory: dict):
        super().__init__(Branch(branches, factory) for _ in range(branches.networks))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (N, 8c, h, w) to features (N, m, 12c) and attention maps (N, m, h, w) or None."""
        features, maps = zip(*(branch(x) for branch in self), strict=True)
        return torch.stack(features, dim=1), None if maps[0] is None else torch.cat(maps, dim=1)


class Region(nn.Module):
    """The regional network of one ROI."""

    def __init__(self, networks: RegionalNetworks, factory: dict):
        super().__init__()
        count = networks.networks
        for k in (1, 2):
            whole = getattr(networks, f"conv{k}")
            self.add_module(f"conv{k}", _conv(whole, count, whole.weight.shape[1], factory))
            self.add_module(f"bn{k}", _norm(getattr(networks, f"bn{k}"), count, factory))
        self.activation = networks.activation

    def forward(self, x: Tensor) -> Tensor:
        """Map crops (B, in_channels, h, w) to features (B, C)."""
        x = self.activation(self.bn1(self.conv1(x)))
        x = self.activation(self.bn2(self.conv2(x)))
        return x.mean((2, 3))


class Regions(nn.ModuleList):
    """`RegionalNetworks` as a list of networks."""

    def __init__(self, networks: RegionalNetworks, factory: dict):
        super().__init__(Region(networks, factory) for _ in range(networks.networks))

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (B, R, in_channels, h, w) to features (B, R, C)."""
        return torch.stack([region(crop) for region, crop in zip(self, crops.unbind(1), strict=True)], dim=1)


class Heads(nn.ModuleList):
    """`NodeLinear` as a list of fully connected layers."""

    def __init__(self, heads: NodeLinear, factory: dict):
        nodes, features = heads.weight.shape
        super().__init__(nn.Linear(features, 1, **factory) for _ in range(nodes))

    def forward(self, x: Tensor) -> Tensor:
        """Map node features (..., n, features) to (..., n)."""
        return torch.cat([head(node) for head, node in zip(self, x.unbind(-2), strict=True)], dim=-1)


PLAIN: dict[type[nn.Module], Callable[..., nn.Module]] = {
    RegionConv: PatchGrid,
    AUBranches: Branches,
    RegionalNetworks: Regions,
    NodeLinear: Heads,
    Conv3x3: lambda conv, factory: _conv(conv, 1, conv.in_channels, factory),
}


def plain_form(model: Model) -> Model:
    """The same model with a module for every patch, branch, region and output: see `Pretrained.reference`."""
    # In PyTorch's own layout, whichever the model has its weights in.
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    parameter = next(model.parameters())
    factory = {"device": parameter.device, "dtype": parameter.dtype}
    # What holds others comes before them, and is replaced as a whole.
    while name := next((name for name, module in plain.named_modules() if type(module) in PLAIN), None):
        module = plain.get_submodule(name)
        plain.set_submodule(name, PLAIN[type(module)](module, factory))
    for module in plain.modules():
        if isinstance(module, (GraphConv, GraphGRU, RoiCrop)):
            module.backend = "reference"
    plain.load_state_dict(separate(model, model.state_dict()))
    return plain.train(model.training)
