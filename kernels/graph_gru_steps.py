"""The graph-GRU's walk through time in Triton, forward and back; `graph_gru.py` launches it.

Sequences do not depend on each other, so a program owns a tile of sequences with all their nodes and walks
alone; no program ever waits for another. Each step is four phases, and nodes exchange between phases through
scratch that only this program touches, small enough for L1 and L2; a barrier of the program stands between
phases:

1. mix the state by S: one (K·m × m) by (m × sequences·c) product;
2. z and r of every node, and its reset state r ★ h;
3. mix the reset states;
4. the candidate of every node, and the new state, kept in float32.

Weights stream from L2. The backward pass walks back with the gates that were saved and writes the gradients
of the gates' arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl
from aufast.kernels.graph_conv import mixed_tile, product_tile


@triton.jit
def _wide(i):
    """A loop index as int64."""
    return tl.full((), 0, tl.int64) + i


@triton.jit
def _rows(t, b, i, steps, nodes):
    """The rows of node i in a state (B, m, …), and at step t in what holds all steps (B, T, m, …)."""
    return b * nodes + i, (b * steps + t) * nodes + i


@triton.jit
def _places(row, width, o):
    """Columns `o` of rows that are `width` long."""
    return (row * width)[:, None] + o[None, :]


@triton.jit
def _runs(lengths_ptr, t, b, known):
    """Whether step t lies before a sequence's end."""
    return t < tl.load(lengths_ptr + b, known, other=0)


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
def _update_and_reset(
    update_ptr,
    reset_ptr,
    saved_ptr,
    state_ptr,
    gates_ptr,
    mixed_ptr,
    theta_ptr,
    t,
    b,
    in_batch,
    steps,
    nodes,
    inner,
    channels,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """z, r and the reset state r ★ h of every node."""
    zeros = tl.zeros((b.shape[0], BLOCK_OUTS), tl.float32)
    for i in range(nodes):
        mixed = mixed_ptr + (b * nodes + i) * inner
        for start in range(0, 2 * channels, BLOCK_OUTS):
            o = start + tl.arange(0, BLOCK_OUTS).to(tl.int64)  # z's channels, then r's
            in_out, is_reset = o < 2 * channels, (o >= channels)[None, :]
            known = in_batch[:, None] & in_out[None, :]
            state_row, row = _rows(t, b, i, steps, nodes)
            node = _places(state_row, channels, tl.where(o < channels, o, o - channels))
            gate = _places(row, 3 * channels, o)
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


@triton.jit
def _candidate_and_state(
    out_ptr,
    state_ptr,
    saved_ptr,
    update_ptr,
    gates_ptr,
    mixed_ptr,
    theta_ptr,
    lengths_ptr,
    t,
    b,
    in_batch,
    steps,
    nodes,
    inner,
    channels,
    LENGTHS: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """h~ and the new state of every node; a sequence that has ended keeps its state and shows zeros."""
    zeros = tl.zeros((b.shape[0], BLOCK_OUTS), tl.float32)
    for i in range(nodes):
        mixed = mixed_ptr + (b * nodes + i) * inner
        for start in range(0, channels, BLOCK_OUTS):
            o = start + tl.arange(0, BLOCK_OUTS).to(tl.int64)
            in_out = o < channels
            known = in_batch[:, None] & in_out[None, :]
            state_row, row = _rows(t, b, i, steps, nodes)
            node, gate = _places(state_row, channels, o), _places(row, 3 * channels, o + 2 * channels)
            theta = theta_ptr + _wide(i) * inner * 3 * channels + 2 * channels + o
            candidate = product_tile(
                zeros, mixed, in_batch, theta, in_out, inner, 1, 3 * channels, PRECISION, BLOCK_INNER
            )
            candidate = _tanh(candidate + tl.load(gates_ptr + gate, known, other=0.0))
            z = tl.load(update_ptr + node, known, other=0.0)
            h = tl.load(state_ptr + node, known, other=0.0)
            new = z * h + (1 - z) * candidate
            shown = new
            if LENGTHS:
                running = _runs(lengths_ptr, t, b, in_batch)[:, None]
                shown = tl.where(running, new, 0.0)
                new = tl.where(running, new, h)
            tl.store(state_ptr + node, new, known)
            tl.store(out_ptr + _places(row, channels, o), shown, known)
            if SAVE:
                tl.store(saved_ptr + gate, candidate, known)


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
    for t in range(steps):
        _mix(
            mixed_ptr, matrix_ptr, state_ptr, first, batch, nodes * order, nodes, channels,
            PRECISION, BLOCK_BATCH, BLOCK_COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        _update_and_reset(
            update_ptr, reset_ptr, saved_ptr, state_ptr, gates_ptr, mixed_ptr, theta_ptr, t, b, in_batch,
            steps, nodes, inner, channels, SAVE, PRECISION, BLOCK_OUTS, BLOCK_INNER,
        )  # fmt: skip
        tl.debug_barrier()
        _mix(
            mixed_ptr, matrix_ptr, reset_ptr, first, batch, nodes * order, nodes, channels,
            PRECISION, BLOCK_BATCH, BLOCK_COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        _candidate_and_state(
            out_ptr, state_ptr, saved_ptr, update_ptr, gates_ptr, mixed_ptr, theta_ptr, lengths_ptr, t, b,
            in_batch, steps, nodes, inner, channels, LENGTHS, SAVE, PRECISION, BLOCK_OUTS, BLOCK_INNER,
        )  # fmt: skip
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
def _back_through_update(
    d_gates_ptr,
    d_state_ptr,
    grad_ptr,
    saved_ptr,
    previous_ptr,
    lengths_ptr,
    t,
    b,
    in_batch,
    steps,
    nodes,
    channels,
    grad_stride_b,
    grad_stride_t,
    grad_stride_i,
    grad_stride_c,
    LENGTHS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
):
    """Through h = z h' + (1 - z) h~ and the gates z and h~ of every node."""
    for i in range(nodes):
        for start in range(0, channels, BLOCK_OUTS):
            o = start + tl.arange(0, BLOCK_OUTS).to(tl.int64)
            known = in_batch[:, None] & (o < channels)[None, :]
            state_row, row = _rows(t, b, i, steps, nodes)
            node, gate = _places(state_row, channels, o), _places(row, 3 * channels, o)
            grad_row = b * grad_stride_b + _wide(t) * grad_stride_t + _wide(i) * grad_stride_i
            z = tl.load(saved_ptr + gate, known, other=0.0).to(tl.float32)
            candidate = tl.load(saved_ptr + gate + 2 * channels, known, other=0.0).to(tl.float32)
            before = tl.load(previous_ptr + _places(row, channels, o), known, other=0.0).to(tl.float32)
            passed = tl.load(d_state_ptr + node, known, other=0.0)
            grad_ptrs = grad_ptr + grad_row[:, None] + (o * grad_stride_c)[None, :]
            d_h = passed + tl.load(grad_ptrs, known, other=0.0).to(tl.float32)
            d_z = d_h * (before - candidate) * z * (1 - z)
            d_candidate = d_h * (1 - z) * (1 - candidate * candidate)
            d_before = d_h * z
            if LENGTHS:
                running = _runs(lengths_ptr, t, b, in_batch)[:, None]
                d_z = tl.where(running, d_z, 0.0)
                d_candidate = tl.where(running, d_candidate, 0.0)
                d_before = tl.where(running, d_before, passed)
            tl.store(d_gates_ptr + gate, d_z, known)
            tl.store(d_gates_ptr + gate + 2 * channels, d_candidate, known)
            tl.store(d_state_ptr + node, d_before, known)


@triton.jit
def _back_through_mixing(
    d_gates_ptr,
    d_state_ptr,
    saved_ptr,
    previous_ptr,
    matrix_ptr,
    p_ptr,
    lengths_ptr,
    t,
    first,
    batch,
    steps,
    nodes,
    order,
    channels,
    RESET: tl.constexpr,
    LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Through the mixing to the previous states; RESET: to r ★ h', and on through the gate r."""
    for start_row in range(0, nodes, 16):
        j = start_row + tl.arange(0, 16).to(tl.int64)
        for start in range(0, BLOCK_BATCH * channels, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            sequence, c = first + column // channels, (column % channels).to(tl.int64)
            in_column = (column < BLOCK_BATCH * channels) & (sequence < batch)
            p_ptrs = p_ptr + sequence * nodes * order * channels + c
            d_before = mixed_tile(
                matrix_ptr, p_ptrs, in_column, j, nodes, nodes * order, channels, PRECISION, 16
            )  # (j, columns)
            known = (j < nodes)[:, None] & in_column[None, :]
            node = (sequence * nodes * channels + c)[None, :] + (j * channels)[:, None]
            if RESET:
                row = ((sequence * steps + t) * nodes)[None, :] + j[:, None]
                gate = row * 3 * channels + channels + c[None, :]
                r = tl.load(saved_ptr + gate, known, other=0.0).to(tl.float32)
                if LENGTHS:  # what was saved after the end may be NaN
                    r = tl.where(_runs(lengths_ptr, t, sequence, in_column)[None, :], r, 0.0)
                before = tl.load(previous_ptr + row * channels + c[None, :], known, other=0.0)
                d_r = d_before * before.to(tl.float32) * r * (1 - r)
                tl.store(d_gates_ptr + gate, d_r, known)
                d_before *= r
            passed = tl.load(d_state_ptr + node, known, other=0.0)
            tl.store(d_state_ptr + node, passed + d_before, known)


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
    for back in range(steps):
        t = steps - 1 - back
        _back_through_update(
            d_gates_ptr, d_state_ptr, grad_ptr, saved_ptr, previous_ptr, lengths_ptr, t, b, in_batch, steps,
            nodes, channels, grad_stride_b, grad_stride_t, grad_stride_i, grad_stride_c, LENGTHS, BLOCK_OUTS,
        )  # fmt: skip
        tl.debug_barrier()
        # The candidate's product, then the products of z and r, side by side in Θ.
        row = d_gates_ptr + (b * steps + t) * nodes * 3 * channels
        _back_through_weights(
            p_ptr, row + 2 * channels, theta_ptr + 2 * channels, b, in_batch, nodes, inner, channels,
            3 * channels, PRECISION, BLOCK_OUTS, BLOCK_INNER,
        )  # fmt: skip
        tl.debug_barrier()
        _back_through_mixing(
            d_gates_ptr, d_state_ptr, saved_ptr, previous_ptr, matrix_ptr, p_ptr, lengths_ptr, t, first,
            batch, steps, nodes, order, channels, True, LENGTHS, PRECISION, BLOCK_BATCH, BLOCK_COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
        _back_through_weights(
            p_ptr, row, theta_ptr, b, in_batch, nodes, inner, 2 * channels,
            3 * channels, PRECISION, BLOCK_OUTS, BLOCK_INNER,
        )  # fmt: skip
        tl.debug_barrier()
        _back_through_mixing(
            d_gates_ptr, d_state_ptr, saved_ptr, previous_ptr, matrix_ptr, p_ptr, lengths_ptr, t, first,
            batch, steps, nodes, order, channels, False, LENGTHS, PRECISION, BLOCK_BATCH, BLOCK_COLUMNS,
        )  # fmt: skip
        tl.debug_barrier()
