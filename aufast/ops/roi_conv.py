"""Grouped 3×3 convolutions of small maps on a CPU, which MARGL's regional networks are made of.

Not a public operator: it is `conv2d` by Winograd's minimal filtering, 16 products where the sum over taps
takes 36, for the sizes at which that is faster. docs/decisions.md says how exact it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_input, conv2d_weight

from aufast.ops import backends
from aufast.ops.registration import LIBRARY, needs_mask, unwanted

CHANNELS = 16  # whole vectors of every instruction set
CACHED = 1 << 20  # bytes: the points of one map must stay in a core's second cache


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `roi_conv` can compute `conv2d(x, weight, padding=1)` and should.

    Args:
        x: (B, G, C_in, h, w).
        weight: (G·C_out, C_in, 3, 3).
    """
    groups, channels, height, width = x.shape[1:]
    outputs = weight.shape[0] // groups
    tiles = ((height + 1) // 2) * ((width + 1) // 2)
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and channels % CHANNELS == outputs % CHANNELS == 0
        and 0 < tiles * (channels + outputs) * 16 * x.element_size() <= CACHED
        and backends._selected in ("auto", "cpu")
        and torch._C._dispatch_has_kernel_for_dispatch_key("aufast::roi_conv", "CPU")
        # Those see through a convolution and not through this.
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def roi_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """Convolve every map of a group with the group's own 3×3 filters, stride 1 and zero padding 1.

    Args:
        x: (B, G, C_in, h, w), as `serves` says; fastest with the channels innermost.
        weight: (G·C_out, C_in, 3, 3).
        bias: (G·C_out,) or None.
        relu: whether a ReLU follows. Neither it nor `bias` is differentiated.

    Returns:
        (B, G·C_out, h, w), channels_last.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) and bias is None and not relu:
        return _RoiConv.apply(x, weight)
    return _forward(x, weight, bias, relu)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    split = (x.shape[1], -1)  # of an axis G·C
    bias = None if bias is None else bias.unflatten(0, split)
    out = torch.ops.aufast.roi_conv(_innermost(x), weight.unflatten(0, split), bias, relu)
    return out.flatten(3).permute(0, 3, 1, 2)


class _RoiConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, None, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        groups = x.shape[1]
        if torch.is_grad_enabled():  # the gradient's own graph is wanted
            options = {"padding": 1, "groups": groups}
            maps = x.flatten(1, 2)
            d_x = conv2d_input(maps.shape, weight, grad, **options).view_as(x)
            return d_x, conv2d_weight(maps, weight.shape, grad, **options)
        grad = grad.permute(0, 2, 3, 1).unflatten(3, (groups, -1))  # (B, h, w, G, C_out)
        d_x, d_weight = torch.ops.aufast.roi_conv_backward(
            grad, _innermost(x), weight.unflatten(0, (groups, -1)), needs_mask(ctx.needs_input_grad)
        )
        return (
            d_x.permute(0, 1, 4, 2, 3) if ctx.needs_input_grad[0] else None,
            d_weight.flatten(0, 1) if ctx.needs_input_grad[1] else None,
        )


def _innermost(x: Tensor) -> Tensor:
    """(B, G, C, h, w) as (B, G, h, w, C), whose channels lie side by side; a copy where they do not."""
    last = x.permute(0, 1, 3, 4, 2)
    dense = last.is_contiguous() or last.permute(0, 2, 3, 1, 4).is_contiguous()
    return last if dense else last.contiguous()


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    batch, groups, height, width, _ = x.shape
    return x.new_empty(batch, height, width, groups, weight.shape[1])


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if needs & 1 else unwanted(x),
        torch.empty_like(weight) if needs & 2 else unwanted(x),
    )


# x is (B, G, h, w, C_in), weight (G, C_out, C_in, 3, 3) and the result (B, h, w, G, C_out).
LIBRARY.define("roi_conv(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor")
LIBRARY.define("roi_conv_backward(Tensor grad, Tensor x, Tensor weight, int needs) -> (Tensor, Tensor)")
torch.library.register_fake("aufast::roi_conv", _fake, lib=LIBRARY)
torch.library.register_fake("aufast::roi_conv_backward", _backward_fake, lib=LIBRARY)
