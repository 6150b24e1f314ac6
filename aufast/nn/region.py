"""The hierarchical multi-scale region layer and its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aufast import ops
from aufast.nn.checks import positive


def _mean_of(patches: Tensor) -> Tensor:
    """Mean of every patch and channel: (B, C, n, h, n, w) to (1, C, n, 1, n, 1)."""
    columns = patches.flatten(4).mean(3)  # (B, C, n, n·w): down the rows first, whole vectors at a time
    return columns.unflatten(3, patches.shape[4:]).mean((0, 4))[None, :, :, None, :, None]


class _PatchStatistics(torch.autograd.Function):
    """Biased variance and mean of every patch and channel.

    Two passes of sums in place of `torch.var_mean`, which goes number by number, and a gradient in one pass
    over the map, not in six.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(patches: Tensor) -> tuple[Tensor, Tensor]:
        """Map patches (B, C, n, h, n, w) to variance and mean, each (1, C, n, 1, n, 1)."""
        mean = _mean_of(patches)
        return _mean_of((patches - mean).square_()), mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, d_variance: Tensor, d_mean: Tensor) -> Tensor:
        """`d_mean / N + d_variance · 2 (x - mean) / N`, N values in each patch and channel."""
        patches, mean = ctx.saved_tensors
        count = patches.numel() // mean.numel()
        slope = d_variance * (2 / count)
        return torch.addcmul(d_mean / count - slope * mean, patches, slope)


class PatchStatistics(_PatchStatistics):
    """The same with forward mode, which `torch.compile` does not take."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        _PatchStatistics.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Forward mode: the variance moves by `2 · mean of (x - mean) · tangent`."""
        patches, mean = ctx.saved_tensors
        return 2 * _mean_of((patches - mean) * tangent), _mean_of(tangent)


