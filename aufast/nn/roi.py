"""Multi-ROI crop-and-resize, with fixed boxes and with boxes that are learned from the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aufast import ops
from aufast.nn.checks import one_of, positive


class RoiCrop(nn.Module):
    """Crop R regions of every feature map and resize each by bilinear sampling.

    Args:
        size: (h, w) of the crops.
        align_corners: as in `torch.nn.functional.affine_grid`; boxes are defined for False only.
        backend: who computes; None takes what `aufast.use_backend` chose.

    Source: MARGL eq. (2).
    """

    def __init__(
        self, size: tuple[int, int] = (6, 6), *, align_corners: bool = False, backend: str | None = None
    ):
        super().__init__()
        self.size = tuple(size)
        self.align_corners = align_corners
        self.backend = backend

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Crop.

        Args:
            features: (B, C, H, W).
            rois: (B, R, 4) boxes `(x1, y1, x2, y2)` in continuous feature pixels, or (B, R, 2, 3) affine
                matrices.

        Returns:
            (B, R, C, h, w).
        """
        return ops.roi_crop(features, rois, self.size, align_corners=self.align_corners, backend=self.backend)

    def extra_repr(self) -> str:
        return f"size={self.size}, align_corners={self.align_corners}"


class AdaptiveRoi(nn.Module):
    """Scale initial boxes by factors read from the features, then crop the scaled boxes.

    A 1×1 convolution squeezes the map; global average pooling and one fully connected layer give four
    factors β per box; the corner coordinates of the box are multiplied by them. At the start β is 1 for
    every input: the layer begins with the initial boxes.

    Args:
        in_channels: channels of the feature map.
        rois: R, boxes per image.
        squeeze: channels after the 1×1 convolution.
        size: (h, w) of the crops.
        adaptive: False keeps the initial boxes: no fully connected layer, β = 1.
        crop_from: "squeezed" crops the map after the 1×1 convolution, "backbone" the one before it.
        scale_weight_std: standard deviation of the fully connected layer's initial weights.
        scale_bias: its initial bias.
        backend: as in `RoiCrop`.

    Source: MARGL section 2.1, eq. (1) and (2).
    """

    def __init__(
        self,
        in_channels: int,
        rois: int,
        squeeze: int = 128,
        size: tuple[int, int] = (6, 6),
        *,
        adaptive: bool = True,
        crop_from: str = "squeezed",
        scale_weight_std: float = 0.0,
        scale_bias: float = 1.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        positive("AdaptiveRoi", in_channels=in_channels, rois=rois, squeeze=squeeze)
        one_of("AdaptiveRoi", "crop_from", crop_from, ("squeezed", "backbone"))
        self.rois = rois
        self.crop_from = crop_from
        self.scale_weight_std = scale_weight_std
        self.scale_bias = scale_bias
        self.out_channels = squeeze if crop_from == "squeezed" else in_channels
        # Fixed boxes cut from the backbone's own map have no use for a squeezed one.
        self.squeeze = (
            nn.Conv2d(in_channels, squeeze, 1, device=device, dtype=dtype)
            if adaptive or crop_from == "squeezed"
            else None
        )
        self.scale = nn.Linear(squeeze, 4 * rois, device=device, dtype=dtype) if adaptive else None
        self.crop = RoiCrop(size, backend=backend)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the 1×1 convolution anew and set the factors back to their start."""
        if self.squeeze is not None:
            self.squeeze.reset_parameters()
        if self.scale is not None:
            nn.init.normal_(self.scale.weight, std=self.scale_weight_std)
            nn.init.constant_(self.scale.bias, self.scale_bias)

    def forward(self, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Adapt the boxes and crop them.

        Args:
            features: (B, in_channels, H, W).
            boxes: (B, R, 4) initial boxes `(x1, y1, x2, y2)` in continuous feature pixels, float32 or
                float64.

        Returns:
            Crops (B, R, C, h, w), C being `out_channels`, and the adapted boxes (B, R, 4).
        """
        if boxes.dim() != 3 or boxes.shape[1:] != (self.rois, 4):
            raise ValueError(
                f"AdaptiveRoi: boxes must have shape (B, {self.rois}, 4), got {tuple(boxes.shape)}"
            )
        squeezed = features if self.squeeze is None else self.squeeze(features)  # (B, squeeze, H, W)
        if self.scale is not None:
            boxes = self.factors(squeezed).to(boxes.dtype) * boxes  # (B, R, 4), eq. (1)
        source = squeezed if self.crop_from == "squeezed" else features
        return self.crop(source, boxes), boxes

    def factors(self, squeezed: Tensor) -> Tensor:
        """The scale factors β (B, R, 4) of `squeezed`, a map (B, squeeze, H, W)."""
        # A factor rounded to eight bits would move a box by a tenth of a pixel: autocast stops here.
        with torch.autocast(squeezed.device.type, enabled=False):
            pooled = squeezed.to(self.scale.weight.dtype).mean((2, 3))  # (B, squeeze)
            return self.scale(pooled).unflatten(1, (self.rois, 4))

    def extra_repr(self) -> str:
        return f"rois={self.rois}, adaptive={self.scale is not None}, crop_from={self.crop_from}"
