"""The definition of multi-ROI affine crop-and-resize: MARGL eq. (2) and one `grid_sample` per image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aufast.reference.precision import outside_autocast


def box_theta(boxes: Tensor, height: int, width: int) -> Tensor:
    """Turn boxes into the affine matrices of MARGL eq. (2).

    Args:
        boxes: (..., 4), `(x1, y1, x2, y2)` in continuous feature pixels: pixel i covers [i, i+1).
        height: H of the feature map.
        width: W of the feature map.

    Returns:
        (..., 2, 3), `[[sx, 0, tx], [0, sy, ty]]` in the normalised coordinates of `align_corners=False`.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    zero = torch.zeros_like(x1)
    row_x = torch.stack([(x2 - x1) / width, zero, (x1 + x2) / width - 1], dim=-1)  # (..., 3)
    row_y = torch.stack([zero, (y2 - y1) / height, (y1 + y2) / height - 1], dim=-1)  # (..., 3)
    return torch.stack([row_x, row_y], dim=-2)  # (..., 2, 3)


@outside_autocast
def roi_crop(
    features: Tensor, rois: Tensor, size: tuple[int, int] = (6, 6), *, align_corners: bool = False
) -> Tensor:
    """Crop R regions of every feature map and resize each to `size` by bilinear sampling, zeros outside.

    A region that is not finite gives NaN in its own crop only, and passes no gradient.

    Args:
        features: (B, C, H, W).
        rois: (B, R, 2, 3) affine matrices θ, or (B, R, 4) boxes in continuous feature pixels.
        size: (h, w) of the crops.
        align_corners: as in `affine_grid` and `grid_sample`; boxes are defined for False only.

    Returns:
        (B, R, C, h, w) in the dtype of `features`; low precision is sampled in float32.

    Source: MARGL eq. (2), with `affine_grid` and `grid_sample` of one image at a time as its meaning.
    """
    batch, channels, height, width = features.shape
    regions = rois.shape[1]
    computed = torch.promote_types(features.dtype, torch.float32)
    theta = rois.to(computed)
    if rois.dim() == 3:
        theta = box_theta(theta, max(height, 1), max(width, 1))  # (B, R, 2, 3)
    finite = theta.isfinite().flatten(2).all(-1)[:, :, None, None, None]  # (B, R, 1, 1, 1)
    theta = torch.where(finite[..., 0], theta, torch.zeros_like(theta))

    if 0 in (batch, regions, channels, height, width, *size):
        # Zeros that still hang on both arguments, so that their gradients are zeros and not missing.
        nothing = features.flatten()[:0].sum() + theta.flatten()[:0].sum().to(features.dtype)
        outside = nothing.expand(batch, regions, channels, *size)
        return torch.where(finite, outside, torch.full_like(outside, torch.nan))
    crops = []
    for image, matrices in zip(features.to(computed), theta, strict=True):
        grid = F.affine_grid(
            matrices, [regions, channels, *size], align_corners=align_corners
        )  # (R, h, w, 2)
        grid = grid.clamp(-16, 16)  # far outside is outside: no overflow of huge rois on the way to pixels
        copies = image.expand(regions, -1, -1, -1)  # (R, C, H, W)
        crops.append(F.grid_sample(copies, grid, "bilinear", "zeros", align_corners))  # (R, C, h, w)
    out = torch.stack(crops)  # (B, R, C, h, w)
    return torch.where(finite, out, torch.full_like(out, torch.nan)).to(features.dtype)