class PatchBatchNorm(nn.Module):
    """The batch normalisations of an n×n grid of patches, as one scale and one shift per patch and channel.

    Does what n² separate `BatchNorm2d` do, one per patch: statistics over batch × patch pixels, running mean
    and unbiased running variance. It returns `scale` and `shift` in place of the normalised map, for the
    convolution that applies them while it reads its input.

    Args:
        grid: n.
        channels: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics.
    """

    def __init__(
        self,
        grid: int,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        positive("PatchBatchNorm", grid=grid, channels=channels)
        self.grid, self.channels, self.eps, self.momentum = grid, channels, eps, momentum
        shape = (grid, grid, channels)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.empty((), device=device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight 1, bias 0, and forget the running statistics."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Find what normalises each patch; in training mode also update the running statistics.

        Args:
            x: (B, C, H, W), H and W divisible by n.

        Returns:
            scale and shift, each (n, n, C), in x's dtype: the normalised patch is `x·scale + shift`.
        """
        mean, variance = self._batch_statistics(x) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * torch.rsqrt(variance + self.eps)  # (n, n, C)
        shift = self.bias - mean * scale
        return scale.to(x.dtype), shift.to(x.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = self.grid
        count = x.numel() // (x.shape[1] * n * n)
        if count < 2:
            raise ValueError(
                f"PatchBatchNorm: training needs at least 2 values per patch and channel, got {count} "
                f"from an input of shape {tuple(x.shape)} on a {n}×{n} grid"
            )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        patches = x.unflatten(3, (n, -1)).unflatten(2, (n, -1))  # (B, C, n, h, n, w)
        statistics = _PatchStatistics if torch.compiler.is_compiling() else PatchStatistics
        variance, mean = (
            t[0, :, :, 0, :, 0].permute(1, 2, 0) for t in statistics.apply(patches)
        )  # (n, n, C)
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        return mean, variance

    def extra_repr(self) -> str:
        return f"grid={self.grid}, channels={self.channels}, eps={self.eps}, momentum={self.momentum}"


class RegionConv(nn.Module):
    """Batch normalisation, ReLU and a 3×3 convolution of its own for every patch of an n×n grid.

    Zero padding is at each patch's own border, after its ReLU.

    Args:
        grid: n.
        in_channels: C_in.
        out_channels: C_out.
        eps: of the batch normalisation.
        momentum: of the batch normalisation.
        backend: who computes; None takes what `aufast.use_backend` chose.

    Source: the layer L_n of the region layer that AAR takes from JAA-Net.
    """

    def __init__(
        self,
        grid: int,
        in_channels: int,
        out_channels: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        positive("RegionConv", grid=grid, in_channels=in_channels, out_channels=out_channels)
        factory = {"device": device, "dtype": dtype}
        self.grid, self.in_channels, self.out_channels = grid, in_channels, out_channels
        self.backend = backend
        self.norm = PatchBatchNorm(grid, in_channels, eps=eps, momentum=momentum, **factory)
        self.weight = nn.Parameter(torch.empty(grid, grid, out_channels, in_channels, 3, 3, **factory))
        self.bias = nn.Parameter(torch.empty(grid, grid, out_channels, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every patch's filters as `Conv2d` does, and reset the normalisation."""
        self.norm.reset_parameters()
        bound = 1 / math.sqrt(9 * self.in_channels)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, rectify and convolve every patch.

        Args:
            x: (B, C_in, H, W), H and W divisible by n.

        Returns:
            (B, C_out, H, W).
        """
        expected = x.dim() == 4 and x.shape[1] == self.in_channels
        if not expected or x.shape[2] % self.grid or x.shape[3] % self.grid:
            raise ValueError(
                f"RegionConv: x must have shape (B, {self.in_channels}, H, W) with H and W divisible by "
                f"{self.grid}, got {tuple(x.shape)}"
            )
        scale, shift = self.norm(x)
        return ops.region_conv(x, self.weight, self.bias, scale, shift, backend=self.backend)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, {self.in_channels}, {self.out_channels}"


class RegionLayer(nn.Module):
    """Hierarchical multi-scale region layer: `ReLU(BN(y0 + concat(y1, y2, y3)))`.

    `y0` is a plain 3×3 convolution to C_out channels. Each further `y` convolves the one before it patch by
    patch, on a coarser grid: to C_out/2 on 8×8 patches, to C_out/4 on 4×4, to C_out/4 on 2×2.

    Args:
        in_channels: C_in.
        out_channels: C_out, divisible by 4.
        grids: patches along a side of the three levels.
        eps: of all batch normalisations.
        momentum: of all batch normalisations.
        backend: who computes; None takes what `aufast.use_backend` chose.

    Source: AAR Fig. 3(a), with the details of JAA-Net.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        grids: Sequence[int] = (8, 4, 2),
        eps: float = 1e-5,
        momentum: float = 0.1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        positive("RegionLayer", in_channels=in_channels, out_channels=out_channels)
        if out_channels % 4:
            raise ValueError(f"RegionLayer: out_channels must be divisible by 4, got {out_channels}")
        if len(grids) != 3:
            raise ValueError(f"RegionLayer: grids must be three sizes, got {tuple(grids)}")
        factory = {"device": device, "dtype": dtype}
        norm = {"eps": eps, "momentum": momentum}
        widths = (out_channels, out_channels // 2, out_channels // 4, out_channels // 4)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, **factory)
        self.regions = nn.ModuleList(
            RegionConv(grid, before, after, backend=backend, **norm, **factory)
            for grid, before, after in zip(grids, widths[:-1], widths[1:], strict=True)
        )
        self.norm = nn.BatchNorm2d(out_channels, **norm, **factory)

    def reset_parameters(self) -> None:
        """Draw all parameters anew and forget all running statistics."""
        for layer in (self.conv, *self.regions, self.norm):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer.

        Args:
            x: (B, C_in, H, W), H and W divisible by every grid.

        Returns:
            (B, C_out, H, W).
        """
        y0 = self.conv(x)  # (B, C_out, H, W)
        y1 = self.regions[0](y0)  # (B, C_out/2, H, W)
        y2 = self.regions[1](y1)  # (B, C_out/4, H, W)
        y3 = self.regions[2](y2)  # (B, C_out/4, H, W), enters the sum without a ReLU
        total = torch.cat([y1, y2, y3], dim=1).add_(y0)  # each y is some gradient's input, this is not
        return torch.relu_(self.norm(total))
