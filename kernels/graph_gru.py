"""Graph-GRU in Triton, AAR eq. (13): all T steps in one launch.

Outside time: S, Θ, and the input half of the three gates for all steps, one product per node over B·T rows.
Inside time: `graph_gru_steps.py`. The gradients of x, S and Θ are products over all steps at once, as in
graph_conv.
"""

from __future__ import annotations

import torch
import triton
from aufast.kernels.graph_conv import convolve, convolve_gradients
from aufast.kernels.graph_gru_steps import graph_gru_backward_kernel, graph_gru_kernel
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
from torch import Tensor

# Sequences of a program: the least that `tl.dot` multiplies.
BLOCK_BATCH = 16
BLOCK_COLUMNS = 128


def _resources(dtype: torch.dtype) -> dict[str, int]:
    """All registers: a program has a multiprocessor to itself, and a spill is paid every step."""
    return {"BLOCK_INNER": 16 if dtype == torch.float32 else 32, "num_warps": 8, "maxnreg": 255}


def _outs(size: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), 64)


def _halves(Q: Tensor, pools: tuple[Tensor, Tensor, Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """Θ of the three gates side by side: (m, K, c, 3c) on the state, (m, K, c_in, 3c) on the input."""
    theta = node_weights(Q, torch.cat(pools, dim=-1), len(Q))  # (m, K, c + c_in, 3c)
    return theta[:, :, :channels].contiguous(), theta[:, :, channels:].contiguous()


def _pools(normalization: int, *pools: Tensor) -> tuple[Tensor, ...]:
    """The weight pools as (ce, K, c + c_in, c)."""
    return pools if normalization == SOFTMAX else tuple(W.unsqueeze(1) for W in pools)


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
    """The raw operator `aufast::graph_gru`."""
    batch, steps, nodes, _ = x.shape
    channels = W_z.shape[-1]
    pools = _pools(normalization, W_z, W_r, W_h)
    order = pools[0].shape[1]
    matrix = support_matrix(U, order, normalization)  # (m·K, m)
    theta_state, theta_input = _halves(Q, pools, channels)
    bias = None if b_z is None else Q.float() @ torch.cat([b_z, b_r, b_h], dim=-1).float()  # (m, 3c)
    gates = convolve(x.flatten(0, 1), matrix, theta_input, bias, torch.float32)  # (B·T, m, 3c)

    state_shape = (batch, nodes, channels)
    if h0 is None:
        state = x.new_zeros(state_shape, dtype=torch.float32)
    else:
        state = h0.clone(memory_format=torch.contiguous_format)
    out = x.new_empty(batch, steps, nodes, channels)
    saved = x.new_empty(batch, steps, nodes, 3 * channels) if save else x.new_empty(0)
    mixed = x.new_empty(batch, nodes, order, channels)
    reset, update = torch.empty_like(state), torch.empty_like(state)
    graph_gru_kernel[(triton.cdiv(batch, BLOCK_BATCH),)](
        out, state, saved, gates, matrix, theta_state, contiguous(lengths), mixed, reset, update,
        batch, steps, nodes, order, channels,
        LENGTHS=lengths is not None, SAVE=save, PRECISION=dot_precision(x.dtype), BLOCK_BATCH=BLOCK_BATCH,
        BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_OUTS=_outs(channels), **_resources(x.dtype),
    )  # fmt: skip
    return out, state, saved


def _walk_back(
    grad_out: Tensor,
    grad_h_last: Tensor,
    previous: Tensor,
    saved: Tensor,
    lengths: Tensor | None,
    matrix: Tensor,
    theta_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates' arguments (B, T, m, 3c), and of the first state (B, m, c) in float32."""
    batch, steps, nodes, channels = previous.shape
    order = theta_state.shape[1]
    d_gates = torch.empty_like(saved)
    d_state = grad_h_last.clone(memory_format=torch.contiguous_format)
    P = d_state.new_empty(batch, nodes, order, channels)
    graph_gru_backward_kernel[(triton.cdiv(batch, BLOCK_BATCH),)](
        d_gates, d_state, grad_out, saved, previous, matrix.T.contiguous(), theta_state,
        contiguous(lengths), P, batch, steps, nodes, order, channels, *grad_out.stride(),
        LENGTHS=lengths is not None, PRECISION=dot_precision(saved.dtype), BLOCK_BATCH=BLOCK_BATCH,
        BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_OUTS=_outs(channels), **_resources(saved.dtype),
    )  # fmt: skip
    return d_gates, d_state


def _all_steps(
    d_gates: Tensor,
    x: Tensor,
    previous: Tensor,
    reset: Tensor,
    matrix: Tensor,
    theta_state: Tensor,
    theta_input: Tensor,
    **wanted: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (B·T, m, c_in), S (m·K, m) and the whole Θ (m, K, c + c_in, 3c) over all steps at once.

    z and r see the mixed state, the candidate the mixed reset state, all three the mixed input.
    """
    cut = 2 * previous.shape[-1]
    d_x, S_x, theta_x = convolve_gradients(d_gates, x.flatten(0, 1), matrix, theta_input, **wanted)
    wanted["x_wanted"] = False
    _, S_zr, theta_zr = convolve_gradients(
        d_gates[..., :cut], previous.flatten(0, 1), matrix, theta_state[..., :cut], **wanted
    )
    _, S_h, theta_h = convolve_gradients(
        d_gates[..., cut:], reset.flatten(0, 1), matrix, theta_state[..., cut:], **wanted
    )
    d_matrix = S_x + S_zr + S_h if wanted["S_wanted"] else None
    d_theta = None
    if wanted["theta_wanted"]:
        d_theta = torch.cat([torch.cat([theta_zr, theta_h], dim=-1), theta_x], dim=2)
    return d_x, d_matrix, d_theta


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
    channels = out.shape[-1]
    kept = (*out.shape[:-1], 3 * channels)
    if saved.shape != kept:  # the CPU's kernel keeps something else of large graphs
        raise ValueError(
            f"aufast::graph_gru_backward.triton: saved must be the gates {kept}"
            f" that aufast::graph_gru.triton keeps, got {tuple(saved.shape)}"
        )
    pools = _pools(normalization, W_z, W_r, W_h)
    order = pools[0].shape[1]
    matrix = support_matrix(U, order, normalization)
    theta_state, theta_input = _halves(Q, pools, channels)
    first = torch.zeros_like(out[:, :1]) if h0 is None else h0.to(x.dtype).unsqueeze(1)
    # (B, T, m, c): the state each step starts from; T may be 0.
    previous = torch.cat([first, out[:, :-1]], dim=1)[:, : out.shape[1]]
    d_gates, d_h0 = _walk_back(grad_out, grad_h_last, previous, saved, lengths, matrix, theta_state)
    d_gates = d_gates.flatten(0, 1)  # (B·T, m, 3c)
    reset = until_ends(saved[..., channels : 2 * channels] * previous, lengths)  # (B, T, m, c)
    d_x, d_matrix, d_theta = _all_steps(
        d_gates, until_ends(x, lengths), previous, reset, matrix, theta_state, theta_input,
        x_wanted=bool(needs & 1), S_wanted=bool(needs >> 1 & 1), theta_wanted=bool(needs >> 2 & 0b1111),
    )  # fmt: skip
    d_bias = None
    if b_z is not None and (needs >> 7 or needs >> 2 & 1):
        d_bias = d_gates.sum(0, dtype=torch.float32)  # (m, 3c)
    d_Q, *d_parameters = gate_gradients(d_theta, d_bias, Q, (W_z, W_r, W_h), (b_z, b_r, b_h))
    d_U = support_gradient(d_matrix, U, order, normalization) if needs >> 1 & 1 else None
    if d_x is not None:
        d_x = d_x.view(x.shape)
    found = (d_x, d_U, d_Q, *d_parameters[:3], d_h0 if h0 is not None else None, *d_parameters[3:])
    return tuple(x.new_empty(0) if d is None or not needs >> k & 1 else d for k, d in enumerate(found))
