"""ResNet-18 with the parameter names of its published ImageNet weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aufast.models.layers import Conv3x3

WIDTHS = (1, 2, 4, 8)  # of the four layers, in units of the first one's


class ResNetOutput(NamedTuple):
    """What ResNet-18 returns for images (B, 3, H, W)."""

    logits: Tensor
    """(B, num_classes)."""
    levels: tuple[Tensor, Tensor, Tensor, Tensor]
    """Outputs of layer1 … layer4: (B, 64, H/4, W/4), (B, 128, H/8, W/8), (B, 256, H/16, W/16), (B, 512,
    H/32, W/32)."""


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int, factory: dict):
        super().__init__()
        self.conv1 = (
            Conv3x3(in_channels, channels, **factory)
            if stride == 1
            else nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False, **factory)
        )
        self.bn1 = nn.BatchNorm2d(channels, **factory)
        self.conv2 = Conv3x3(channels, channels, **factory)
        self.bn2 = nn.BatchNorm2d(channels, **factory)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False, **factory),
                nn.BatchNorm2d(channels, **factory),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 whose state dict has the names and shapes of torchvision's `resnet18`.

    Args:
        num_classes: outputs of the last fully connected layer.
        width: channels of `layer1`; ImageNet weights fit 64 only.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        widths = [width * factor for factor in WIDTHS]
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(width, **factory)
        self.layer1 = self._layer(width, widths[0], 1, factory)
        self.layer2 = self._layer(widths[0], widths[1], 2, factory)
        self.layer3 = self._layer(widths[1], widths[2], 2, factory)
        self.layer4 = self._layer(widths[2], widths[3], 2, factory)
        self.fc = nn.Linear(widths[3], num_classes, **factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _layer(in_channels: int, channels: int, stride: int, factory: dict) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, channels, stride, factory), BasicBlock(channels, channels, 1, factory)
        )

    def forward(self, images: Tensor) -> ResNetOutput:
        """Classify images.

        Args:
            images: (B, 3, H, W), normalised as the weights expect.

        Returns:
            logits (B, num_classes) and the outputs of the four layers.
        """
        x = F.relu(self.bn1(self.conv1(images)))  # (B, 64, H/2, W/2)
        x = F.max_pool2d(x, 3, 2, 1)  # (B, 64, H/4, W/4)
        level1 = self.layer1(x)
        level2 = self.layer2(level1)  # (B, 128, H/8, W/8)
        level3 = self.layer3(level2)  # (B, 256, H/16, W/16)
        level4 = self.layer4(level3)  # (B, 512, H/32, W/32)
        logits = self.fc(level4.mean((2, 3)))  # (B, num_classes)
        return ResNetOutput(logits, (level1, level2, level3, level4))

    def load_imagenet(self, weights: Mapping[str, Tensor] | str | Path) -> None:
        """Start from ImageNet weights; the classifier `fc` is taken only where it has this network's shape.

        Args:
            weights: a state dict with torchvision's names, or the path of a safetensors file that holds one.

        Raises:
            ValueError: a file that is missing or no whole safetensors file, or a parameter other than `fc`
                that is missing, unknown or of another shape; it is named.
        """
        if isinstance(weights, (str, Path)):
            weights = _read_safetensors(Path(weights))
        own = self.state_dict()
        for key, value in own.items():
            # Files from before PyTorch 0.4.1 do not count batches.
            if key not in weights and not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
                raise ValueError(f"ResNet18: the ImageNet weights lack {key!r}")
            if key in weights and not key.startswith("fc.") and weights[key].shape != value.shape:
                raise ValueError(
                    f"ResNet18: {key!r} must have shape {tuple(value.shape)}, "
                    f"the ImageNet weights have {tuple(weights[key].shape)}"
                )
        for key in weights:
            if key not in own:
                raise ValueError(f"ResNet18: the ImageNet weights hold an unknown parameter {key!r}")
        fits = {key: value for key, value in weights.items() if value.shape == own[key].shape}
        self.load_state_dict({**own, **fits})


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read as ImageNet weights, which must be a safetensors file or a state dict; "
            f"nothing is unpickled here ({error})"
        ) from error
