"""What surrounds the compiled recurrence of the graph-GRU on a GPU: all that does not depend on the state.

`csrc/cuda/graph_gru.cu` walks through time, `aufast::graph_gru_steps` and its backward. Before it S, Θ and
the input half of the three gates are made, after it the gradients of everything but the gates, each for all
steps at once by PyTorch's own products. docs/operators/graph_gru_cuda.md has the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aufast.kernels.parameters import (
    SOFTMAX,
    contiguous,
    gate_gradients,
    node_weights,
    support_gradient,
    support_matrix,
    until_ends,
)
from aufast.kernels.precision import dot_precision
from aufast.ops.registration import LIBRARY, same_device
from aufast.reference.precision import outside_autocast

# A group of blocks has one for each node, and a cluster no more than 16; a block holds rows of K·c numbers.
MOST_NODES = 16
MOST_COLUMNS = 256
_PADDING = 16  # channels: the depth of the tensor cores' products

LIBRARY.define(
    "graph_gru_steps(Tensor gates, Tensor theta, Tensor supports, Tensor? h0, Tensor? lengths, bool tf32,"
    " bool save) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "graph_gru_steps_backward(Tensor grad_out, Tensor grad_h_last, Tensor out, Tensor saved, Tensor theta,"
    " Tensor supports, Tensor? h0, Tensor? lengths, bool tf32) -> (Tensor, Tensor)"
)


def cannot_run(x: Tensor, W_z: Tensor) -> str | None:
    """The reason why the compiled recurrence does not take these sizes, or None."""
    nodes, channels = x.shape[2], W_z.shape[-1]
    order = W_z.shape[1] if W_z.dim() == 4 else 1
    if nodes > MOST_NODES:
        return (
            f"it keeps one node in each block of a cluster, at most {MOST_NODES}, and the graph has {nodes}"
        )
    if order * channels > MOST_COLUMNS:
        return f"it takes at most {MOST_COLUMNS} channels times supports, and came {order} · {channels}"
    return None


def packed(matrices: Tensor, tf32: bool) -> Tensor:
    """Lay matrices out as the kernel's lanes multiply with them (`csrc/cuda/products.cuh`).

    Args:
        matrices: (m, depth, matrices side by side, columns), depth in whole 16s and columns in whole 8s.
        tf32: whether float32 is multiplied by TF32.

    Returns:
        (m, depth · matrices · columns).
    """
    nodes, depth, count, columns = matrices.shape
    strips = columns // 8
    if matrices.dtype != torch.float32:  # depth 16 = two halves of four lanes of two
        lanes = matrices.view(nodes, depth // 16, 2, 4, 2, count, strips, 8).permute(0, 6, 1, 7, 3, 5, 2, 4)
    elif tf32:  # depth 8 = two halves of four lanes
        lanes = (
            _rounded(matrices).view(nodes, depth // 8, 2, 4, count, strips, 8).permute(0, 5, 1, 6, 3, 4, 2)
        )
    else:  # columns 8 = four lanes of two; two matrices, or two elements of the depth, side by side
        lanes = matrices.reshape(nodes, depth * count // 2, 2, strips, 4, 2).permute(0, 3, 1, 4, 2, 5)
    return lanes.reshape(nodes, -1)


def _rounded(x: Tensor) -> Tensor:
    """Round float32 to the eleven bits of TF32; the tensor cores would cut the rest off."""
    scaled = x * (2.0**13 + 1)
    return scaled - (scaled - x)


def _padded(theta_state: Tensor) -> Tensor:
    """Θ of the state (m, K, c, 3c) as (m, K, c', 3, c'), channels in whole 16s."""
    nodes, order, channels, _ = theta_state.shape
    missing = -channels % _PADDING
    split = theta_state.view(nodes, order, channels, 3, channels)
    return F.pad(split, (0, missing, 0, 0, 0, missing)) if missing else split


def _forward_theta(theta_state: Tensor, tf32: bool) -> Tensor:
    """z and r side by side, then the candidate: (m, packed)."""
    theta = _padded(theta_state).flatten(1, 2)  # (m, K·c', 3, c')
    return torch.cat([packed(part, tf32) for part in theta.split((2, 1), dim=2)], dim=1)


def _backward_theta(theta_state: Tensor, tf32: bool) -> Tensor:
    """The candidate's transposed, then z's above r's: (m, packed)."""
    theta = _padded(theta_state).permute(0, 3, 4, 1, 2).flatten(3)  # (m, 3, c', K·c')
    parts = theta[:, 2], theta[:, :2].flatten(1, 2)  # (m, c', K·c'), (m, 2c', K·c')
    return torch.cat([packed(part.unsqueeze(2), tf32) for part in parts], dim=1)


