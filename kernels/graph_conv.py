"""AU-specific graph convolution in Triton: `out[n,i] = Σ_k (Σ_j S[k,i,j] x[n,j]) Θ[i,k] + b[i]`.

S (K, m, m) and Θ (m, K, cin, cout) are made once a call. Rows n are everything in front of the node axis.

Few rows: one launch. A program owns a tile of rows, one node and a tile of output channels; it mixes the
nodes while it loads, so each tile of x is read once per node, from L2. Many rows, or many nodes: mixing is
its own launch, a product of the (m·K, m) supports with x seen as (m, rows·channels), and x is read once.

Backward, with P = grad·Θᵀ: the input's gradient mixes P by Sᵀ; Θ's is one product per node over all rows, S's
one over all rows and channels. Both sums are cut into a number of parts that depends on the shape alone and
added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from aufast.kernels.parameters import (
    SOFTMAX,
    node_weights,
    pool_gradients,
    support_gradient,
    support_matrix,
)
from aufast.kernels.precision import dot_precision
from torch import Tensor

# Mixing while loading reads x once per node; from these sizes on that costs more than a second launch.
FUSED_ROWS = 4096
FUSED_NODES = 16
ROWS_PER_PART = 2048
COLUMNS_PER_PART = 8192
MOST_PARTS = 64


@triton.jit
def mixed_tile(
    matrix_ptr,
    x_ptrs,
    in_column,
    rows,
    row_count,
    inner,
    x_stride,
    PRECISION: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """`rows` of a (row_count, inner) matrix times the columns that begin at `x_ptrs`."""
    acc = tl.zeros((rows.shape[0], x_ptrs.shape[0]), tl.float32)
    for first in range(0, inner, BLOCK_INNER):
        j = first + tl.arange(0, BLOCK_INNER).to(tl.int64)
        known = (rows < row_count)[:, None] & (j < inner)[None, :]
        matrix = tl.load(matrix_ptr + rows[:, None] * inner + j[None, :], known, other=0.0)  # (rows, j)
        known = (j < inner)[:, None] & in_column[None, :]
        x = tl.load(x_ptrs[None, :] + j[:, None] * x_stride, known, other=0.0).to(tl.float32)  # (j, columns)
        acc = tl.dot(matrix, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_tile(
    acc,
    a_ptrs,
    in_row,
    theta_ptrs,
    in_out,
    inner,
    a_stride,
    theta_stride,
    PRECISION: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Add a tile of rows times a tile of one node's weights to `acc`; the pointers stand at inner index 0."""
    for first in range(0, inner, BLOCK_INNER):
        r = first + tl.arange(0, BLOCK_INNER).to(tl.int64)
        known = in_row[:, None] & (r < inner)[None, :]
        a = tl.load(a_ptrs[:, None] + r[None, :] * a_stride, known, other=0.0)  # (rows, r)
        known = (r < inner)[:, None] & in_out[None, :]
        theta = tl.load(theta_ptrs[None, :] + r[:, None] * theta_stride, known, other=0.0)  # (r, outs)
        acc = tl.dot(a, theta, acc, input_precision=PRECISION)
    return acc


