"""3×3 convolutions on a CPU, stride 1 and zero padding 1, of one network or of many side by side.

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
from aufast.ops.registration import LIBRARY

CHANNELS = 16  # whole vectors of every instruction set
MOST_FILTERS = 1 << 17  # of a network: the points of more are read from memory, as slowly as they are made
ENOUGH_TILES = 36  # of 2×2 results, from which on the products that the filters take are worth it
MANY_NETWORKS = 8  # whose gradient of filters is taken network by network


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3` can compute `conv2d(x, weight, padding=1)` and is faster.

    Args:
        x: (B, G, C_in, h, w).
        weight: (G·C_out, C_in, kh, kw).
    """
    if torch.compiler.is_compiling():  # compilers see through a convolution and not through this
        return False
    batch, groups, channels, height, width = x.shape
    outputs = weight.shape[0] // groups
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and weight.shape[2:] == (3, 3)
        and channels % CHANNELS == outputs % CHANNELS == 0
        and channels * outputs <= MOST_FILTERS
        and batch * ((height + 1) // 2) * ((width + 1) // 2) >= ENOUGH_TILES
        and backends._selected in ("auto", "cpu")
        and torch._C._dispatch_has_kernel_for_dispatch_key("aufast::conv3x3", "CPU")
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve every map of a network with the network's own filters.

    Args:
        x: (B, G, C_in, h, w), as `serves` says; fastest with the channels innermost.
        weight: (G·C_out, C_in, 3, 3).

    Returns:
        (B, G·C_out, h, w), channels_last.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Conv3x3.apply(x, weight)
    return fused_conv3x3(x, weight)


def fused_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """The same with what follows it, and without gradients.

    Args:
        x, weight: as in `conv3x3`.
        bias: (G·C_out,) or None.
        shortcut: (B, G·C_out, h, w) to add, or None.
        relu: whether a ReLU follows.
    """
    split = (x.shape[1], -1)  # of an axis G·C
    bias = None if bias is None else bias.unflatten(0, split)
    shortcut = None if shortcut is None else _split(shortcut, x.shape[1])
    out = torch.ops.aufast.conv3x3(_innermost(x), weight.unflatten(0, split), bias, shortcut, relu, False)
    return _map(out)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return fused_conv3x3(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        groups = x.shape[1]
        options = {"padding": 1, "groups": groups}
        again = torch.is_grad_enabled()  # the gradient's own graph is wanted
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            if again:
                d_x = conv2d_input(x.flatten(1, 2).shape, weight, grad, **options)
            else:
                maps = _split(grad, groups).permute(0, 3, 1, 2, 4)  # (B, G, h, w, C_out)
                filters = weight.unflatten(0, (groups, -1))
                d_x = _map(torch.ops.aufast.conv3x3(maps, filters, None, None, False, True))
            d_x = d_x.unflatten(1, (groups, -1))
        if ctx.needs_input_grad[1]:
            if again:
                d_weight = conv2d_weight(x.flatten(1, 2), weight.shape, grad, **options)
            elif groups < MANY_NETWORKS:
                d_weight = _filter_gradient(grad, x.flatten(1, 2), weight, groups)
            else:
                d_weight = torch.ops.aufast.conv3x3_filters(_split(grad, groups), _innermost(x)).flatten(0, 1)
        return d_x, d_weight


def _filter_gradient(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """PyTorch's, in the weight's own layout."""
    one, zero = [1, 1], [0, 0]
    only = [False, True, False]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, one, one, one, False, zero, groups, only
    )[1]


def _innermost(x: Tensor) -> Tensor:
    """(B, G, C, h, w) as (B, G, h, w, C), whose channels lie side by side; a copy where they do not."""
    last = x.permute(0, 1, 3, 4, 2)
    dense = last.is_contiguous() or last.permute(0, 2, 3, 1, 4).is_contiguous()
    return last if dense else last.contiguous()


def _split(maps: Tensor, groups: int) -> Tensor:
    """(B, G·C, h, w) as (B, h, w, G, C), dense."""
    return maps.permute(0, 2, 3, 1).contiguous().unflatten(3, (groups, -1))


def _map(out: Tensor) -> Tensor:
    """(B, h, w, G, C) as (B, G·C, h, w)."""
    return out.flatten(3).permute(0, 3, 1, 2)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool, turned: bool
) -> Tensor:
    batch, groups, height, width, _ = x.shape
    return x.new_empty(batch, height, width, groups, weight.shape[2 if turned else 1])


def _filters_fake(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], grad.shape[4], x.shape[4], 3, 3)


# x is (B, G, h, w, C_in), weight (G, C_out, C_in, 3, 3), and grad, shortcut and result (B, h, w, G, C_out).
# `turned` gives the gradient of x: the result's gradient comes in the place of x.
LIBRARY.define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? shortcut, bool relu, bool turned) -> Tensor"
)
LIBRARY.define("conv3x3_filters(Tensor grad, Tensor x) -> Tensor")
torch.library.register_fake("aufast::conv3x3", _fake, lib=LIBRARY)
torch.library.register_fake("aufast::conv3x3_filters", _filters_fake, lib=LIBRARY)
