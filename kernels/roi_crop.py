"""Multi-ROI affine crop-and-resize in Triton: MARGL eq. (2) and bilinear sampling with zeros outside.

Forward: a program owns one region and a block of channels. Where its samples fall, and their weights, is
computed once and serves all its channels; with channels innermost (channels_last) a tap is a contiguous
vector.

Backward, without atomics. A sample at (x, y) weighs pixel (i, j) by max(0, 1 - |x - j|) max(0, 1 - |y - i|),
so the features' gradient is gathered: a program owns a square of an image's pixels and a block of channels,
walks over the regions in order, and for those that can reach its square adds the product of (pixels, samples)
weights and (samples, channels) gradients. The regions' gradient is one program per region, which sums its
samples and channels in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SAMPLES = 32
SIDE = 8  # of a square of pixels


@triton.jit
def _scale(size, ALIGN: tl.constexpr):
    """Pixels a unit of the normalised coordinate."""
    return (size - 1) / 2 if ALIGN else size / 2


@triton.jit
def _region(rois_ptr, roi, height, width, BOXES: tl.constexpr, ALIGN: tl.constexpr):
    """One region as x = xx·u + xy·v + x0 and y = yx·u + yy·v + y0 in pixels, u and v in [-1, 1].

    All zero where it is not finite, which is the last result.
    """
    if BOXES:
        x1, y1 = tl.load(rois_ptr + roi * 4), tl.load(rois_ptr + roi * 4 + 1)
        x2, y2 = tl.load(rois_ptr + roi * 4 + 2), tl.load(rois_ptr + roi * 4 + 3)
        xx, xy, x0 = (x2 - x1) / 2, 0.0, (x1 + x2) / 2 - 0.5
        yx, yy, y0 = 0.0, (y2 - y1) / 2, (y1 + y2) / 2 - 0.5
    else:
        row, scale_x, scale_y = rois_ptr + roi * 6, _scale(width, ALIGN), _scale(height, ALIGN)
        half = 0.0 if ALIGN else 0.5
        xx, xy, x0 = (
            tl.load(row) * scale_x,
            tl.load(row + 1) * scale_x,
            (tl.load(row + 2) + 1) * scale_x - half,
        )
        yx, yy = tl.load(row + 3) * scale_y, tl.load(row + 4) * scale_y
        y0 = (tl.load(row + 5) + 1) * scale_y - half
    # 0 · v is 0 where v is finite and NaN where it is not.
    finite = xx * 0 + xy * 0 + x0 * 0 + yx * 0 + yy * 0 + y0 * 0 == 0
    xx, xy, x0 = tl.where(finite, xx, 0.0), tl.where(finite, xy, 0.0), tl.where(finite, x0, 0.0)
    yx, yy, y0 = tl.where(finite, yx, 0.0), tl.where(finite, yy, 0.0), tl.where(finite, y0, 0.0)
    return xx, xy, x0, yx, yy, y0, finite


@triton.jit
def _steps(size, ALIGN: tl.constexpr):
    """What the normalised coordinate (2·index + 1 - size) / steps of an output index is divided by."""
    return tl.maximum(size - 1, 1) if ALIGN else size


@triton.jit
def _pixel(along_u, along_v, centre, column, row, out_width, out_height, size, ALIGN: tl.constexpr):
    """Where a sample falls along one axis; far outside is outside, without overflow.

    Multiplied before it is divided, so that boxes of round numbers meet the pixels' centres exactly.
    """
    x = along_u * (2 * column + 1 - out_width) / _steps(out_width, ALIGN) + centre
    x += along_v * (2 * row + 1 - out_height) / _steps(out_height, ALIGN)
    return tl.minimum(tl.maximum(x, -4.0), size + 4.0)


@triton.jit
def _tap(pixel, size):
    """The lower neighbour of a coordinate, the upper one's weight, and which of them are on the map."""
    low = tl.floor(pixel)
    index = low.to(tl.int64)
    return index, pixel - low, (index >= 0) & (index < size), (index >= -1) & (index + 1 < size)


