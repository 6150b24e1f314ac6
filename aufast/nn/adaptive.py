"""AGCRN's recurrent layer on the fused graph-GRU, with its parameters in the layout of the public code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from aufast import ops
from aufast.nn.checks import one_of, positive
from aufast.nn.graph import _init_embedding, _init_pool

CONCATS = ("input-first", "state-first")
GATES = ("agcrn", "gru")


def adaptive_graph_gru(
    x: Tensor,
    E: Tensor,
    gate_weights: Tensor,
    gate_bias: Tensor | None,
    update_weights: Tensor,
    update_bias: Tensor | None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    concat: str = "input-first",
    gates: str = "agcrn",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run AGCRN's recurrent layer over a sequence, from parameters in its own layout.

    Args:
        x: (B, T, N, c_in).
        E: (N, ce) node embeddings, for the graph and for the weights.
        gate_weights: (ce, K, c_in + c, 2c), the first half of the columns being z's.
        gate_bias: (ce, 2c), or None.
        update_weights: (ce, K, c_in + c, c).
        update_bias: (ce, c), or None.
        h0: (B, N, c) first state; None means zeros. float32 for bfloat16 and float16 inputs.
        lengths: (B,) int64, steps of each sequence; None means T for all.
        concat: "input-first" (AGCRN) or "state-first": the order of the weights' rows.
        gates: "agcrn": z resets the state and r keeps it; "gru": z keeps it and r resets it.
        backend: as in `aufast.ops.graph_gru`.

    Returns:
        States (B, T, N, c), and the last state (B, N, c).

    Raises:
        TypeError, ValueError, RuntimeError: as `aufast.ops.graph_gru`.

    Source: Bai et al., Adaptive Graph Convolutional Recurrent Network, NeurIPS 2020, eq. (6).
    """
    if concat == "input-first":  # the operator takes the state's rows first
        gate_weights, update_weights = (W.roll(-x.shape[-1], dims=2) for W in (gate_weights, update_weights))
    W_z, W_r = gate_weights.chunk(2, dim=-1)
    biases = None
    if gate_bias is not None and update_bias is not None:
        b_z, b_r = gate_bias.chunk(2, dim=-1)
        biases = (b_r, b_z, update_bias) if gates == "agcrn" else (b_z, b_r, update_bias)
    if gates == "agcrn":
        W_z, W_r = W_r, W_z
    return ops.graph_gru(
        x,
        E,
        E,
        W_z,
        W_r,
        update_weights,
        h0,
        biases=biases,
        lengths=lengths,
        normalization="softmax",
        backend=backend,
    )


class AdaptivePool(nn.Module):
    """The parameters of one node-adaptive convolution.

    Attributes:
        weights_pool: (ce, K, cin, cout).
        bias_pool: (ce, cout), or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        order: int,
        embedding: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.weights_pool = nn.Parameter(torch.empty(embedding, order, in_features, out_features, **factory))
        self.bias_pool = nn.Parameter(torch.empty(embedding, out_features, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew and set the bias to zero."""
        _init_pool(self.weights_pool, self.weights_pool.shape[1])
        if self.bias_pool is not None:
            nn.init.zeros_(self.bias_pool)

    def extra_repr(self) -> str:
        return f"weights_pool={tuple(self.weights_pool.shape)}, bias={self.bias_pool is not None}"


