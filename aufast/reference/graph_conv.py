"""The definition of the AU-specific graph convolution: AAR eq. (10), (11), (15), and AGCRN's relatives."""

from __future__ import annotations

import torch
from torch import Tensor

from aufast.reference.precision import outside_autocast


def global_adjacency(U: Tensor) -> Tensor:
    """`N(R(U Uᵀ))`: ReLU, then division by the sum over all entries; N(0) = 0.

    Args:
        U: (m, ce) node embeddings.

    Returns:
        (m, m).

    Source: AAR eq. (10).
    """
    similarity = torch.relu(U @ U.T)  # (m, m)
    total = similarity.sum()
    return similarity / torch.where(total == 0, torch.ones_like(total), total)


def softmax_supports(E: Tensor, order: int) -> Tensor:
    """AGCRN's Chebyshev supports `[I, A, 2A·A - I, …]` of `A = softmax(relu(E Eᵀ), dim=1)`.

    Args:
        E: (m, ce) node embeddings.
        order: K, the number of supports, at least 1.

    Returns:
        (K, m, m).
    """
    A = torch.softmax(torch.relu(E @ E.T), dim=1)  # (m, m)
    supports = [torch.eye(len(E), dtype=E.dtype, device=E.device), A]
    for _ in range(2, order):
        supports.append(2 * A @ supports[-1] - supports[-2])
    return torch.stack(supports[:order])  # (K, m, m)


@outside_autocast
def graph_conv(
    x: Tensor,
    U: Tensor,
    Q: Tensor | None,
    W: Tensor,
    bias: Tensor | None = None,
    *,
    normalization: str = "global",
) -> Tensor:
    """Mix the nodes by a learned graph, then give each node its own linear map.

    Args:
        x: (..., m, cin) node features.
        U: (m, ce) embeddings that make the graph.
        Q: (m, ce) embeddings that make each node's map; None for the shared map of eq. (15).
        W: (ce, cin, cout) for "global", (ce, K, cin, cout) for "softmax"; (cin, cout) where Q is None.
        bias: (ce, cout), adds `Q·bias`; (cout,) where Q is None.
        normalization: "global" (AAR: `S = I + N(R(U Uᵀ))`) or "softmax" (AGCRN's K supports).

    Returns:
        (..., m, cout).

    Source: AAR eq. (10), (11): `(I + N(R(U Uᵀ))) F ⊙ Q W`; eq. (15): `S F Θ⁰`.
    """
    if normalization == "global":
        supports = (torch.eye(len(U), dtype=U.dtype, device=U.device) + global_adjacency(U)).unsqueeze(0)
        W = W.unsqueeze(-3)  # (ce, K=1, cin, cout), or (K=1, cin, cout)
    else:
        supports = softmax_supports(U, W.shape[-3])
    mixed = torch.einsum("knj,...ji->...nki", supports, x)  # (..., m, K, cin)
    if Q is None:
        out = torch.einsum("...nki,kio->...no", mixed, W)  # (..., m, cout)
        return out if bias is None else out + bias
    theta = torch.einsum("ne,ekio->nkio", Q, W)  # (m, K, cin, cout)
    out = torch.einsum("...nki,nkio->...no", mixed, theta)  # (..., m, cout)
    return out if bias is None else out + Q @ bias