@triton.jit
def graph_conv_mix_kernel(
    out_ptr,
    matrix_ptr,
    x_ptr,
    columns,
    row_count,
    inner,
    channels,
    x_stride_n,
    x_stride_j,
    x_stride_c,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """out (n, row_count, channels) = matrix (row_count, inner) · x (n, inner, channels)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n, c = column // channels, column % channels
    in_column = column < columns
    x_ptrs = x_ptr + n * x_stride_n + c * x_stride_c
    acc = mixed_tile(
        matrix_ptr, x_ptrs, in_column, rows, row_count, inner, x_stride_j, PRECISION, BLOCK_INNER
    )
    out_ptrs = out_ptr + (n * row_count * channels + c)[None, :] + rows[:, None] * channels
    tl.store(out_ptrs, acc, (rows < row_count)[:, None] & in_column[None, :])


@triton.jit
def graph_conv_product_kernel(
    out_ptr,
    a_ptr,
    theta_ptr,
    bias_ptr,
    count,
    nodes,
    inner,
    outs,
    a_stride_n,
    a_stride_i,
    a_stride_r,
    theta_stride_i,
    theta_stride_r,
    theta_stride_o,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """out (n, i, outs) = a (n, i, inner) · theta (i, inner, outs) + bias (i, outs)."""
    tile, i = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o = tl.program_id(2).to(tl.int64) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS)
    in_row, in_out = n < count, o < outs
    acc = product_tile(
        tl.zeros((BLOCK_ROWS, BLOCK_OUTS), tl.float32),
        a_ptr + n * a_stride_n + i * a_stride_i,
        in_row,
        theta_ptr + i * theta_stride_i + o * theta_stride_o,
        in_out,
        inner,
        a_stride_r,
        theta_stride_r,
        PRECISION,
        BLOCK_INNER,
    )
    if BIAS:
        acc += tl.load(bias_ptr + i * outs + o, in_out, other=0.0)[None, :]
    tl.store(out_ptr + ((n * nodes + i) * outs)[:, None] + o[None, :], acc, in_row[:, None] & in_out[None, :])


@triton.jit
def graph_conv_fused_kernel(
    out_ptr,
    x_ptr,
    matrix_ptr,
    theta_ptr,
    bias_ptr,
    count,
    nodes,
    order,
    channels,
    outs,
    x_stride_n,
    x_stride_j,
    x_stride_c,
    theta_stride_i,
    theta_stride_k,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Mixing and product in one: the tile of mixed features is a sum over nodes, made in registers."""
    tile, i = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o = tl.program_id(2).to(tl.int64) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS)
    in_row, in_out = n < count, o < outs
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUTS), tl.float32)
    for k in range(order):
        for first in range(0, channels, BLOCK_INNER):
            c = first + tl.arange(0, BLOCK_INNER).to(tl.int64)
            x_ptrs = x_ptr + (n * x_stride_n)[:, None] + (c * x_stride_c)[None, :]
            known = in_row[:, None] & (c < channels)[None, :]
            mixed = tl.zeros((BLOCK_ROWS, BLOCK_INNER), tl.float32)
            for j in range(nodes):
                weight = tl.load(matrix_ptr + ((i * order + k) * nodes + j))
                mixed += weight * tl.load(x_ptrs, known, other=0.0)  # (rows, c)
                x_ptrs += x_stride_j
            theta_ptrs = (
                theta_ptr + i * theta_stride_i + k * theta_stride_k + (c * outs)[:, None] + o[None, :]
            )
            theta = tl.load(theta_ptrs, (c < channels)[:, None] & in_out[None, :], other=0.0)  # (c, outs)
            acc = tl.dot(mixed.to(theta.dtype), theta, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + i * outs + o, in_out, other=0.0)[None, :]
    tl.store(out_ptr + ((n * nodes + i) * outs)[:, None] + o[None, :], acc, in_row[:, None] & in_out[None, :])


