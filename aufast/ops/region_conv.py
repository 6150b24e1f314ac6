"""Region convolution: the public function and the operator `aufast::region_conv`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from aufast import reference
from aufast.ops import direct
from aufast.ops.autocast import cast_products
from aufast.ops.backends import choose
from aufast.ops.checks import Shapes
from aufast.ops.registration import (
    dense,
    image_format,
    needs_mask,
    operator,
    register,
    unwanted,
    vector_jacobian,
)


def region_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve each patch of an n×n grid with its own 3×3 filters, zero padded at the patch's own border.

    Args:
        x: (B, C_in, H, W), H and W divisible by n; contiguous or channels_last, the output keeps that format.
        weight: (n, n, C_out, C_in, 3, 3).
        bias: (n, n, C_out) or None.
        scale: (n, n, C_in); with `shift`, each patch goes through `ReLU(x·scale + shift)` before the padding.
        shift: (n, n, C_in), given exactly when `scale` is.
        backend: "auto", "reference", "cpu", "cuda" or "triton"; None for the one of `aufast.use_backend`.

    Returns:
        (B, C_out, H, W) in the dtype of `x`; low precision accumulates in float32.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape or device, named in the message.
        RuntimeError: an explicitly requested backend that cannot run, with the reason.

    Source: the layer L_n of AAR's hierarchical multi-scale region layer.
    """
    call = direct.signature("region_conv", (backend,), x, weight, bias, scale, shift)
    if (run := direct.passed.get(call)) is not None:
        return run(x, weight, bias, scale, shift)
    x, weight, bias, scale, shift = cast_products(x, weight, bias, scale, shift)
    _check(x, weight, bias, scale, shift)
    chosen = choose("region_conv", x, backend)
    if chosen == "reference":
        return reference.region_conv(x, weight, bias, scale, shift)
    direct.remember(call, chosen)
    return operator("region_conv", chosen)(x, weight, bias, scale, shift)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> None:
    shapes = Shapes("region_conv")
    shapes.bind("x", x, "B", "C_in", "H", "W")
    shapes.bind("weight", weight, "n", "n", "C_out", "C_in", 3, 3, like=x)
    grid, height, width = shapes.sizes["n"], *x.shape[-2:]
    if 0 in weight.shape:
        raise ValueError(
            "region_conv: weight must have at least one patch, one filter and one input channel,"
            f" got {tuple(weight.shape)}"
        )
    if 0 in (height, width) or height % grid or width % grid:
        raise ValueError(
            f"region_conv: x must have H and W divisible by n={grid} and not 0, got H={height} and W={width}"
        )
    if bias is not None:
        shapes.bind("bias", bias, "n", "n", "C_out", like=x)
    if (scale is None) != (shift is None):
        raise ValueError("region_conv: scale and shift must be given together")
    if scale is not None:
        shapes.bind("scale", scale, "n", "n", "C_in", like=x)
        shapes.bind("shift", shift, "n", "n", "C_in", like=x)


def _fallback(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    out = reference.region_conv(x, weight, bias, scale, shift)
    return out.contiguous(memory_format=image_format(x))


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    shape = (x.shape[0], weight.shape[2], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=image_format(x))


def _vector_jacobian(grad: Tensor, inputs: tuple[Tensor | None, ...], needs: int) -> list[Tensor | None]:
    return vector_jacobian(lambda *inputs: (reference.region_conv(*inputs),), inputs, (grad,), needs)


def _backward_fallback(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    d_x, *others = _vector_jacobian(grad, (x, weight, bias, scale, shift), needs)
    d_x = unwanted(x) if d_x is None else d_x.clone(memory_format=image_format(x))
    return d_x, *(dense(g, x) for g in others)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    d_x = torch.empty_like(x, memory_format=image_format(x)) if needs & 1 else unwanted(x)
    others = enumerate((weight, bias, scale, shift), start=1)
    return d_x, *(
        value.new_empty(value.shape) if value is not None and needs >> k & 1 else unwanted(x)
        for k, value in others
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(derivative: OpOverload, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    needs = needs_mask(ctx.needs_input_grad)
    if torch.is_grad_enabled():
        grads = _vector_jacobian(grad, inputs, needs)
    else:
        grads = derivative(grad, *inputs, needs)
    return tuple(g if needs >> k & 1 else None for k, g in enumerate(grads))


register(
    "region_conv",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift) -> Tensor",
    backward_schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift,"
    " int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=_fallback,
    backward_fallback=_backward_fallback,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
