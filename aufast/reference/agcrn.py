"""AGCRN's recurrent layer defined as its authors compute it: graph and weights anew in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from aufast.reference.graph_conv import softmax_supports
from aufast.reference.precision import outside_autocast


def node_adaptive_conv(x: Tensor, E: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Convolve over the K Chebyshev supports of E's graph, each node with weights of its own.

    Args:
        x: (B, N, cin).
        E: (N, ce) node embeddings, for the graph and for the weights.
        weights: (ce, K, cin, cout).
        bias: (ce, cout).

    Returns:
        (B, N, cout).
    """
    supports = softmax_supports(E, weights.shape[1])  # (K, N, N)
    theta = torch.einsum("nd,dkio->nkio", E, weights)  # (N, K, cin, cout)
    mixed = torch.einsum("knm,bmc->bnkc", supports, x)  # (B, N, K, cin)
    return torch.einsum("bnki,nkio->bno", mixed, theta) + E @ bias


@outside_autocast
def agcrn(
    x: Tensor,
    E: Tensor,
    gate_weights: Tensor,
    gate_bias: Tensor,
    update_weights: Tensor,
    update_bias: Tensor,
    h0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run AGCRN's gated recurrent unit over a sequence: input before state, and its r keeps the old state.

    Args:
        x: (B, T, N, c_in).
        E: (N, ce) node embeddings.
        gate_weights: (ce, K, c_in + c, 2c), columns of z then of r.
        gate_bias: (ce, 2c).
        update_weights: (ce, K, c_in + c, c).
        update_bias: (ce, c).
        h0: (B, N, c) first state; None means zeros.

    Returns:
        States (B, T, N, c), and the last state (B, N, c).

    Source: Bai et al., Adaptive Graph Convolutional Recurrent Network, NeurIPS 2020, eq. (6).
    """
    batch, steps, nodes, _ = x.shape
    h = x.new_zeros(batch, nodes, update_bias.shape[-1]) if h0 is None else h0
    states = []
    for t in range(steps):
        joined = torch.cat([x[:, t], h], dim=-1)  # (B, N, c_in + c)
        z, r = torch.sigmoid(node_adaptive_conv(joined, E, gate_weights, gate_bias)).chunk(2, dim=-1)
        reset = torch.cat([x[:, t], z * h], dim=-1)  # (B, N, c_in + c)
        candidate = torch.tanh(node_adaptive_conv(reset, E, update_weights, update_bias))
        h = r * h + (1 - r) * candidate
        states.append(h)
    return torch.stack(states, dim=1) if steps else x.new_zeros(batch, 0, *h.shape[1:]), h
