"""The definition of the region convolution: every patch of an n×n grid has its own 3×3 convolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aufast.reference.precision import outside_autocast


@outside_autocast
def region_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Convolve each patch of an n×n grid with its own 3×3 filters, zero padded at the patch's own border.

    Args:
        x: (B, C_in, H, W), H and W divisible by n.
        weight: (n, n, C_out, C_in, 3, 3).
        bias: (n, n, C_out) or None.
        scale: (n, n, C_in); with `shift`, the patch goes through `ReLU(x·scale + shift)` before the padding.
        shift: (n, n, C_in), given exactly when `scale` is.

    Returns:
        (B, C_out, H, W).

    Source: the layer L_n of AAR's hierarchical multi-scale region layer.
    """
    grid = weight.shape[0]
    height, width = x.shape[-2] // grid, x.shape[-1] // grid
    rows = []
    for i in range(grid):
        row = []
        for j in range(grid):
            patch = x[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width]  # (B, C_in, h, w)
            if scale is not None:
                patch = torch.relu(patch * scale[i, j, :, None, None] + shift[i, j, :, None, None])
            row.append(F.conv2d(patch, weight[i, j], None if bias is None else bias[i, j], padding=1))
        rows.append(torch.cat(row, dim=3))  # (B, C_out, h, W)
    return torch.cat(rows, dim=2)  # (B, C_out, H, W)
