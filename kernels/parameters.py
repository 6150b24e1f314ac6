"""What graph kernels make of their parameters once a call, tiny and in plain PyTorch: S, Θ, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from aufast.reference.graph_conv import global_adjacency, softmax_supports

SOFTMAX = 1


def contiguous(value: Tensor | None) -> Tensor | None:
    """For kernels that take an argument's numbers one after the other."""
    return None if value is None else value.contiguous()


def until_ends(value: Tensor, lengths: Tensor | None) -> Tensor:
    """value (B, T, …) with zeros after each sequence's end: what lies there, NaN too, is never read."""
    if lengths is None:
        return value
    after = torch.arange(value.shape[1], device=value.device) >= lengths[:, None]  # (B, T)
    return value.masked_fill(after.view(*after.shape, *[1] * (value.dim() - 2)), 0)


def support_matrix(U: Tensor, order: int, normalization: int) -> Tensor:
    """S as a float32 matrix (m·K, m), row i·K + k: `I + N(R(U Uᵀ))` (AAR eq. 10) or AGCRN's K supports."""
    U = U.float()
    if normalization == SOFTMAX:
        supports = softmax_supports(U, order)  # (K, m, m)
    else:
        supports = (torch.eye(len(U), device=U.device) + global_adjacency(U)).unsqueeze(0)
    return supports.transpose(0, 1).reshape(-1, len(U))


def support_gradient(d_matrix: Tensor, U: Tensor, order: int, normalization: int) -> Tensor:
    """The gradient of U from that of `support_matrix`."""
    nodes = len(U)
    E = U.float()
    products = E @ E.T  # (m, m)
    d_supports = list(d_matrix.view(nodes, order, nodes).unbind(1))  # K of (m, m)
    if normalization == SOFTMAX:
        supports = softmax_supports(E, max(order, 2))
        A = supports[1]
        d_A = torch.zeros_like(A)
        for k in range(order - 1, 1, -1):  # T_k = 2 A T_{k-1} - T_{k-2}
            d_A += 2 * d_supports[k] @ supports[k - 1].T
            d_supports[k - 1] = d_supports[k - 1] + 2 * A.T @ d_supports[k]
            d_supports[k - 2] = d_supports[k - 2] - d_supports[k]
        if order > 1:
            d_A += d_supports[1]
        d_products = A * (d_A - (d_A * A).sum(1, keepdim=True))
    else:
        total = torch.relu(products).sum()
        total = torch.where(total == 0, torch.ones_like(total), total)
        shares = torch.relu(products) / total
        d_products = (d_supports[0] - (d_supports[0] * shares).sum()) / total
    d_products = torch.where(products > 0, d_products, torch.zeros_like(d_products))
    return ((d_products + d_products.T) @ E).to(U.dtype)


def node_weights(Q: Tensor | None, W: Tensor, nodes: int) -> Tensor:
    """`Θ_i = Σ_e Q_ie W_e` (m, K, cin, cout) of W (ce, K, cin, cout), or (K, cin, cout) without Q."""
    if Q is None:
        return W.contiguous().expand(nodes, -1, -1, -1)
    return torch.einsum("ne,ekio->nkio", Q.float(), W.float()).to(W.dtype).contiguous()


def pool_gradients(
    d_theta: Tensor | None, d_bias: Tensor | None, Q: Tensor | None, W: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Q, W (ce, K, cin, cout) and bias from Θ's (m, K, cin, cout) and Q·bias's (m, cout)."""
    d_Q = d_W = d_b = None
    if Q is None:
        d_W = None if d_theta is None else d_theta.sum(0).to(W.dtype)
        return None, d_W, None if d_bias is None else d_bias.sum(0).to(W.dtype)
    if d_theta is not None:
        d_W = torch.einsum("ne,nkio->ekio", Q.float(), d_theta).to(W.dtype).contiguous()
        d_Q = torch.einsum("nkio,ekio->ne", d_theta, W.float())  # (m, ce)
    if d_bias is not None:
        d_b = (Q.float().T @ d_bias).to(W.dtype)
        d_Q = d_bias @ bias.float().T if d_Q is None else d_Q + d_bias @ bias.float().T
    return None if d_Q is None else d_Q.to(W.dtype).contiguous(), d_W, d_b


def gate_gradients(
    d_theta: Tensor | None,
    d_bias: Tensor | None,
    Q: Tensor,
    pools: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of Q, of three gates' pools and of their biases, from Θ's and Q·bias's of all gates.

    Args:
        d_theta: (m, K, cin, 3c) float32, or None where nobody asks.
        d_bias: (m, 3c) float32, or None.
        Q: (m, ce).
        pools: z's, r's and the candidate's (ce, K, cin, c), or (ce, cin, c).
        biases: three (ce, c), or three times None.

    Returns:
        Of Q, of each pool and of each bias; None where it was not asked for.
    """
    shape, channels = pools[0].shape, pools[0].shape[-1]
    pool = torch.cat(pools, dim=-1)  # (ce, K, cin, 3c)
    pool = pool if pool.dim() == 4 else pool.unsqueeze(1)
    bias = None if biases[0] is None else torch.cat(biases, dim=-1)  # (ce, 3c)
    d_Q, d_pool, d_biases = pool_gradients(d_theta, d_bias, Q, pool, bias)

    def by_gate(gradient: Tensor | None, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None
        return tuple(part.reshape(shape).contiguous() for part in gradient.split(channels, dim=-1))

    return d_Q, *by_gate(d_pool, shape), *by_gate(d_biases, (shape[0], channels))
