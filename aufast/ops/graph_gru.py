"""Graph-GRU over a whole clip: the public function and the operator `aufast::graph_gru`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from aufast import reference
from aufast.ops import direct, graph_gru_cuda
from aufast.ops.autocast import cast_products, keep_float
from aufast.ops.backends import choose
from aufast.ops.checks import (
    NORMALIZATION_NAMES,
    NORMALIZATIONS,
    Shapes,
    accumulation_dtype,
    normalization_code,
)
from aufast.ops.registration import dense, fresh, needs_mask, operator, register, unwanted, vector_jacobian

# The differentiable inputs, in the operator's order: x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h.
_GRADIENTS = 10
_MANY_NODES = 48  # kManyNodes of csrc/cpu/graph_gru.cpp


def graph_gru(
    x: Tensor,
    U: Tensor,
    Q: Tensor,
    W_z: Tensor,
    W_r: Tensor,
    W_h: Tensor,
    h0: Tensor | None = None,
    *,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    normalization: str = "global",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a gated recurrent unit whose products are AU-specific graph convolutions, all steps in one call.

    Running a clip in chunks, with the last state of one as the `h0` of the next, gives the same numbers as
    one call.

    Args:
        x: (B, T, m, c_in), any B and T, 0 included.
        U: (m, ce) embeddings that make the graph.
        Q: (m, ce) embeddings that make each node's weights.
        W_z: (ce, c + c_in, c) update gate, state rows first; (ce, K, c + c_in, c) with "softmax".
        W_r: reset gate, as W_z.
        W_h: candidate state, as W_z.
        h0: (B, m, c) first state; None means zeros. Low precision is taken as float32.
        biases: (b_z, b_r, b_h), each (ce, c), adding `Q·b` to its gate; None for none.
        lengths: (B,) int64 on x's device: the steps of each sequence, less than 0 being 0 and more than T
            being T. Later outputs are zero, the last state is the one at the sequence's own end.
        normalization: "global" (AAR) or "softmax" (AGCRN).
        backend: "auto", "reference", "cpu", "cuda" or "triton"; None for the one of `aufast.use_backend`.

    Returns:
        States (B, T, m, c) in x's dtype, and the last state (B, m, c), kept in float32 for low precision.

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape or device, named in the message.
        RuntimeError: an explicitly requested backend that cannot run, with the reason.

    Source: AAR eq. (13).
    """
    b_z, b_r, b_h = _three(biases)
    tensors = (x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h, lengths)
    call = direct.signature("graph_gru", (normalization, backend), *tensors)
    if (run := direct.passed.get(call)) is not None:
        return run(*tensors, NORMALIZATIONS[normalization], call[-1])[:2]
    code = normalization_code("graph_gru", normalization)
    x, U, Q, W_z, W_r, W_h, b_z, b_r, b_h = cast_products(x, U, Q, W_z, W_r, W_h, b_z, b_r, b_h)
    given, h0 = h0, keep_float(h0, x)
    parameters = (U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h)
    _check(x, parameters, lengths, code)
    chosen = choose("graph_gru", x, backend, lambda: graph_gru_cuda.cannot_run(x, W_z))
    if chosen == "reference":
        pools = None if b_z is None else (b_z, b_r, b_h)
        return reference.graph_gru(
            x, U, Q, W_z, W_r, W_h, h0, biases=pools, lengths=lengths, normalization=normalization
        )
    if h0 is given:
        direct.remember(call, chosen)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
    out, h_last, _ = operator("graph_gru", chosen)(x, *parameters, lengths, code, save)
    return out, h_last


def _three(biases: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor | None, ...]:
    if biases is None:
        return None, None, None
    if not isinstance(biases, (tuple, list)) or len(biases) != 3:
        raise ValueError(
            f"graph_gru: biases must be three tensors (b_z, b_r, b_h), got {type(biases).__name__}"
        )
    if 0 < sum(b is None for b in biases) < 3:
        raise ValueError("graph_gru: biases must be three tensors (b_z, b_r, b_h), got None among them")
    return tuple(biases)


def _check(x: Tensor, parameters: tuple[Tensor | None, ...], lengths: Tensor | None, code: int) -> None:
    U, Q, W_z, W_r, W_h, h0, *biases = parameters
    shapes = Shapes("graph_gru")
    order = ("K",) if code == NORMALIZATIONS["softmax"] else ()
    shapes.bind("x", x, "B", "T", "m", "c_in")
    shapes.bind("U", U, "m", "ce", like=x)
    shapes.bind("Q", Q, "m", "ce", like=x)
    for name, W in (("W_z", W_z), ("W_r", W_r), ("W_h", W_h)):
        shapes.bind(name, W, "ce", *order, "c+c_in", "c", like=x)
    if shapes.sizes["c+c_in"] != shapes.sizes["c"] + shapes.sizes["c_in"]:
        raise ValueError(
            f"graph_gru: W_z must have c + c_in = {shapes.sizes['c']} + {shapes.sizes['c_in']} rows"
            f" (state rows, then input rows), got {tuple(W_z.shape)}"
        )
    if order and W_z.shape[1] == 0:
        raise ValueError("graph_gru: W_z must hold at least one support, got K=0")
    if h0 is not None:
        shapes.bind("h0", h0, "B", "m", "c")
        shapes.same("h0", h0, x, dtype=False)
        if h0.dtype != accumulation_dtype(x.dtype):
            raise TypeError(f"graph_gru: h0 is {h0.dtype}, but the input is {x.dtype}")
    for name, b in zip(("biases[0]", "biases[1]", "biases[2]"), biases, strict=True):
        if b is not None:
            shapes.bind(name, b, "ce", "c", like=x)
    if lengths is not None:
        _check_lengths(lengths, x)


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64 or lengths.shape != x.shape[:1]:
        came = (
            f"{tuple(lengths.shape)} {lengths.dtype}"
            if isinstance(lengths, Tensor)
            else type(lengths).__name__
        )
        raise ValueError(f"graph_gru: lengths must be ({x.shape[0]},) int64, got {came}")
    if lengths.device != x.device:
        raise ValueError(f"graph_gru: lengths is on {lengths.device}, but the input is on {x.device}")