@triton.jit
def graph_conv_weight_gradient_kernel(
    out_ptr,
    a_ptr,
    grad_ptr,
    count,
    per_part,
    nodes,
    inner,
    outs,
    grad_stride_n,
    grad_stride_i,
    grad_stride_o,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """out (part, i, inner, outs) = Σ over the part's n of a (n, i, inner)ᵀ · grad (n, i, outs)."""
    part, i = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    inner_tiles = tl.cdiv(inner, BLOCK_INNER)
    r = (tl.program_id(2) % inner_tiles).to(tl.int64) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    o = (tl.program_id(2) // inner_tiles).to(tl.int64) * BLOCK_OUTS + tl.arange(0, BLOCK_OUTS)
    end = tl.minimum((part + 1) * per_part, count)
    acc = tl.zeros((BLOCK_INNER, BLOCK_OUTS), tl.float32)
    for first in range(part * per_part, end, BLOCK_ROWS):
        n = first + tl.arange(0, BLOCK_ROWS)
        a_ptrs = a_ptr + ((n * nodes + i) * inner)[None, :] + r[:, None]
        a = tl.load(a_ptrs, (r < inner)[:, None] & (n < end)[None, :], other=0.0)  # (r, n)
        grad_ptrs = grad_ptr + (n * grad_stride_n + i * grad_stride_i)[:, None] + (o * grad_stride_o)[None, :]
        grad = tl.load(grad_ptrs, (n < end)[:, None] & (o < outs)[None, :], other=0.0)  # (n, outs)
        acc = tl.dot(a, grad, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + ((part * nodes + i) * inner * outs) + (r * outs)[:, None] + o[None, :]
    tl.store(out_ptrs, acc, (r < inner)[:, None] & (o < outs)[None, :])


@triton.jit
def graph_conv_support_gradient_kernel(
    out_ptr,
    p_ptr,
    x_ptr,
    columns,
    per_part,
    row_count,
    nodes,
    channels,
    x_stride_n,
    x_stride_j,
    x_stride_c,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out (part, row_count, nodes) = Σ over the part's columns (n, c) of P (n, row, c) · x (n, node, c)."""
    part = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = tl.program_id(2).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    end = tl.minimum((part + 1) * per_part, columns)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_ROWS), tl.float32)
    for first in range(part * per_part, end, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        n, c = column // channels, column % channels
        p_ptrs = p_ptr + (n * row_count * channels + c)[None, :] + (row * channels)[:, None]
        p = tl.load(p_ptrs, (row < row_count)[:, None] & (column < end)[None, :], other=0.0)  # (row, column)
        x_ptrs = x_ptr + (n * x_stride_n + c * x_stride_c)[:, None] + (j * x_stride_j)[None, :]
        x = tl.load(x_ptrs, (column < end)[:, None] & (j < nodes)[None, :], other=0.0)  # (column, j)
        acc = tl.dot(p, x, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + part * row_count * nodes + (row * nodes)[:, None] + j[None, :]
    tl.store(out_ptrs, acc, (row < row_count)[:, None] & (j < nodes)[None, :])


def _block(size: int, most: int) -> int:
    """The tile of an axis: a power of two that `tl.dot` takes, no larger than needed."""
    return min(max(triton.next_power_of_2(size), 16), most)


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (rows, inner) · x (n, inner, c) -> (n, rows, c) in x's dtype."""
    count, inner, channels = x.shape
    out = x.new_empty(count, len(matrix), channels)
    block_rows = _block(len(matrix), 32)
    block_columns = 128 if block_rows == 16 else 64
    grid = (triton.cdiv(count * channels, block_columns), triton.cdiv(len(matrix), block_rows))
    graph_conv_mix_kernel[grid](
        out, matrix, x, count * channels, len(matrix), inner, channels, *x.stride(),
        PRECISION=dot_precision(x.dtype), BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, BLOCK_INNER=16,
    )  # fmt: skip
    return out


def node_product(
    a: Tensor, theta: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """a (n, m, inner) · theta (m, inner, outs) + bias (m, outs) -> (n, m, outs), one product per node."""
    count, nodes, inner = a.shape
    outs = theta.shape[-1]
    out = a.new_empty(count, nodes, outs, dtype=dtype or a.dtype)
    block_rows, block_outs = _block(count, 64), _block(outs, 64)
    grid = (triton.cdiv(count, block_rows), nodes, triton.cdiv(outs, block_outs))
    graph_conv_product_kernel[grid](
        out, a, theta, bias, count, nodes, inner, outs, *a.stride(), *theta.stride(),
        BIAS=bias is not None, PRECISION=dot_precision(a.dtype),
        BLOCK_ROWS=block_rows, BLOCK_OUTS=block_outs, BLOCK_INNER=32,
    )  # fmt: skip
    return out


def convolve(
    x: Tensor, matrix: Tensor, theta: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """The graph convolution of x (n, m, cin) by S (m·K, m), Θ (m, K, cin, cout) and bias (m, cout)."""
    count, nodes, channels = x.shape
    order, outs = theta.shape[1], theta.shape[-1]
    if count > FUSED_ROWS or nodes > FUSED_NODES:
        mixed = _mix(matrix, x).view(count, nodes, order * channels)
        return node_product(mixed, theta.flatten(1, 2), bias, dtype)
    out = x.new_empty(count, nodes, outs, dtype=dtype or x.dtype)
    block_rows, block_outs = _block(count, 64), _block(outs, 64)
    grid = (triton.cdiv(count, block_rows), nodes, triton.cdiv(outs, block_outs))
    graph_conv_fused_kernel[grid](
        out, x, matrix, theta, bias, count, nodes, order, channels, outs, *x.stride(), *theta.stride()[:2],
        BIAS=bias is not None, PRECISION=dot_precision(x.dtype),
        BLOCK_ROWS=block_rows, BLOCK_OUTS=block_outs, BLOCK_INNER=32,
    )  # fmt: skip
    return out


def _parts(size: int, per_part: int) -> tuple[int, int]:
    """How a long sum is cut: number of parts and size of each, by the shape alone."""
    per_part = max(per_part, triton.cdiv(size, MOST_PARTS))
    return triton.cdiv(size, per_part), per_part


def _weight_gradient(mixed: Tensor, grad: Tensor) -> Tensor:
    """Σ_n mixed (n, m, inner)ᵀ grad (n, m, outs) -> (m, inner, outs), float32."""
    count, nodes, inner = mixed.shape
    outs = grad.shape[-1]
    parts, per_part = _parts(count, ROWS_PER_PART)
    partial = mixed.new_empty(parts, nodes, inner, outs, dtype=torch.float32)
    block_inner, block_outs = _block(inner, 64), _block(outs, 64)
    grid = (parts, nodes, triton.cdiv(inner, block_inner) * triton.cdiv(outs, block_outs))
    graph_conv_weight_gradient_kernel[grid](
        partial, mixed, grad, count, per_part, nodes, inner, outs, *grad.stride(),
        PRECISION=dot_precision(mixed.dtype), BLOCK_ROWS=32, BLOCK_OUTS=block_outs, BLOCK_INNER=block_inner,
    )  # fmt: skip
    return partial.sum(0)


def _support_gradient(P: Tensor, x: Tensor) -> Tensor:
    """Σ_{n,c} P (n, rows, c) x (n, m, c) -> (rows, m), float32."""
    count, rows, channels = P.shape
    nodes = x.shape[1]
    parts, per_part = _parts(count * channels, COLUMNS_PER_PART)
    partial = P.new_empty(parts, rows, nodes, dtype=torch.float32)
    block = _block(rows, 32)
    grid = (parts, triton.cdiv(rows, block), triton.cdiv(nodes, block))
    graph_conv_support_gradient_kernel[grid](
        partial, P, x, count * channels, per_part, rows, nodes, channels, *x.stride(),
        PRECISION=dot_precision(P.dtype), BLOCK_ROWS=block, BLOCK_COLUMNS=64,
    )  # fmt: skip
    return partial.sum(0)


def convolve_gradients(
    grad: Tensor,
    x: Tensor,
    matrix: Tensor,
    theta: Tensor,
    *,
    x_wanted: bool,
    S_wanted: bool,
    theta_wanted: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `convolve` for x, S (m·K, m) and Θ (m, K, cin, cout), the last two in float32."""
    count, nodes, channels = x.shape
    d_x = d_matrix = d_theta = None
    if x_wanted or S_wanted:
        P = node_product(grad, theta.flatten(1, 2).transpose(1, 2)).view(count, len(matrix), channels)
        d_x = _mix(matrix.T.contiguous(), P) if x_wanted else None
        d_matrix = _support_gradient(P, x) if S_wanted else None
    if theta_wanted:
        mixed = _mix(matrix, x).view(count, nodes, theta.shape[1] * channels)
        d_theta = _weight_gradient(mixed, grad).view(theta.shape)
    return d_x, d_matrix, d_theta


def _rows(x: Tensor) -> Tensor:
    """Everything in front of the node axis as one axis."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def graph_conv(
    x: Tensor, U: Tensor, Q: Tensor | None, W: Tensor, bias: Tensor | None, normalization: int
) -> Tensor:
    """The raw operator `aufast::graph_conv`."""
    pool = W if normalization == SOFTMAX else W.unsqueeze(-3)
    rows = _rows(x)  # (n, m, cin)
    matrix = support_matrix(U, pool.shape[-3], normalization)
    if bias is not None:
        bias = (
            bias.float().expand(len(U), -1).contiguous() if Q is None else Q.float() @ bias.float()
        )  # (m, cout)
    return convolve(rows, matrix, node_weights(Q, pool, len(U)), bias).view(*x.shape[:-1], W.shape[-1])


def graph_conv_backward(
    grad: Tensor,
    x: Tensor,
    U: Tensor,
    Q: Tensor | None,
    W: Tensor,
    bias: Tensor | None,
    normalization: int,
    needs: int,
) -> tuple[Tensor, ...]:
    """The raw operator `aufast::graph_conv_backward`."""
    x_wanted, U_wanted, Q_wanted, W_wanted, bias_wanted = (bool(needs >> k & 1) for k in range(5))
    pool = W if normalization == SOFTMAX else W.unsqueeze(-3)
    order = pool.shape[-3]
    rows, grad = _rows(x), _rows(grad)  # (n, m, channels)
    matrix, theta = support_matrix(U, order, normalization), node_weights(Q, pool, len(U))
    d_x, d_matrix, d_theta = convolve_gradients(
        grad, rows, matrix, theta, x_wanted=x_wanted, S_wanted=U_wanted, theta_wanted=Q_wanted or W_wanted
    )
    d_bias = (
        grad.sum(0, dtype=torch.float32) if bias is not None and (bias_wanted or Q_wanted) else None
    )  # (m, cout)
    none = x.new_empty(0)
    d_Q, d_W, d_b = pool_gradients(d_theta, d_bias, Q, pool, bias)
    return (
        d_x.view(x.shape) if x_wanted else none,
        support_gradient(d_matrix, U, order, normalization) if U_wanted else none,
        d_Q if Q is not None and Q_wanted else none,
        d_W.view(W.shape) if W_wanted else none,
        d_b if bias is not None and bias_wanted else none,
    )