class AdaptiveGraphGRU(nn.Module):
    """AGCRN's recurrent layer: a GRU whose products are node-adaptive graph convolutions.

    Supports `[I, A, 2A·A - I, …]` of `A = softmax(relu(E Eᵀ))`, one embedding E for the graph and for every
    node's weights, each support with weights of its own. The parameters have the names and shapes of the
    public AGCRN; `agcrn_state_dict` takes one layer out of a whole model's. They start as in `GraphConv`.

    Args:
        in_features: c_in.
        hidden: c, the width of the state.
        nodes: N.
        embedding: ce.
        order: K, the number of Chebyshev supports.
        bias: adds `E·b` to each gate.
        own_embeddings: False where E is not this layer's but comes with each call.
        concat: "input-first" (AGCRN) or "state-first": the order of the weights' rows.
        gates: "agcrn": z resets the state and r keeps it; "gru": z keeps it and r resets it.
        backend: who computes; None takes what `aufast.use_backend` chose.

    Source: Bai et al., Adaptive Graph Convolutional Recurrent Network, NeurIPS 2020, eq. (6).
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        nodes: int,
        embedding: int = 10,
        *,
        order: int = 2,
        bias: bool = True,
        own_embeddings: bool = True,
        concat: str = "input-first",
        gates: str = "agcrn",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        positive(
            "AdaptiveGraphGRU",
            in_features=in_features,
            hidden=hidden,
            nodes=nodes,
            embedding=embedding,
            order=order,
        )
        one_of("AdaptiveGraphGRU", "concat", concat, CONCATS)
        one_of("AdaptiveGraphGRU", "gates", gates, GATES)
        factory = {"device": device, "dtype": dtype}
        self.in_features, self.hidden, self.nodes = in_features, hidden, nodes
        self.embedding, self.order = embedding, order
        self.concat, self.gates, self.backend = concat, gates, backend
        own = nn.Parameter(torch.empty(nodes, embedding, **factory)) if own_embeddings else None
        self.register_parameter("node_embeddings", own)
        rows = in_features + hidden
        self.gate = AdaptivePool(rows, 2 * hidden, order, embedding, bias=bias, **factory)
        self.update = AdaptivePool(rows, hidden, order, embedding, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        if self.node_embeddings is not None:
            _init_embedding(self.node_embeddings)
        self.gate.reset_parameters()
        self.update.reset_parameters()

    def forward(
        self,
        x: Tensor,
        h0: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run over a sequence.

        Args:
            x: (B, T, N, c_in), any T.
            h0: (B, N, c) first state; None means zeros. float32 for bfloat16 and float16 inputs.
            embeddings: (N, ce), in place of the layer's own.
            lengths: (B,) int64, steps of each sequence; None means T for all.

        Returns:
            States (B, T, N, c), zero at and after a sequence's end, and each sequence's last state (B, N, c).

        Raises:
            ValueError: the layer has no embeddings of its own and none came, or a wrong shape.
        """
        E = self.node_embeddings if embeddings is None else embeddings
        if E is None:
            raise ValueError("AdaptiveGraphGRU: embeddings (N, ce) must be given where own_embeddings=False")
        if x.dim() != 4 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"AdaptiveGraphGRU: x must have shape (B, T, N, {self.in_features}), got {tuple(x.shape)}"
            )
        return adaptive_graph_gru(
            x,
            E,
            self.gate.weights_pool,
            self.gate.bias_pool,
            self.update.weights_pool,
            self.update.bias_pool,
            h0,
            lengths=lengths,
            concat=self.concat,
            gates=self.gates,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.hidden}, nodes={self.nodes}, embedding={self.embedding}, "
            f"order={self.order}, concat={self.concat}, gates={self.gates}"
        )


def agcrn_state_dict(state_dict: Mapping[str, Tensor], layer: int = 0) -> dict[str, Tensor]:
    """Take one layer's parameters, under `AdaptiveGraphGRU`'s names, out of a public AGCRN's state dict.

    The public AGCRN and LibCity have `encoder.dcrnn_cells.L.gate.…` and `….update.…` where this layer has
    `gate.…` and `update.…`; PyTorch Geometric Temporal has the same names. `node_embeddings` is the model's
    in the first two; in the third it is the caller's, and taken if the dict holds it under that name.

    A prefix in front of all names, as of a wrapping model, is no obstacle.

    Args:
        state_dict: of the whole model, or of a part that holds the layer.
        layer: which cell, counted as they come in the state dict.

    Returns:
        What `AdaptiveGraphGRU.load_state_dict` takes.

    Raises:
        KeyError: there is no such layer, or a parameter of it is missing.
        ValueError: several embeddings, so that it is not clear which is the layer's.
    """
    first = "gate.weights_pool"
    cells = [name.removesuffix(first) for name in state_dict if name.endswith(first)]
    if not 0 <= layer < len(cells):
        raise KeyError(f"agcrn_state_dict: layer {layer} is not there; the state dict has {len(cells)} cells")
    found = {}
    for part in (first, "gate.bias_pool", "update.weights_pool", "update.bias_pool"):
        if cells[layer] + part not in state_dict:
            raise KeyError(f"agcrn_state_dict: {cells[layer] + part} is missing")
        found[part] = state_dict[cells[layer] + part]
    embeddings = [name for name in state_dict if name.split(".")[-1] == "node_embeddings"]
    if len(embeddings) > 1:
        raise ValueError(f"agcrn_state_dict: which embeddings are the layer's: {', '.join(embeddings)}?")
    if embeddings:
        found["node_embeddings"] = state_dict[embeddings[0]]
    return found