def _definition(lengths: Tensor | None, normalization: int):
    def definition(x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h) -> tuple[Tensor, Tensor]:
        biases = None if b_z is None else (b_z, b_r, b_h)
        return reference.graph_gru(
            x,
            U,
            Q,
            W_z,
            W_r,
            W_h,
            h0,
            biases=biases,
            lengths=lengths,
            normalization=NORMALIZATION_NAMES[normalization],
        )

    return definition


def _fallback(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *parameters, lengths, normalization, save = rest
    out, h_last = _definition(lengths, normalization)(x, *parameters)
    return (
        fresh(out),
        fresh(h_last),
        _saved(x, rest[2], normalization, save).zero_(),
    )  # the fallback's backward computes the gates again


def _saved(x: Tensor, W_z: Tensor, normalization: int, save: bool) -> Tensor:
    """Room for what the backward needs.

    The gates (B, T, m, 3c): z, r and the candidate side by side. On the CPU, of a graph of many nodes, what
    they are made of: the state and r ★ h mixed by every support but the identity, as
    `csrc/cpu/graph_gru_whole.inc` has it.
    """
    if not save:
        return unwanted(x)
    batch, steps, nodes, _ = x.shape
    channels = W_z.shape[-1]
    if x.device.type != "cpu" or nodes < _MANY_NODES:
        return x.new_empty(batch, steps, nodes, 3 * channels)
    supports = W_z.shape[1] - 1 if normalization == NORMALIZATIONS["softmax"] else 1
    granule = 8 if x.dtype == torch.float64 else 16  # channels are padded to 64 bytes of the type computed in
    padded = (channels + granule - 1) // granule * granule
    return x.new_empty(2, supports, nodes, batch * steps * padded + granule)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    W_z, normalization, save = rest[2], *rest[-2:]
    batch, _, nodes, _ = x.shape
    out = x.new_empty(*x.shape[:-1], W_z.shape[-1])
    h_last = x.new_empty(batch, nodes, W_z.shape[-1], dtype=accumulation_dtype(x.dtype))
    return out, h_last, _saved(x, W_z, normalization, save)


def _backward_fallback(grad_out: Tensor, grad_h_last: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, lengths, _, _, normalization, needs = rest
    grads = vector_jacobian(_definition(lengths, normalization), inputs, (grad_out, grad_h_last), needs)
    return tuple(dense(g, inputs[0]) for g in grads)


def _backward_fake(grad_out: Tensor, grad_h_last: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:_GRADIENTS], rest[-1]
    return tuple(
        value.new_empty(value.shape) if value is not None and needs >> k & 1 else unwanted(inputs[0])
        for k, value in enumerate(inputs)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.normalization, save = inputs
    out, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved)
    if save:
        ctx.save_for_backward(*tensors, out, saved)


def _backward(
    derivative: OpOverload, ctx: Any, grad_out: Tensor | None, grad_h_last: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # read once: activation checkpointing hands them out once
    if not tensors:
        raise RuntimeError("aufast::graph_gru was called with save=False, so it has no gradient")
    *inputs, lengths, out, saved = tensors
    needs = needs_mask(ctx.needs_input_grad[:_GRADIENTS])
    if torch.is_grad_enabled():
        definition = _definition(lengths, ctx.normalization)
        grads = vector_jacobian(definition, inputs, (grad_out, grad_h_last), needs)
    else:
        x = inputs[0]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_h_last is None:
            state_dtype = accumulation_dtype(x.dtype)
            grad_h_last = out.new_zeros(out.shape[0], *out.shape[2:], dtype=state_dtype)
        grads = derivative(grad_out, grad_h_last, *inputs, lengths, out, saved, ctx.normalization, needs)
    return *(g if needs >> k & 1 else None for k, g in enumerate(grads)), None, None, None


_TENSORS = (
    "Tensor x, Tensor U, Tensor Q, Tensor W_z, Tensor W_r, Tensor W_h, Tensor? h0,"
    " Tensor? b_z, Tensor? b_r, Tensor? b_h, Tensor? lengths"
)
register(
    "graph_gru",
    schema=f"({_TENSORS}, int normalization, bool save) -> (Tensor, Tensor, Tensor)",
    backward_schema=f"(Tensor grad_out, Tensor grad_h_last, {_TENSORS}, Tensor out, Tensor saved,"
    f" int normalization, int needs) -> ({', '.join(['Tensor'] * _GRADIENTS)})",
    fallback=_fallback,
    backward_fallback=_backward_fallback,
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
graph_gru_cuda.register(_fallback, _backward_fallback)
