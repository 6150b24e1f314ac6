"""AU-specific graph convolution and the GRU built from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aufast import ops
from aufast.nn.checks import one_of, positive

NORMALIZATIONS = ("global", "softmax")


def _init_embedding(embedding: Tensor) -> None:
    # Rows of expected unit norm, so that theta = Q·W has the variance of the pool's slices whatever ce is.
    nn.init.normal_(embedding, std=embedding.shape[-1] ** -0.5)


def _init_pool(pool: Tensor, supports: int) -> None:
    # Xavier (Glorot) uniform for one (cin, cout) slice; K supports add up in one output.
    fan_in, fan_out = pool.shape[-2:]
    bound = math.sqrt(6 / (supports * (fan_in + fan_out)))
    nn.init.uniform_(pool, -bound, bound)


class _GraphLayer(nn.Module):
    """What both layers share: the embeddings U and Q, and the shape of a parameter pool."""

    def __init__(
        self,
        nodes: int,
        embedding: int,
        normalization: str,
        order: int,
        tie_embeddings: bool,
        node_weights: bool,
        backend: str | None,
        factory: dict,
    ):
        super().__init__()
        kind = type(self).__name__
        positive(kind, nodes=nodes, embedding=embedding, order=order)
        one_of(kind, "normalization", normalization, NORMALIZATIONS)
        if normalization == "global" and order != 1:
            raise ValueError(f"{kind}: order is 1 for normalization 'global', got {order}")
        self.nodes, self.embedding, self.order = nodes, embedding, order
        self.normalization = normalization
        self.backend = backend
        self.U = nn.Parameter(torch.empty(nodes, embedding, **factory))
        own_q = node_weights and not tie_embeddings
        self.Q = nn.Parameter(torch.empty(nodes, embedding, **factory)) if own_q else None
        self._tied = node_weights and tie_embeddings

    def _node_embedding(self) -> Tensor | None:
        return self.U if self._tied else self.Q

    def _pool(self, fan_in: int, fan_out: int, factory: dict) -> nn.Parameter:
        supports = () if self.normalization == "global" else (self.order,)
        pools = () if self._node_embedding() is None else (self.embedding,)
        return nn.Parameter(torch.empty(*pools, *supports, fan_in, fan_out, **factory))

    def _reset_embeddings(self) -> None:
        for embedding in (self.U, self.Q):
            if embedding is not None:
                _init_embedding(embedding)

    def _graph_repr(self) -> str:
        order = f", order={self.order}" if self.normalization == "softmax" else ""
        tied = ", tie_embeddings=True" if self._tied else ""
        return (
            f"nodes={self.nodes}, embedding={self.embedding}, normalization={self.normalization}{order}{tied}"
        )


class GraphConv(_GraphLayer):
    """Mix the nodes by a learned graph, then give each node its own linear map: `(I + N(R(U Uᵀ))) X ⊙ Q W`.

    The papers do not say how U, Q and W start. Here U and Q are normal with variance 1/ce, each slice of W
    is Xavier uniform, and the bias is zero: every node's own matrix then starts with Xavier's variance.

    Args:
        in_features: cin.
        out_features: cout.
        nodes: m.
        embedding: ce.
        shared: one map for all nodes (eq. 15) in place of one per node (eq. 11); there is no Q then.
        bias: adds `Q·bias`, or `bias` where the map is shared; the paper has none.
        normalization: "global" (AAR) or "softmax" (AGCRN, with `order` supports).
        order: K, the number of Chebyshev supports of "softmax".
        tie_embeddings: one embedding for both roles, as in AGCRN.
        backend: who computes; None takes what `aufast.use_backend` chose.

    Source: AAR eq. (10), (11), (15).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nodes: int,
        embedding: int = 8,
        *,
        shared: bool = False,
        bias: bool = False,
        normalization: str = "global",
        order: int = 1,
        tie_embeddings: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(nodes, embedding, normalization, order, tie_embeddings, not shared, backend, factory)
        positive("GraphConv", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features, self.shared = in_features, out_features, shared
        self.W = self._pool(in_features, out_features, factory)
        pools = () if shared else (embedding,)
        self.bias = nn.Parameter(torch.empty(*pools, out_features, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self._reset_embeddings()
        _init_pool(self.W, self.order)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: (..., m, cin).

        Returns:
            (..., m, cout).
        """
        return ops.graph_conv(
            x,
            self.U,
            self._node_embedding(),
            self.W,
            self.bias,
            normalization=self.normalization,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {self._graph_repr()}, "
            f"shared={self.shared}, bias={self.bias is not None}"
        )


class GraphGRU(_GraphLayer):
    """A gated recurrent unit whose products are AU-specific graph convolutions.

    One pair U, Q serves the three gates. The rows of each pool are the state's first, then the input's.
    Parameters start as in `GraphConv`.

    Args:
        in_features: c_in.
        hidden: c, the width of the state.
        nodes: m.
        embedding: ce.
        bias: adds `Q·b` to each gate; the paper has none.
        normalization: "global" (AAR) or "softmax" (AGCRN, with `order` supports).
        order: K, the number of Chebyshev supports of "softmax".
        tie_embeddings: one embedding for both roles, as in AGCRN.
        backend: who computes; None takes what `aufast.use_backend` chose.

    Source: AAR eq. (13).
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        nodes: int,
        embedding: int = 8,
        *,
        bias: bool = False,
        normalization: str = "global",
        order: int = 1,
        tie_embeddings: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(nodes, embedding, normalization, order, tie_embeddings, True, backend, factory)
        positive("GraphGRU", in_features=in_features, hidden=hidden)
        self.in_features, self.hidden = in_features, hidden
        self.W_z, self.W_r, self.W_h = (self._pool(hidden + in_features, hidden, factory) for _ in range(3))
        self.b_z, self.b_r, self.b_h = (
            nn.Parameter(torch.empty(embedding, hidden, **factory)) if bias else None for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self._reset_embeddings()
        for pool in (self.W_z, self.W_r, self.W_h):
            _init_pool(pool, self.order)
        for bias in (self.b_z, self.b_r, self.b_h):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self, x: Tensor, h0: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run over a sequence.

        Args:
            x: (B, T, m, c_in), any T.
            h0: (B, m, c) first state; None means zeros. float32 for bfloat16 and float16 inputs.
            lengths: (B,) int64, steps of each sequence; None means T for all.

        Returns:
            States (B, T, m, c), zero at and after a sequence's end, and the last state (B, m, c) of each
            sequence.
        """
        return ops.graph_gru(
            x,
            self.U,
            self._node_embedding(),
            self.W_z,
            self.W_r,
            self.W_h,
            h0,
            biases=None if self.b_z is None else (self.b_z, self.b_r, self.b_h),
            lengths=lengths,
            normalization=self.normalization,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.hidden}, {self._graph_repr()}, bias={self.b_z is not None}"