@triton.jit
def roi_crop_kernel(
    out_ptr,
    features_ptr,
    rois_ptr,
    regions,
    channels,
    height,
    width,
    out_height,
    out_width,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    out_stride_roi,
    out_stride_c,
    out_stride_sample,
    BOXES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One region (program axis 0), one block of channels (axis 1)."""
    roi = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    xx, xy, x0, yx, yy, y0, finite = _region(rois_ptr, roi, height, width, BOXES, ALIGN)
    planes = features_ptr + (roi // regions) * stride_b + c * stride_c
    in_channels = (c < channels)[None, :]
    for start in range(0, out_height * out_width, BLOCK_SAMPLES):
        sample = start + tl.arange(0, BLOCK_SAMPLES)
        column, row = sample % out_width, sample // out_width
        x = _pixel(xx, xy, x0, column, row, out_width, out_height, width, ALIGN)
        y = _pixel(yx, yy, y0, column, row, out_width, out_height, height, ALIGN)
        x, right, left_in, right_in = _tap(x, width)
        y, lower, top_in, bottom_in = _tap(y, height)
        taps = planes[None, :] + (y * stride_y + x * stride_x)[:, None]  # (samples, channels)
        value = ((1 - right) * (1 - lower))[:, None] * tl.load(
            taps, (top_in & left_in)[:, None] & in_channels, other=0.0
        ).to(tl.float32)
        value += (right * (1 - lower))[:, None] * tl.load(
            taps + stride_x, (top_in & right_in)[:, None] & in_channels, other=0.0
        ).to(tl.float32)
        value += ((1 - right) * lower)[:, None] * tl.load(
            taps + stride_y, (bottom_in & left_in)[:, None] & in_channels, other=0.0
        ).to(tl.float32)
        value += (right * lower)[:, None] * tl.load(
            taps + stride_y + stride_x, (bottom_in & right_in)[:, None] & in_channels, other=0.0
        ).to(tl.float32)
        value = tl.where(finite, value, float("nan"))
        place = roi * out_stride_roi + (sample.to(tl.int64) * out_stride_sample)[:, None] + c * out_stride_c
        tl.store(out_ptr + place, value, (sample < out_height * out_width)[:, None] & in_channels)


@triton.jit
def _reach(along_u, along_v, centre, out_width, out_height, ALIGN: tl.constexpr):
    """The first and last pixel that a region's samples can touch along one axis."""
    half = tl.abs(along_u) * (out_width - 1) / _steps(out_width, ALIGN)
    half += tl.abs(along_v) * (out_height - 1) / _steps(out_height, ALIGN)
    # The neighbour beyond the last sample, and room for rounding.
    return centre - half - 1.5, centre + half + 1.5


@triton.jit
def roi_crop_features_gradient_kernel(
    d_features_ptr,
    grad_ptr,
    rois_ptr,
    regions,
    channels,
    height,
    width,
    out_height,
    out_width,
    grad_stride_b,
    grad_stride_r,
    grad_stride_c,
    grad_stride_v,
    grad_stride_u,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    BOXES: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One square of pixels of one image (program axis 0), one block of channels (axis 1)."""
    columns = tl.cdiv(width, SIDE)
    squares = columns * tl.cdiv(height, SIDE)
    b, square = (tl.program_id(0) // squares).to(tl.int64), tl.program_id(0) % squares
    left, top = square % columns * SIDE, square // columns * SIDE
    lane = tl.arange(0, SIDE * SIDE)
    j, i = left + lane % SIDE, top + lane // SIDE
    c = tl.program_id(1).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    in_channels = (c < channels)[None, :]
    acc = tl.zeros((SIDE * SIDE, BLOCK_CHANNELS), tl.float32)
    for number in range(regions):
        region = tl.full((), 0, tl.int64) + number
        xx, xy, x0, yx, yy, y0, finite = _region(rois_ptr, b * regions + region, height, width, BOXES, ALIGN)
        first_x, last_x = _reach(xx, xy, x0, out_width, out_height, ALIGN)
        first_y, last_y = _reach(yx, yy, y0, out_width, out_height, ALIGN)
        across = (first_x < left + SIDE) & (last_x > left) & (first_y < top + SIDE) & (last_y > top)
        # A region that cannot reach this square has no samples to walk over.
        for start in range(0, tl.where(finite & across, out_height * out_width, 0), BLOCK_SAMPLES):
            sample = start + tl.arange(0, BLOCK_SAMPLES)
            column, row = sample % out_width, sample // out_width
            x = _pixel(xx, xy, x0, column, row, out_width, out_height, width, ALIGN)
            y = _pixel(yx, yy, y0, column, row, out_width, out_height, height, ALIGN)
            weight = tl.maximum(1 - tl.abs(x[None, :] - j[:, None]), 0.0)  # (pixels, samples)
            weight *= tl.maximum(1 - tl.abs(y[None, :] - i[:, None]), 0.0)
            place = b * grad_stride_b + region * grad_stride_r + row.to(tl.int64) * grad_stride_v
            place = (place + column.to(tl.int64) * grad_stride_u)[:, None] + c * grad_stride_c
            known = (sample < out_height * out_width)[:, None] & in_channels
            grad = tl.load(grad_ptr + place, known, other=0.0).to(tl.float32)  # (samples, channels)
            acc = tl.dot(weight, grad, acc, input_precision=PRECISION)
    pixel = b * stride_b + i.to(tl.int64) * stride_y + j.to(tl.int64) * stride_x
    in_map = ((j < width) & (i < height))[:, None]
    tl.store(d_features_ptr + pixel[:, None] + c * stride_c, acc, in_map & in_channels)


@triton.jit
def _store_region(
    d_rois_ptr, roi, xx, xy, x0, yx, yy, y0, height, width, BOXES: tl.constexpr, ALIGN: tl.constexpr
):
    """From the gradient of `_region`'s six numbers to that of the region's own."""
    if BOXES:
        tl.store(d_rois_ptr + roi * 4, (x0 - xx) / 2)
        tl.store(d_rois_ptr + roi * 4 + 1, (y0 - yy) / 2)
        tl.store(d_rois_ptr + roi * 4 + 2, (x0 + xx) / 2)
        tl.store(d_rois_ptr + roi * 4 + 3, (y0 + yy) / 2)
    else:
        row, scale_x, scale_y = d_rois_ptr + roi * 6, _scale(width, ALIGN), _scale(height, ALIGN)
        tl.store(row, xx * scale_x)
        tl.store(row + 1, xy * scale_x)
        tl.store(row + 2, x0 * scale_x)
        tl.store(row + 3, yx * scale_y)
        tl.store(row + 4, yy * scale_y)
        tl.store(row + 5, y0 * scale_y)


@triton.jit
def roi_crop_rois_gradient_kernel(
    d_rois_ptr,
    grad_ptr,
    features_ptr,
    rois_ptr,
    regions,
    channels,
    height,
    width,
    out_height,
    out_width,
    grad_stride_b,
    grad_stride_r,
    grad_stride_c,
    grad_stride_v,
    grad_stride_u,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    BOXES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One region: the sums of its samples' derivatives, each over all channels."""
    roi = tl.program_id(0).to(tl.int64)
    image, region = roi // regions, roi % regions
    xx, xy, x0, yx, yy, y0, finite = _region(rois_ptr, roi, height, width, BOXES, ALIGN)
    zeros = tl.zeros((BLOCK_SAMPLES,), tl.float32)
    d_xx, d_xy, d_x0, d_yx, d_yy, d_y0 = zeros, zeros, zeros, zeros, zeros, zeros
    # A region that is not finite passes no gradient: it has no samples to walk over.
    for start in range(0, tl.where(finite, out_height * out_width, 0), BLOCK_SAMPLES):
        sample = start + tl.arange(0, BLOCK_SAMPLES)
        column, row = sample % out_width, sample // out_width
        x = _pixel(xx, xy, x0, column, row, out_width, out_height, width, ALIGN)
        y = _pixel(yx, yy, y0, column, row, out_width, out_height, height, ALIGN)
        x, right, left_in, right_in = _tap(x, width)
        y, lower, top_in, bottom_in = _tap(y, height)
        in_samples = sample < out_height * out_width
        d_x, d_y = zeros, zeros
        for first in range(0, channels, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
            known = in_samples[:, None] & (channel < channels)[None, :]
            place = image * grad_stride_b + region * grad_stride_r + row.to(tl.int64) * grad_stride_v
            place = (place + column.to(tl.int64) * grad_stride_u)[:, None] + channel * grad_stride_c
            grad = tl.load(grad_ptr + place, known, other=0.0).to(tl.float32)  # (samples, channels)
            taps = (
                features_ptr + image * stride_b + (y * stride_y + x * stride_x)[:, None] + channel * stride_c
            )
            a = tl.load(taps, known & (top_in & left_in)[:, None], other=0.0).to(tl.float32)
            b = tl.load(taps + stride_x, known & (top_in & right_in)[:, None], other=0.0).to(tl.float32)
            taps += stride_y
            c = tl.load(taps, known & (bottom_in & left_in)[:, None], other=0.0).to(tl.float32)
            d = tl.load(taps + stride_x, known & (bottom_in & right_in)[:, None], other=0.0).to(tl.float32)
            d_x += tl.sum(grad * ((b - a) * (1 - lower)[:, None] + (d - c) * lower[:, None]), 1)
            d_y += tl.sum(grad * ((c - a) * (1 - right)[:, None] + (d - b) * right[:, None]), 1)
        u = (2 * column + 1 - out_width) / _steps(out_width, ALIGN)
        v = (2 * row + 1 - out_height) / _steps(out_height, ALIGN)
        d_xx, d_xy, d_x0 = d_xx + d_x * u, d_xy + d_x * v, d_x0 + d_x
        d_yx, d_yy, d_y0 = d_yx + d_y * u, d_yy + d_y * v, d_y0 + d_y
    _store_region(
        d_rois_ptr, roi, tl.sum(d_xx, 0), tl.sum(d_xy, 0), tl.sum(d_x0, 0), tl.sum(d_yx, 0), tl.sum(d_yy, 0),
        tl.sum(d_y0, 0), height, width, BOXES, ALIGN,
    )  # fmt: skip


def _channels_last(features: Tensor) -> bool:
    return not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last)


def _channel_block(channels: int, most: int) -> int:
    return min(max(triton.next_power_of_2(channels), 16), most)


def roi_crop(features: Tensor, rois: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """The raw operator `aufast::roi_crop`."""
    batch, channels, rows, columns = features.shape
    regions, samples = rois.shape[1], height * width
    if _channels_last(features):
        out = features.new_empty(batch, regions, height, width, channels).permute(0, 1, 4, 2, 3)
        strides = (channels * samples, 1, channels)
    else:
        out = features.new_empty(batch, regions, channels, height, width)
        strides = (channels * samples, samples, 1)
    block = _channel_block(channels, 64 if _channels_last(features) else 32)
    roi_crop_kernel[(batch * regions, triton.cdiv(channels, block))](
        out, features, rois.float().contiguous(), regions, channels, rows, columns, height, width,
        *features.stride(), *strides,
        BOXES=rois.dim() == 3, ALIGN=align_corners, BLOCK_SAMPLES=BLOCK_SAMPLES, BLOCK_CHANNELS=block,
        maxnreg=168,
    )  # fmt: skip
    return out


def roi_crop_backward(
    grad: Tensor, features: Tensor, rois: Tensor, align_corners: bool, needs: int
) -> tuple[Tensor, Tensor]:
    """The raw operator `aufast::roi_crop_backward`."""
    batch, channels, rows, columns = features.shape
    regions = rois.shape[1]
    places = rois.float().contiguous()
    sizes = (regions, channels, rows, columns, *grad.shape[-2:])
    options = {"BOXES": rois.dim() == 3, "ALIGN": align_corners, "BLOCK_SAMPLES": BLOCK_SAMPLES}
    d_features, d_rois = features.new_empty(0), rois.new_empty(0)
    if needs & 1:
        last = torch.channels_last if _channels_last(features) else torch.contiguous_format
        d_features = torch.empty_like(features, memory_format=last)
        block = _channel_block(channels, 64)
        squares = triton.cdiv(rows, SIDE) * triton.cdiv(columns, SIDE)
        # Weights and gradients in float32 by three TF32 products; one is closer than low precision can show.
        precision = "tf32x3" if features.dtype == torch.float32 else "tf32"
        roi_crop_features_gradient_kernel[(batch * squares, triton.cdiv(channels, block))](
            d_features, grad, places, *sizes, *grad.stride(), *d_features.stride(),
            PRECISION=precision, SIDE=SIDE, BLOCK_CHANNELS=block, maxnreg=255, **options,
        )  # fmt: skip
    if needs & 2:
        found = torch.empty_like(places)
        roi_crop_rois_gradient_kernel[(batch * regions,)](
            found, grad, features, places, *sizes, *grad.stride(), *features.stride(),
            BLOCK_CHANNELS=_channel_block(channels, 32 if _channels_last(features) else 16),
            maxnreg=168, **options,
        )  # fmt: skip
        d_rois = found.to(rois.dtype)
    return d_features, d_rois