class _Parameters:
    """S and Θ of one call, and how its float32 is multiplied."""

    def __init__(self, x: Tensor, U: Tensor, Q: Tensor, pools: tuple[Tensor, ...], normalization: int):
        if normalization != SOFTMAX:
            pools = tuple(W.unsqueeze(1) for W in pools)
        nodes, self.order, channels = x.shape[2], pools[0].shape[1], pools[0].shape[-1]
        self.pool = torch.cat(pools, dim=-1)  # (ce, K, c + c_in, 3c)
        self.matrix = support_matrix(U, self.order, normalization)  # (m·K, m)
        self.supports = self.matrix.view(nodes, self.order, nodes).contiguous()
        theta = node_weights(Q, self.pool, nodes)  # (m, K, c + c_in, 3c)
        self.theta_state, self.theta_input = theta[:, :, :channels], theta[:, :, channels:]
        self.tf32 = x.dtype == torch.float32 and dot_precision(x.dtype) == "tf32"

    def mixed(self, x: Tensor) -> Tensor:
        """φ (m, B·T, K·c) of x (B, T, m, c)."""
        by_node = x.flatten(0, 1).transpose(0, 1).flatten(1)  # (m, B·T·c)
        mixed = self.matrix.to(x.dtype) @ by_node  # (m·K, B·T·c)
        nodes, channels = x.shape[2:]
        rows = x.shape[0] * x.shape[1]
        mixed = mixed.view(nodes, self.order, rows, channels).transpose(1, 2)  # (m, B·T, K, c)
        return mixed.flatten(2)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of (n, …) matrices in float32: a long sum of float16 numbers may be larger than float16 holds."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda" and a.numel() and b.numel():
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def graph_gru(
    x: Tensor,
    U: Tensor,
    Q: Tensor,
    W_z: Tensor,
    W_r: Tensor,
    W_h: Tensor,
    h0: Tensor | None,
    b_z: Tensor | None,
    b_r: Tensor | None,
    b_h: Tensor | None,
    lengths: Tensor | None,
    normalization: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator `aufast::graph_gru`; sizes are those that `cannot_run` lets through."""
    x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h = map(contiguous, (x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h))
    batch, steps, nodes, _ = x.shape
    made = _Parameters(x, U, Q, (W_z, W_r, W_h), normalization)
    mixed = made.mixed(until_ends(x, lengths))  # (m, B·T, K·c_in)
    theta_input = made.theta_input.flatten(1, 2)  # (m, K·c_in, 3c)
    if b_z is None:
        gates = mixed @ theta_input
    else:
        bias = (Q.float() @ torch.cat([b_z, b_r, b_h], dim=-1).float()).to(x.dtype)  # (m, 3c)
        gates = torch.baddbmm(bias.unsqueeze(1), mixed, theta_input)
    gates = gates.view(nodes, batch, steps, -1)  # (m, B, T, 3c)
    theta = _forward_theta(made.theta_state, made.tf32)
    return torch.ops.aufast.graph_gru_steps(
        gates, theta, made.supports, h0, contiguous(lengths), made.tf32, save
    )


def graph_gru_backward(
    grad_out: Tensor,
    grad_h_last: Tensor,
    x: Tensor,
    U: Tensor,
    Q: Tensor,
    W_z: Tensor,
    W_r: Tensor,
    W_h: Tensor,
    h0: Tensor | None,
    b_z: Tensor | None,
    b_r: Tensor | None,
    b_h: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    saved: Tensor,
    normalization: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """The raw operator `aufast::graph_gru_backward`."""
    wanted = [bool(needs >> k & 1) for k in range(10)]
    # A product of the same numbers in another layout may have other bits.
    x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h = map(contiguous, (x, U, Q, W_z, W_r, W_h, h0, b_z, b_r, b_h))
    out, saved = out.contiguous(), saved.contiguous()
    batch, steps, nodes, channels = out.shape
    made = _Parameters(x, U, Q, (W_z, W_r, W_h), normalization)
    d_gates, d_h0 = torch.ops.aufast.graph_gru_steps_backward(
        grad_out.contiguous(),
        grad_h_last.contiguous(),
        out,
        saved,
        _backward_theta(made.theta_state, made.tf32),
        made.supports,
        h0,
        contiguous(lengths),
        made.tf32,
    )
    d_gates = d_gates.view(nodes, batch * steps, 3 * channels)
    first = torch.zeros_like(out[:, :1]) if h0 is None else h0.to(x.dtype).unsqueeze(1)
    previous = torch.cat([first, out[:, :-1]], dim=1)  # (B, T, m, c): the state each step starts from
    reset = until_ends(saved[..., channels : 2 * channels] * previous, lengths)  # (B, T, m, c)
    d_x, d_matrix, d_theta = _all_steps(
        d_gates, until_ends(x, lengths), previous, reset, made, wanted[0], wanted[1], any(wanted[2:6])
    )
    d_bias = None
    if b_z is not None and any(wanted[k] for k in (2, 7, 8, 9)):
        d_bias = d_gates.sum(1, dtype=torch.float32)  # (m, 3c)
    d_Q, *d_parameters = gate_gradients(d_theta, d_bias, Q, (W_z, W_r, W_h), (b_z, b_r, b_h))
    d_U = support_gradient(d_matrix, U, made.order, normalization) if wanted[1] else None
    found = (d_x, d_U, d_Q, *d_parameters[:3], d_h0 if h0 is not None else None, *d_parameters[3:])
    return tuple(
        x.new_empty(0) if d is None or not is_wanted else d.contiguous()
        for d, is_wanted in zip(found, wanted, strict=True)
    )


def _all_steps(
    d_gates: Tensor,
    x: Tensor,
    previous: Tensor,
    reset: Tensor,
    made: _Parameters,
    x_wanted: bool,
    S_wanted: bool,
    theta_wanted: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (B, T, m, c_in), S (m·K, m) and the whole Θ (m, K, c + c_in, 3c) over all steps at once.

    z and r see the mixed state, the candidate the mixed reset state, all three the mixed input.
    """
    nodes, rows, cut = *d_gates.shape[:2], 2 * previous.shape[-1]
    halves = (
        (previous, d_gates[..., :cut], made.theta_state[..., :cut]),
        (reset, d_gates[..., cut:], made.theta_state[..., cut:]),
        (x, d_gates, made.theta_input),
    )
    d_x, d_matrix, d_thetas = None, None, []
    for values, alpha, theta in halves:
        channels, with_x = values.shape[-1], values is x and x_wanted
        if theta_wanted:
            d_theta = wide_product(made.mixed(values).transpose(1, 2), alpha)  # (m, K·channels, columns)
            d_thetas.append(d_theta.view(nodes, made.order, channels, alpha.shape[-1]))
        if not S_wanted and not with_x:
            continue
        gamma = alpha @ theta.flatten(1, 2).transpose(1, 2)  # (m, B·T, K·channels)
        gamma = gamma.view(nodes, rows, made.order, channels).transpose(1, 2)
        gamma = gamma.flatten(2).flatten(0, 1)  # (m·K, B·T·channels)
        if S_wanted:
            by_node = values.flatten(0, 1).transpose(0, 1).flatten(1)  # (m, B·T·channels)
            product = wide_product(gamma[None], by_node.T[None])[0]  # (m·K, m)
            d_matrix = product if d_matrix is None else d_matrix + product
        if with_x:
            mixed_back = made.matrix.T.to(x.dtype) @ gamma  # (m, B·T·c_in)
            d_x = mixed_back.view(nodes, rows, channels).transpose(0, 1).reshape(x.shape)
    if not theta_wanted:
        return d_x, d_matrix, None
    state, candidate, inputs = d_thetas
    return d_x, d_matrix, torch.cat([torch.cat([state, candidate], dim=-1), inputs], dim=2)


def register(fallback: Callable[..., Any], backward_fallback: Callable[..., Any]) -> None:
    """Make these the operators' kernels for CUDA tensors.

    The fallbacks take float64, empty tensors, sizes that `cannot_run` refuses, and every call where the
    compiled part was not loaded.
    """
    LIBRARY.impl("graph_gru", _or_else(graph_gru, fallback, 0), "CUDA")
    LIBRARY.impl("graph_gru_backward", _or_else(graph_gru_backward, backward_fallback, 2), "CUDA")


def _or_else(kernel: Callable[..., Any], fallback: Callable[..., Any], inputs: int) -> Callable[..., Any]:
    """`kernel` where it can run, else `fallback`; x is the argument number `inputs`, W_z three after it."""

    @torch.no_grad()
    @outside_autocast
    def launch(*arguments: Any) -> Any:
        same_device(kernel.__name__, arguments)
        x, W_z = arguments[inputs], arguments[inputs + 3]
        key = x.device.type.upper()
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key("aufast::graph_gru_steps", key)
        empty = 0 in (*x.shape[:3], W_z.shape[-1])
        can = compiled and x.dtype != torch.float64 and not empty and cannot_run(x, W_z) is None
        return (kernel if can else fallback)(*arguments)

    return launch
