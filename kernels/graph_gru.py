"""Graph-GRU in Triton, AAR eq. (13): all T steps in one launch.

Outside time: S, Θ, and the input half of the three gates for all steps, one product per node over B·T rows.

Inside time: sequences do not depend on each other, so a program owns a tile of sequences with all their nodes
and walks through time alone; no program ever waits for another. Each step is four phases, and nodes exchange
between phases through scratch that only this program touches, small enough for L1 and L2; a barrier of the
program stands between phases:

1. mix the state by S: one (K·m × m) by (m × sequences·c) product;
2. z and r of every node, and its reset state r ★ h;
3. mix the reset states;
4. the candidate of every node, and the new state, kept in float32.

Weights stream from L2. The backward pass walks back with the gates that were saved and writes the gradients
of the gates' arguments; the gradients of x, S and Θ are then products over all steps at once, as in
graph_conv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from aufast.kernels.graph_conv import convolve, convolve_gradients, mixed_tile, product_tile
from aufast.kernels.parameters import (
    SOFTMAX,
    node_weights,
    pool_gradients,
    support_gradient,
    support_matrix,
)
from aufast.kernels.precision import dot_precision
from torch import Tensor

# Sequences of a program: the least that `tl.dot` multiplies.
BLOCK_BATCH = 16
BLOCK_COLUMNS = 128


@triton.jit
def _wide(i):
    """A loop index as int64."""
    return tl.full((), 0, tl.int64) + i


@triton.jit
def _tanh(x):
    """Accurate where it saturates: 1 - tanh² is the gradient's factor."""
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, e - 1, 1 - e) / (1 + e)


