"""Region convolution in Triton: an implicit matrix product per patch of the n×n grid.

A patch's 3×3 convolution is a product of (pixels, 9·C_in) by (9·C_in, C_out), whose left side is never
stored: a program owns a patch, a tile of an image's pixels in it and a tile of filters, and walks
over the nine taps and tiles of channels. Scale, shift and ReLU are applied to what it loads; a neighbour
outside the patch is zero.

Backward: the gradient of the activations is the same product with the taps turned round and the channels
swapped; the ReLU's mask, the gradient of x and the sums for scale and shift are its epilogue. The weight
gradient is, per patch and tap, a product over all pixels. Sums over pixels are cut into a number of parts
that depends on the shape alone and added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from aufast.kernels.precision import dot_precision
from torch import Tensor

BLOCK_PIXELS = 64
TILES_PER_PART = 32
MOST_PARTS = 64
# Three programs of four warps a multiprocessor hide the loads; the steps between are too short to pipeline.
RESOURCES = {"num_stages": 1, "maxnreg": 168}


@triton.jit
def _tile(tile, patch, grid, patch_height, patch_width, BLOCK_PIXELS: tl.constexpr):
    """A tile of an image's patch: image, the patch's corner on the map, row and column in it, mask."""
    area = patch_height * patch_width
    tiles = tl.cdiv(area, BLOCK_PIXELS)
    place = (tile % tiles).to(tl.int32) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    top, left = patch // grid * patch_height, patch % grid * patch_width
    return tile // tiles, top, left, place // patch_width, place % patch_width, place < area


@triton.jit
def _activated(x, scale_ptr, shift_ptr, at, in_channels):
    """ReLU(x · scale + shift) in float32; channels along the second axis."""
    scale = tl.load(scale_ptr + at, in_channels, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(shift_ptr + at, in_channels, other=0.0).to(tl.float32)[None, :]
    return tl.maximum(x.to(tl.float32) * scale + shift, 0.0)


@triton.jit
def _back_through_norm(acc, x, d_scale_ptr, d_shift_ptr, scale_ptr, shift_ptr, at, in_channels):
    """Through ReLU(x · scale + shift): stores the sums for scale and shift, returns the gradient of x."""
    acc = tl.where(_activated(x, scale_ptr, shift_ptr, at, in_channels) > 0, acc, 0.0)
    tl.store(d_scale_ptr + at, tl.sum(acc * x, 0), in_channels)
    tl.store(d_shift_ptr + at, tl.sum(acc, 0), in_channels)
    return acc * tl.load(scale_ptr + at, in_channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def region_conv_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    grid,
    patch_height,
    patch_width,
    channels,
    filters,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    out_stride_b,
    out_stride_c,
    out_stride_y,
    out_stride_x,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
):
    """A tile of one patch's pixels (program axis 0), the patch (axis 1), a tile of filters (axis 2).

    `weight` is (n·n, 9, channels, filters).
    """
    patch = tl.program_id(1).to(tl.int64)
    o = tl.program_id(2).to(tl.int64) * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    in_filters = o < filters
    b, top, left, y, x, in_pixels = _tile(
        tl.program_id(0).to(tl.int64), patch, grid, patch_height, patch_width, BLOCK_PIXELS
    )
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_FILTERS), tl.float32)
    for tap in range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        inside = (y + dy >= 0) & (y + dy < patch_height) & (x + dx >= 0) & (x + dx < patch_width) & in_pixels
        source = x_ptr + b * stride_b + (top + y + dy) * stride_y + (left + x + dx) * stride_x
        for first in range(0, channels, BLOCK_CHANNELS):
            c = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
            in_channels = c < channels
            known = inside[:, None] & in_channels[None, :]
            value = tl.load(source[:, None] + (c * stride_c)[None, :], known, other=0.0)  # (pixels, channels)
            weight_row = ((patch * 9 + tap) * channels + c) * filters
            weight = tl.load(
                weight_ptr + weight_row[:, None] + o[None, :],
                in_channels[:, None] & in_filters[None, :],
                other=0.0,
            )  # (channels, filters)
            if SCALE:
                active = _activated(value, scale_ptr, shift_ptr, patch * channels + c, in_channels)
                value = tl.where(known, active, 0.0).to(weight.dtype)
            acc = tl.dot(value, weight, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + patch * filters + o, in_filters, other=0.0).to(tl.float32)[None, :]
    place = b * out_stride_b + (top + y) * out_stride_y + (left + x) * out_stride_x
    out_ptrs = out_ptr + place[:, None] + (o * out_stride_c)[None, :]
    tl.store(out_ptrs, acc, in_pixels[:, None] & in_filters[None, :])


@triton.jit
def region_conv_input_gradient_kernel(
    d_x_ptr,
    d_scale_ptr,
    d_shift_ptr,
    grad_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    grid,
    patch_height,
    patch_width,
    channels,
    filters,
    grad_stride_b,
    grad_stride_o,
    grad_stride_y,
    grad_stride_x,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    d_stride_b,
    d_stride_c,
    d_stride_y,
    d_stride_x,
    SCALE: tl.constexpr,
    D_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
):
    """From filters back to channels; `d_scale` and `d_shift` are (pixel tiles, n·n, channels)."""
    patch = tl.program_id(1).to(tl.int64)
    c = tl.program_id(2).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = c < channels
    b, top, left, y, x, in_pixels = _tile(
        tl.program_id(0).to(tl.int64), patch, grid, patch_height, patch_width, BLOCK_PIXELS
    )
    acc = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for tap in range(9):
        dy, dx = 1 - tap // 3, 1 - tap % 3
        inside = (y + dy >= 0) & (y + dy < patch_height) & (x + dx >= 0) & (x + dx < patch_width) & in_pixels
        row, column = top + y + dy, left + x + dx
        source = grad_ptr + b * grad_stride_b + row * grad_stride_y + column * grad_stride_x
        for first in range(0, filters, BLOCK_FILTERS):
            o = first + tl.arange(0, BLOCK_FILTERS).to(tl.int64)
            known = inside[:, None] & (o < filters)[None, :]
            # (pixels, filters)
            grad = tl.load(source[:, None] + (o * grad_stride_o)[None, :], known, other=0.0)
            weight_row = ((patch * 9 + tap) * channels + c) * filters
            weight = tl.load(
                weight_ptr + weight_row[None, :] + o[:, None],
                in_channels[None, :] & (o < filters)[:, None],
                other=0.0,
            )  # (filters, channels)
            acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
    known = in_pixels[:, None] & in_channels[None, :]
    if SCALE:
        place = b * stride_b + (top + y) * stride_y + (left + x) * stride_x
        value = tl.load(x_ptr + place[:, None] + (c * stride_c)[None, :], known, other=0.0).to(tl.float32)
        partial = tl.program_id(0).to(tl.int64) * grid * grid * channels
        acc = _back_through_norm(
            acc, value, d_scale_ptr + partial, d_shift_ptr + partial, scale_ptr, shift_ptr,
            patch * channels + c, in_channels,
        )  # fmt: skip
    if D_X:
        place = b * d_stride_b + (top + y) * d_stride_y + (left + x) * d_stride_x
        tl.store(d_x_ptr + place[:, None] + (c * d_stride_c)[None, :], acc, known)


@triton.jit
def region_conv_weight_gradient_kernel(
    out_ptr,
    grad_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    tiles,
    per_part,
    grid,
    patch_height,
    patch_width,
    channels,
    filters,
    grad_stride_b,
    grad_stride_o,
    grad_stride_y,
    grad_stride_x,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_FILTERS: tl.constexpr,
):
    """out (parts, n·n, 9, channels, filters): a part of the tiles (axis 0), patch and tap (axis 1)."""
    part = tl.program_id(0).to(tl.int64)
    patch, tap = (tl.program_id(1) // 9).to(tl.int64), tl.program_id(1) % 9
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    c = (tl.program_id(2) % channel_tiles).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    o = (tl.program_id(2) // channel_tiles).to(tl.int64) * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    in_channels, in_filters = c < channels, o < filters
    dy, dx = tap // 3 - 1, tap % 3 - 1
    acc = tl.zeros((BLOCK_CHANNELS, BLOCK_FILTERS), tl.float32)
    for tile in range(part * per_part, tl.minimum((part + 1) * per_part, tiles)):
        b, top, left, y, x, in_pixels = _tile(tile, patch, grid, patch_height, patch_width, BLOCK_PIXELS)
        inside = (y + dy >= 0) & (y + dy < patch_height) & (x + dx >= 0) & (x + dx < patch_width) & in_pixels
        source = b * stride_b + (top + y + dy) * stride_y + (left + x + dx) * stride_x
        known = inside[:, None] & in_channels[None, :]
        value = tl.load(
            x_ptr + source[:, None] + (c * stride_c)[None, :], known, other=0.0
        )  # (pixels, channels)
        place = b * grad_stride_b + (top + y) * grad_stride_y + (left + x) * grad_stride_x
        grad = tl.load(
            grad_ptr + place[:, None] + (o * grad_stride_o)[None, :],
            in_pixels[:, None] & in_filters[None, :],
            other=0.0,
        )  # (pixels, filters)
        if SCALE:
            active = _activated(value, scale_ptr, shift_ptr, patch * channels + c, in_channels)
            value = tl.where(known, active, 0.0).to(grad.dtype)
        acc = tl.dot(tl.trans(value), grad, acc, input_precision=PRECISION)
    row_of = (((part * grid * grid + patch) * 9 + tap) * channels + c) * filters
    tl.store(out_ptr + row_of[:, None] + o[None, :], acc, in_channels[:, None] & in_filters[None, :])


def _format(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


def _most_inner(x: Tensor) -> int:
    """The longest step of the sum: with pixels innermost every element needs an address of its own."""
    return 32 if _format(x) == torch.channels_last else 16


def _by_tap(weight: Tensor) -> Tensor:
    """(n, n, C_out, C_in, 3, 3) as (n, n, 3, 3, C_in, C_out): filters innermost, where a tile reads them."""
    return weight.permute(0, 1, 4, 5, 3, 2).contiguous()


def region_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """The raw operator `aufast::region_conv`."""
    batch, channels, height, width = x.shape
    grid, filters = weight.shape[0], weight.shape[2]
    out = torch.empty(
        (batch, filters, height, width), dtype=x.dtype, device=x.device, memory_format=_format(x)
    )
    patch = (height // grid, width // grid)
    tiles = batch * triton.cdiv(patch[0] * patch[1], BLOCK_PIXELS)
    block = _block(filters, 64)
    bias, scale, shift = (None if t is None else t.contiguous() for t in (bias, scale, shift))
    region_conv_kernel[(tiles, grid * grid, triton.cdiv(filters, block))](
        out, x, _by_tap(weight), bias, scale, shift, grid, *patch, channels, filters,
        *x.stride(), *out.stride(),
        BIAS=bias is not None, SCALE=scale is not None, PRECISION=dot_precision(x.dtype),
        BLOCK_PIXELS=BLOCK_PIXELS, BLOCK_CHANNELS=_block(channels, _most_inner(x)), BLOCK_FILTERS=block,
        **RESOURCES,
    )  # fmt: skip
    return out


def _input_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, x_wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, and of scale and shift (n, n, C_in) in float32 where they are given."""
    batch, channels, height, width = x.shape
    grid, filters = weight.shape[0], weight.shape[2]
    patch = (height // grid, width // grid)
    tiles = batch * triton.cdiv(patch[0] * patch[1], BLOCK_PIXELS)
    d_x = torch.empty_like(x, memory_format=_format(x)) if x_wanted else x.new_empty(0, 0, 0, 0)
    d_scale = d_shift = None
    if scale is not None:
        d_scale = x.new_empty(tiles, grid, grid, channels, dtype=torch.float32)
        d_shift = torch.empty_like(d_scale)
    block = _block(channels, 64)
    region_conv_input_gradient_kernel[(tiles, grid * grid, triton.cdiv(channels, block))](
        d_x, d_scale, d_shift, grad, x, _by_tap(weight), scale, shift,
        grid, *patch, channels, filters, *grad.stride(), *x.stride(), *d_x.stride(),
        SCALE=scale is not None, D_X=x_wanted, PRECISION=dot_precision(x.dtype),
        BLOCK_PIXELS=BLOCK_PIXELS, BLOCK_CHANNELS=block, BLOCK_FILTERS=_block(filters, _most_inner(x)),
        **RESOURCES,
    )  # fmt: skip
    return d_x, *(None if d is None else d.sum(0) for d in (d_scale, d_shift))


def _weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """The gradient of weight (n, n, C_out, C_in, 3, 3), in float32."""
    batch, channels, height, width = x.shape
    grid, filters = weight.shape[0], weight.shape[2]
    patch = (height // grid, width // grid)
    tiles = batch * triton.cdiv(patch[0] * patch[1], BLOCK_PIXELS)
    per_part = max(TILES_PER_PART, triton.cdiv(tiles, MOST_PARTS))
    parts = triton.cdiv(tiles, per_part)
    partial = x.new_empty(parts, grid, grid, 3, 3, channels, filters, dtype=torch.float32)
    blocks = _block(channels, 32), _block(filters, 32)
    region_conv_weight_gradient_kernel[
        (parts, grid * grid * 9, triton.cdiv(channels, blocks[0]) * triton.cdiv(filters, blocks[1]))
    ](
        partial, grad, x, scale, shift, tiles, per_part, grid, *patch, channels, filters,
        *grad.stride(), *x.stride(),
        SCALE=scale is not None, PRECISION=dot_precision(x.dtype),
        BLOCK_PIXELS=BLOCK_PIXELS, BLOCK_CHANNELS=blocks[0], BLOCK_FILTERS=blocks[1], **RESOURCES,
    )  # fmt: skip
    return partial.sum(0).permute(0, 1, 5, 4, 2, 3)


def region_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    """The raw operator `aufast::region_conv_backward`."""
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    found: list[Tensor | None] = [None] * 5
    if needs & 1 or (scale is not None and needs & 0b11000):
        found[0], found[3], found[4] = _input_gradients(grad, x, weight, scale, shift, bool(needs & 1))
    if needs & 2:
        found[1] = _weight_gradient(grad, x, weight, scale, shift)
    if bias is not None and needs & 4:
        grid = weight.shape[0]
        rows, columns = grad.shape[2] // grid, grad.shape[3] // grid
        patches = grad.unflatten(2, (grid, rows)).unflatten(4, (grid, columns))  # (B, C_out, n, h, n, w)
        found[2] = patches.sum((0, 3, 5), dtype=torch.float32).permute(1, 2, 0)
    others = (
        x.new_empty(0) if d is None or not needs >> k & 1 else d.to(x.dtype).contiguous()
        for k, d in enumerate(found[1:], start=1)
    )
    return found[0] if needs & 1 else x.new_empty(0), *others
