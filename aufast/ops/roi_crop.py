"""Multi-ROI affine crop-and-resize: the public function and the operator `aufast::roi_crop`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from aufast import reference
from aufast.ops import direct
from aufast.ops.autocast import keep_float
from aufast.ops.backends import choose
from aufast.ops.checks import Shapes, output_size
from aufast.ops.registration import (
    dense,
    has_tangent,
    image_format,
    needs_mask,
    operator,
    register,
    unwanted,
    vector_jacobian,
)

# Of the compiled CUDA kernel: a row of a crop's gradients must fit a block's shared memory, a pixel 16 bits.
MOST_CROP_WIDTH = 640
MOST_SIDE = 2**15 - 1


def roi_crop(
    features: Tensor,
    rois: Tensor,
    size: tuple[int, int] = (6, 6),
    *,
    align_corners: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Crop R regions of every feature map and resize each to `size` by bilinear sampling, zeros outside.

    Differentiable in the features and in the regions. A region with a NaN or an infinity gives NaN in its own
    crop only and passes no gradient. A box with x2 < x1 mirrors its crop; a box outside the map gives zeros.

    Args:
        features: (B, C, H, W), contiguous or channels_last; the crops keep that format.
        rois: (B, R, 4) boxes `(x1, y1, x2, y2)` in feature pixels, pixel i covering [i, i+1); or (B, R, 2, 3)
            affine matrices θ in normalised coordinates. Low precision is taken as float32.
        size: (h, w) of each crop.
        align_corners: as in `torch.nn.functional.grid_sample`; with θ only.
        backend: "auto", "reference", "cpu", "cuda" or "triton"; None for the one of `aufast.use_backend`.

    Returns:
        (B, R, C, h, w) in the dtype of `features`.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape or device, named in the message.
        RuntimeError: an explicitly requested backend that cannot run, with the reason.
        NotImplementedError: an argument has a forward-mode tangent.

    Source: MARGL eq. (2), `affine_grid` and `grid_sample`.
    """
    # 6.0 == 6, as a key too.
    plain = type(size) is tuple and len(size) == 2 and type(size[0]) is int and type(size[1]) is int
    call = direct.signature("roi_crop", (size, align_corners, backend), features, rois) if plain else None
    if (run := direct.passed.get(call)) is not None:
        return run(features, rois, *size, align_corners)
    given, rois = rois, keep_float(rois, features)
    _check(features, rois, align_corners)
    height, width = output_size("roi_crop", "size", size)
    chosen = choose("roi_crop", features, backend, lambda: _cuda_limit(features, width, height))
    if chosen == "reference":
        _refuse_tangents(features, rois)
        return reference.roi_crop(features, rois, (height, width), align_corners=align_corners)
    if rois is given:
        direct.remember(call, chosen)
    return operator("roi_crop", chosen)(features, rois, height, width, align_corners)


def _cuda_limit(features: Tensor, width: int, height: int) -> str | None:
    """The reason why the compiled CUDA kernel does not take these sizes, or None."""
    if width > MOST_CROP_WIDTH:
        return f"it takes crops of at most {MOST_CROP_WIDTH} columns, and came {width}"
    side = max(height, *features.shape[-2:])
    return None if side <= MOST_SIDE else f"it takes sides of at most {MOST_SIDE} pixels, and came {side}"


def _refuse_tangents(features: Tensor, rois: Tensor) -> None:
    """Say it before PyTorch's grid_sample does, which speaks of itself."""
    if has_tangent(features, rois):
        raise NotImplementedError(
            "roi_crop: no forward mode (torch.func.jvp, torch.autograd.forward_ad), because PyTorch's"
            " grid_sample has no forward AD; use reverse mode"
        )


def _check(features: Tensor, rois: Tensor, align_corners: bool) -> None:
    shapes = Shapes("roi_crop")
    shapes.bind("features", features, "B", "C", "H", "W")
    if 0 in features.shape[-2:]:
        raise ValueError(f"roi_crop: features must have at least one pixel, got {tuple(features.shape)}")
    if isinstance(rois, Tensor) and rois.dim() == 4:
        shapes.bind("rois", rois, "B", "R", 2, 3)
    else:
        shapes.bind("rois", rois, "B", "R", 4)
        if align_corners:
            raise ValueError(
                "roi_crop: boxes (B, R, 4) are defined for align_corners=False; give rois as θ (B, R, 2, 3)"
            )
    shapes.same("rois", rois, features, dtype=False)


def _fallback(features: Tensor, rois: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    out = reference.roi_crop(features, rois, (height, width), align_corners=align_corners)
    return _as_format(out, features)


def _as_format(out: Tensor, features: Tensor) -> Tensor:
    """Lay the crops (B, R, C, h, w) out as the features are: channels innermost for channels_last."""
    if image_format(features) == torch.contiguous_format:
        return out.contiguous()
    return out.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _fake(features: Tensor, rois: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    batch, channels = features.shape[:2]
    shape = (batch, rois.shape[1], channels, height, width)
    if image_format(features) == torch.contiguous_format:
        return features.new_empty(shape)
    batch, regions, channels, height, width = shape
    return features.new_empty(batch, regions, height, width, channels).permute(0, 1, 4, 2, 3)


def _backward_fallback(
    grad: Tensor, features: Tensor, rois: Tensor, align_corners: bool, needs: int
) -> tuple[Tensor, Tensor]:
    d_features, d_rois = _vector_jacobian(grad, features, rois, align_corners, needs)
    if d_features is not None:
        d_features = d_features.clone(memory_format=image_format(features))
    return unwanted(features) if d_features is None else d_features, dense(d_rois, rois)


def _vector_jacobian(
    grad: Tensor, features: Tensor, rois: Tensor, align_corners: bool, needs: int
) -> list[Tensor | None]:
    def definition(features: Tensor, rois: Tensor) -> tuple[Tensor]:
        return (reference.roi_crop(features, rois, tuple(grad.shape[-2:]), align_corners=align_corners),)

    return vector_jacobian(definition, (features, rois), (grad,), needs)


def _backward_fake(
    grad: Tensor, features: Tensor, rois: Tensor, align_corners: bool, needs: int
) -> tuple[Tensor, Tensor]:
    d_features = unwanted(features)
    if needs & 1:
        d_features = torch.empty_like(features, memory_format=image_format(features))
    return d_features, rois.new_empty(rois.shape) if needs & 2 else unwanted(rois)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    features, rois, _, _, ctx.align_corners = inputs
    ctx.save_for_backward(features, rois)


def _backward(derivative: OpOverload, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, rois = ctx.saved_tensors
    needs = needs_mask(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():
        d_features, d_rois = _vector_jacobian(grad, features, rois, ctx.align_corners, needs)
    else:
        d_features, d_rois = derivative(grad, features, rois, ctx.align_corners, needs)
    return d_features if needs & 1 else None, d_rois if needs & 2 else None, None, None, None


register(
    "roi_crop",
    schema="(Tensor features, Tensor rois, SymInt height, SymInt width, bool align_corners) -> Tensor",
    backward_schema="(Tensor grad, Tensor features, Tensor rois, bool align_corners, int needs)"
    " -> (Tensor, Tensor)",
    fallback=_fallback,
    backward_fallback=_backward_fallback,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