@triton.jit
def _mix(
    out_ptr,
    matrix_ptr,
    x_ptr,
    first,
    batch,
    row_count,
    inner,
    channels,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out (b, row_count, c) = matrix (row_count, inner) · x (b, inner, c) for this program's sequences."""
    for start_row in range(0, row_count, 16):
        rows = start_row + tl.arange(0, 16).to(tl.int64)
        for start in range(0, BLOCK_BATCH * channels, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            b, c = first + column // channels, (column % channels).to(tl.int64)
            known = (column < BLOCK_BATCH * channels) & (b < batch)
            x_ptrs = x_ptr + b * inner * channels + c
            acc = mixed_tile(matrix_ptr, x_ptrs, known, rows, row_count, inner, channels, PRECISION, 16)
            out_ptrs = out_ptr + (b * row_count * channels + c)[None, :] + (rows * channels)[:, None]
            tl.store(out_ptrs, acc, (rows < row_count)[:, None] & known[None, :])


@triton.jit
def graph_gru_kernel(
    out_ptr,
    state_ptr,
    saved_ptr,
    gates_ptr,
    matrix_ptr,
    theta_ptr,
    lengths_ptr,
    mixed_ptr,
    reset_ptr,
    update_ptr,
    batch,
    steps,
    nodes,
    order,
    channels,
    LENGTHS: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Walks through time; `gates` (B, T, m, 3c): the input halves; `state` (B, m, c): first, then last."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_BATCH
    b = first + tl.arange(0, BLOCK_BATCH)
    in_batch = b < batch
    inner = order * channels
    zeros = tl.zeros((BLOCK_BATCH, BLOCK_OUTS), tl.float32)
    if LENGTHS:
        length = tl.load(lengths_ptr + b, in_batch, other=0)
    for t in range(steps):
        _mix(
            mixed_ptr, matrix_ptr, state_ptr, first, batch, nodes * order, nodes, channels,
            PRECISION, BLOCK_BATCH, BLOCK_COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        for i in range(nodes):
            mixed = mixed_ptr + (b * nodes + i) * inner
            for start in range(0, 2 * channels, BLOCK_OUTS):
                o = start + tl.arange(0, BLOCK_OUTS).to(tl.int64)  # z's channels, then r's
                in_out, is_reset = o < 2 * channels, (o >= channels)[None, :]
                known = in_batch[:, None] & in_out[None, :]
                node = ((b * nodes + i) * channels)[:, None] + tl.where(
                    is_reset, o[None, :] - channels, o[None, :]
                )
                gate = (((b * steps + t) * nodes + i) * 3 * channels)[:, None] + o[None, :]
                theta = theta_ptr + _wide(i) * inner * 3 * channels + o
                value = product_tile(
                    zeros, mixed, in_batch, theta, in_out, inner, 1, 3 * channels, PRECISION, BLOCK_INNER
                )
                value = tl.sigmoid(value + tl.load(gates_ptr + gate, known, other=0.0))  # (b, o)
                h = tl.load(state_ptr + node, known & is_reset, other=0.0)
                tl.store(update_ptr + node, value, known & (is_reset == 0))
                tl.store(reset_ptr + node, value * h, known & is_reset)
                if SAVE:
                    tl.store(saved_ptr + gate, value, known)
        tl.debug_barrier()
        _mix(
            mixed_ptr, matrix_ptr, reset_ptr, first, batch, nodes * order, nodes, channels,
            PRECISION, BLOCK_BATCH, BLOCK_COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        for i in range(nodes):
            mixed = mixed_ptr + (b * nodes + i) * inner
            for start in range(0, channels, BLOCK_OUTS):
                o = start + tl.arange(0, BLOCK_OUTS).to(tl.int64)
                in_out = o < channels
                known = in_batch[:, None] & in_out[None, :]
                node = ((b * nodes + i) * channels)[:, None] + o[None, :]
                gate = (((b * steps + t) * nodes + i) * 3 * channels)[:, None] + o[None, :] + 2 * channels
                theta = theta_ptr + _wide(i) * inner * 3 * channels + 2 * channels + o
                candidate = product_tile(
                    zeros, mixed, in_batch, theta, in_out, inner, 1, 3 * channels, PRECISION, BLOCK_INNER
                )
                candidate += tl.load(gates_ptr + gate, known, other=0.0)
                candidate = _tanh(candidate)
                z = tl.load(update_ptr + node, known, other=0.0)
                h = tl.load(state_ptr + node, known, other=0.0)
                new = z * h + (1 - z) * candidate
                shown = new
                if LENGTHS:
                    running = (t < length)[:, None]
                    shown = tl.where(running, new, 0.0)
                    new = tl.where(running, new, h)
                tl.store(state_ptr + node, new, known)
                step = (((b * steps + t) * nodes + i) * channels)[:, None] + o[None, :]
                tl.store(out_ptr + step, shown, known)
                if SAVE:
                    tl.store(saved_ptr + gate, candidate, known)
        tl.debug_barrier()


@triton.jit
def _back_through_weights(
    p_ptr,
    grad_ptr,
    theta_ptr,
    b,
    in_batch,
    nodes,
    inner,
    reduced,
    row_stride,
    PRECISION: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """P (b, i, inner) = grad (b, i, reduced) · Θ_iᵀ for every node; rows of both are `row_stride` long."""
    zeros = tl.zeros((b.shape[0], BLOCK_OUTS), tl.float32)
    for i in range(nodes):
        node = _wide(i)
        for start in range(0, inner, BLOCK_OUTS):
            o = start + tl.arange(0, BLOCK_OUTS).to(tl.int64)
            acc = product_tile(
                zeros,
                grad_ptr + node * row_stride,
                in_batch,
                theta_ptr + node * inner * row_stride + o * row_stride,
                o < inner,
                reduced,
                1,
                1,
                PRECISION,
                BLOCK_INNER,
            )
            p_ptrs = p_ptr + ((b * nodes + node) * inner)[:, None] + o[None, :]
            tl.store(p_ptrs, acc, in_batch[:, None] & (o < inner)[None, :])


@triton.jit
def graph_gru_backward_kernel(
    d_gates_ptr,
    d_state_ptr,
    grad_ptr,
    saved_ptr,
    previous_ptr,
    matrix_ptr,
    theta_ptr,
    lengths_ptr,
    p_ptr,
    batch,
    steps,
    nodes,
    order,
    channels,
    grad_stride_b,
    grad_stride_t,
    grad_stride_i,
    grad_stride_c,
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Walks back; `matrix` is Sᵀ (m, m·K), `d_state` the gradient of the last, then of the first state."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_BATCH
    b = first + tl.arange(0, BLOCK_BATCH)
    in_batch = b < batch
    inner = order * channels
    if LENGTHS:
        length = tl.load(lengths_ptr + b, in_batch, other=0)
    for back in range(steps):
        t = steps - 1 - back
        # 1. Through h = z h' + (1 - z) h~ and the gates z and h~ of every node.
        for i in range(nodes):
            for start in range(0, channels, BLOCK_OUTS):
                o = start + tl.arange(0, BLOCK_OUTS).to(tl.int64)
                known = in_batch[:, None] & (o < channels)[None, :]
                node = ((b * nodes + i) * channels)[:, None] + o[None, :]
                step = (((b * steps + t) * nodes + i) * channels)[:, None] + o[None, :]
                gate = (((b * steps + t) * nodes + i) * 3 * channels)[:, None] + o[None, :]
                grad_row = b * grad_stride_b + _wide(t) * grad_stride_t + _wide(i) * grad_stride_i
                z = tl.load(saved_ptr + gate, known, other=0.0).to(tl.float32)
                candidate = tl.load(saved_ptr + gate + 2 * channels, known, other=0.0).to(tl.float32)
                before = tl.load(previous_ptr + step, known, other=0.0).to(tl.float32)
                passed = tl.load(d_state_ptr + node, known, other=0.0)
                grad_ptrs = grad_ptr + grad_row[:, None] + (o * grad_stride_c)[None, :]
                d_h = passed + tl.load(grad_ptrs, known, other=0.0).to(tl.float32)
                d_z = d_h * (before - candidate) * z * (1 - z)
                d_candidate = d_h * (1 - z) * (1 - candidate * candidate)
                d_before = d_h * z
                if LENGTHS:
                    running = (t < length)[:, None]
                    d_z = tl.where(running, d_z, 0.0)
                    d_candidate = tl.where(running, d_candidate, 0.0)
                    d_before = tl.where(running, d_before, passed)
                tl.store(d_gates_ptr + gate, d_z, known)
                tl.store(d_gates_ptr + gate + 2 * channels, d_candidate, known)
                tl.store(d_state_ptr + node, d_before, known)
        tl.debug_barrier()
        # 2. Through the candidate's product to the reset states.
        row = d_gates_ptr + (b * steps + t) * nodes * 3 * channels
        _back_through_weights(
            p_ptr, row + 2 * channels, theta_ptr + 2 * channels, b, in_batch, nodes, inner, channels,
            3 * channels, PRECISION, BLOCK_OUTS, BLOCK_INNER,
        )  # fmt: skip
        tl.debug_barrier()
        # 3. Through the mixing, r ★ h' and the gate r.
        for start_row in range(0, nodes, 16):
            j = start_row + tl.arange(0, 16).to(tl.int64)
            for start in range(0, BLOCK_BATCH * channels, BLOCK_COLUMNS):
                column = start + tl.arange(0, BLOCK_COLUMNS)
                sequence, c = first + column // channels, (column % channels).to(tl.int64)
                in_column = (column < BLOCK_BATCH * channels) & (sequence < batch)
                p_ptrs = p_ptr + sequence * nodes * inner + c
                d_reset = mixed_tile(
                    matrix_ptr, p_ptrs, in_column, j, nodes, nodes * order, channels, PRECISION, 16
                )  # (j, columns)
                known = (j < nodes)[:, None] & in_column[None, :]
                node = (sequence * nodes * channels + c)[None, :] + (j * channels)[:, None]
                row_of = ((sequence * steps + t) * nodes)[None, :] + j[:, None]
                r = tl.load(saved_ptr + row_of * 3 * channels + channels + c[None, :], known, other=0.0)
                r = r.to(tl.float32)
                before = tl.load(previous_ptr + row_of * channels + c[None, :], known, other=0.0)
                d_r = d_reset * before.to(tl.float32) * r * (1 - r)
                tl.store(d_gates_ptr + row_of * 3 * channels + channels + c[None, :], d_r, known)
                passed = tl.load(d_state_ptr + node, known, other=0.0)
                tl.store(d_state_ptr + node, passed + d_reset * r, known)
        tl.debug_barrier()
        # 4. Through the products of z and r, side by side in Θ, to the previous state.
        _back_through_weights(
            p_ptr, row, theta_ptr, b, in_batch, nodes, inner, 2 * channels,
            3 * channels, PRECISION, BLOCK_OUTS, BLOCK_INNER,
        )  # fmt: skip
        tl.debug_barrier()
        for start_row in range(0, nodes, 16):
            j = start_row + tl.arange(0, 16).to(tl.int64)
            for start in range(0, BLOCK_BATCH * channels, BLOCK_COLUMNS):
                column = start + tl.arange(0, BLOCK_COLUMNS)
                sequence, c = first + column // channels, (column % channels).to(tl.int64)
                in_column = (column < BLOCK_BATCH * channels) & (sequence < batch)
                p_ptrs = p_ptr + sequence * nodes * inner + c
                d_before = mixed_tile(
                    matrix_ptr, p_ptrs, in_column, j, nodes, nodes * order, channels, PRECISION, 16
                )  # (j, columns)
                known = (j < nodes)[:, None] & in_column[None, :]
                node = (sequence * nodes * channels + c)[None, :] + (j * channels)[:, None]
                passed = tl.load(d_state_ptr + node, known, other=0.0)
                tl.store(d_state_ptr + node, passed + d_before, known)
        tl.debug_barrier()


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
        out, state, saved, gates, matrix, theta_state, lengths, mixed, reset, update,
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
        d_gates, d_state, grad_out, saved, previous, matrix.T.contiguous(), theta_state, lengths, P,
        batch, steps, nodes, order, channels, *grad_out.stride(),
        LENGTHS=lengths is not None, PRECISION=dot_precision(saved.dtype), BLOCK_BATCH=BLOCK_BATCH,
        BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_OUTS=_outs(channels), **_resources(saved.dtype),
    )  # fmt: skip
    return d_gates, d_state


def _all_steps(
    d_gates: Tensor,
    x: Tensor,
    previous: Tensor,
    saved: Tensor,
    matrix: Tensor,
    theta_state: Tensor,
    theta_input: Tensor,
    **wanted: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (B·T, m, c_in), S (m·K, m) and the whole Θ (m, K, c + c_in, 3c) over all steps at once.

    z and r see the mixed state, the candidate the mixed reset state, all three the mixed input.
    """
    channels = previous.shape[-1]
    reset = saved[..., channels : 2 * channels] * previous  # (B, T, m, c)
    cut = 2 * channels
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
    batch, steps, nodes, channels = out.shape
    pools = _pools(normalization, W_z, W_r, W_h)
    order = pools[0].shape[1]
    matrix = support_matrix(U, order, normalization)
    theta_state, theta_input = _halves(Q, pools, channels)
    first = torch.zeros_like(out[:, :1]) if h0 is None else h0.to(x.dtype).unsqueeze(1)
    previous = torch.cat([first, out], dim=1)[
        :, :steps
    ].contiguous()  # (B, T, m, c): the state each step starts from
    d_gates, d_h0 = _walk_back(grad_out, grad_h_last, previous, saved, lengths, matrix, theta_state)
    d_gates = d_gates.flatten(0, 1)  # (B·T, m, 3c)
    d_x, d_matrix, d_theta = _all_steps(
        d_gates, x, previous, saved, matrix, theta_state, theta_input,
        x_wanted=bool(needs & 1), S_wanted=bool(needs >> 1 & 1), theta_wanted=bool(needs >> 2 & 0b1111),
    )  # fmt: skip
    d_bias = (
        d_gates.sum(0, dtype=torch.float32) if b_z is not None and (needs >> 7 or needs >> 2 & 1) else None
    )
    bias = None if b_z is None else torch.cat([b_z, b_r, b_h], dim=-1)
    d_Q, d_pools, d_biases = pool_gradients(d_theta, d_bias, Q, torch.cat(pools, dim=-1), bias)
    d_pools = (
        [None] * 3 if d_pools is None else [d.reshape(W_z.shape) for d in d_pools.split(channels, dim=-1)]
    )
    d_biases = [None] * 3 if d_biases is None else [d.contiguous() for d in d_biases.split(channels, dim=-1)]
    d_U = support_gradient(d_matrix, U, order, normalization) if needs >> 1 & 1 else None
    if d_x is not None:
        d_x = d_x.view(x.shape)
    found = (d_x, d_U, d_Q, *d_pools, d_h0 if h0 is not None else None, *d_biases)
    return tuple(x.new_empty(0) if d is None or not needs >> k & 1 else d for k, d in enumerate(found))
