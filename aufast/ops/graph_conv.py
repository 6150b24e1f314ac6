"""AU-specific graph convolution: the public function and the operator `aufast::graph_conv`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from aufast import reference
from aufast.ops import direct
from aufast.ops.autocast import cast_products
from aufast.ops.backends import choose
from aufast.ops.checks import NORMALIZATION_NAMES, NORMALIZATIONS, Shapes, normalization_code
from aufast.ops.registration import dense, fresh, needs_mask, operator, register, unwanted, vector_jacobian


def graph_conv(
    x: Tensor,
    U: Tensor,
    Q: Tensor | None,
    W: Tensor,
    bias: Tensor | None = None,
    *,
    normalization: str = "global",
    backend: str | None = None,
) -> Tensor:
    """Mix the nodes by a learned graph, then give each node its own linear map.

    Args:
        x: (..., m, cin) node features.
        U: (m, ce) embeddings that make the graph `S = I + N(ReLU(U Uᵀ))`; N(0) = 0.
        Q: (m, ce) embeddings that make each node's map `Θ_i = Σ_e Q_ie W_e`; None for one shared map.
        W: (ce, cin, cout) with "global"; (ce, K, cin, cout) with "softmax"; without ce where Q is None.
        bias: (ce, cout), adds `Q·bias`; (cout,) where Q is None; None for none.
        normalization: "global" (AAR) or "softmax" (AGCRN's K Chebyshev supports of `softmax(relu(U Uᵀ))`).
        backend: "auto", "reference", "cpu", "cuda" or "triton"; None for the one of `aufast.use_backend`.

    Returns:
        (..., m, cout) in the dtype of `x`; low precision accumulates in float32.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape or device, named in the message.
        RuntimeError: an explicitly requested backend that cannot run, with the reason.

    Source: AAR eq. (10), (11), and (15) for `Q=None`; AGCRN for "softmax".
    """
    call = direct.signature("graph_conv", (normalization, backend), x, U, Q, W, bias)
    if (run := direct.passed.get(call)) is not None:
        return run(x, U, Q, W, bias, NORMALIZATIONS[normalization])
    x, U, Q, W, bias = cast_products(x, U, Q, W, bias)
    code = normalization_code("graph_conv", normalization)
    _check(x, U, Q, W, bias, code)
    chosen = choose("graph_conv", x, backend)
    if chosen == "reference":
        return reference.graph_conv(x, U, Q, W, bias, normalization=normalization)
    direct.remember(call, chosen)
    return operator("graph_conv", chosen)(x, U, Q, W, bias, code)


def _check(x: Tensor, U: Tensor, Q: Tensor | None, W: Tensor, bias: Tensor | None, code: int) -> None:
    shapes = Shapes("graph_conv")
    pool = ("ce",) if Q is not None else ()
    order = ("K",) if code == NORMALIZATIONS["softmax"] else ()
    shapes.bind("x", x, "...", "m", "cin")
    shapes.bind("U", U, "m", "ce", like=x)
    if Q is not None:
        shapes.bind("Q", Q, "m", "ce", like=x)
    shapes.bind("W", W, *pool, *order, "cin", "cout", like=x)
    if order and W.shape[-3] == 0:
        raise ValueError("graph_conv: W must hold at least one support, got K=0")
    if bias is not None:
        shapes.bind("bias", bias, *pool, "cout", like=x)


def _fallback(
    x: Tensor, U: Tensor, Q: Tensor | None, W: Tensor, bias: Tensor | None, normalization: int
) -> Tensor:
    return fresh(reference.graph_conv(x, U, Q, W, bias, normalization=NORMALIZATION_NAMES[normalization]))


def _fake(
    x: Tensor, U: Tensor, Q: Tensor | None, W: Tensor, bias: Tensor | None, normalization: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], W.shape[-1])


def _vector_jacobian(
    grad: Tensor, inputs: tuple[Tensor | None, ...], normalization: int, needs: int
) -> list[Tensor | None]:
    def definition(*inputs: Tensor | None) -> tuple[Tensor]:
        return (reference.graph_conv(*inputs, normalization=NORMALIZATION_NAMES[normalization]),)

    return vector_jacobian(definition, inputs, (grad,), needs)


def _backward_fallback(
    grad: Tensor,
    x: Tensor,
    U: Tensor,
    Q: Tensor | None,
    W: Tensor,
    bias: Tensor | None,
    normalization: int,
    needs: int,
) -> tuple[Tensor, ...]:
    return tuple(dense(g, x) for g in _vector_jacobian(grad, (x, U, Q, W, bias), normalization, needs))


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    U: Tensor,
    Q: Tensor | None,
    W: Tensor,
    bias: Tensor | None,
    normalization: int,
    needs: int,
) -> tuple[Tensor, ...]:
    inputs = (x, U, Q, W, bias)
    return tuple(
        x.new_empty(value.shape) if value is not None and needs >> k & 1 else unwanted(x)
        for k, value in enumerate(inputs)
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.normalization = inputs
    ctx.save_for_backward(*tensors)


def _backward(derivative: OpOverload, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    needs = needs_mask(ctx.needs_input_grad[:5])
    if torch.is_grad_enabled():
        grads = _vector_jacobian(grad, inputs, ctx.normalization, needs)
    else:
        grads = derivative(grad, *inputs, ctx.normalization, needs)
    return *(g if needs >> k & 1 else None for k, g in enumerate(grads)), None


register(
    "graph_conv",
    schema="(Tensor x, Tensor U, Tensor? Q, Tensor W, Tensor? bias, int normalization) -> Tensor",
    backward_schema="(Tensor grad, Tensor x, Tensor U, Tensor? Q, Tensor W, Tensor? bias, int normalization,"
    " int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fallback=_fallback,
    backward_fallback=_backward_fallback,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
