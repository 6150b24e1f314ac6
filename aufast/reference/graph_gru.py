"""The definition of the graph-GRU: AAR eq. (13), one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from aufast.reference.graph_conv import graph_conv
from aufast.reference.precision import outside_autocast


@outside_autocast
def graph_gru(
    x: Tensor,
    U: Tensor,
    Q: Tensor,
    W_z: Tensor,
    W_r: Tensor,
    W_h: Tensor,
    h0: Tensor | None = None,
    *,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    normalization: str = "global",
) -> tuple[Tensor, Tensor]:
    """Run a gated recurrent unit whose three products are AU-specific graph convolutions.

    Args:
        x: (B, T, m, c_in).
        U: (m, ce) embeddings that make the graph.
        Q: (m, ce) embeddings that make each node's weights.
        W_z, W_r, W_h: (ce, c + c_in, c) for "global", (ce, K, c + c_in, c) for "softmax"; state rows first.
        h0: (B, m, c) first state, in the accumulation dtype (float32 for low precision); None means zeros.
        biases: three (ce, c) pools, each adding `Q·b` to its gate.
        lengths: (B,) int64, steps of each sequence; later outputs are zero and the state stays.
        normalization: "global" (AAR) or "softmax" (AGCRN).

    Returns:
        States (B, T, m, c) in x's dtype, and the last state (B, m, c) in the accumulation dtype.

    Source: AAR eq. (13).
    """
    batch, steps, nodes, _ = x.shape
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    h = x.new_zeros(batch, nodes, W_z.shape[-1], dtype=state_dtype) if h0 is None else h0.to(state_dtype)
    b_z, b_r, b_h = biases or (None, None, None)
    if lengths is not None:  # a NaN after a sequence's end would reach the gradients as 0 · NaN
        after = torch.arange(steps, device=x.device) >= lengths[:, None]  # (B, T)
        x = x.masked_fill(after[:, :, None, None], 0)

    def conv(inputs: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        return graph_conv(inputs, U, Q, W, bias, normalization=normalization)

    outputs = []
    for t in range(steps):
        joined = torch.cat([h.to(x.dtype), x[:, t]], dim=-1)  # (B, m, c + c_in)
        z = torch.sigmoid(conv(joined, W_z, b_z))  # (B, m, c)
        r = torch.sigmoid(conv(joined, W_r, b_r))
        reset = torch.cat([(r * h).to(x.dtype), x[:, t]], dim=-1)  # (B, m, c + c_in)
        candidate = torch.tanh(conv(reset, W_h, b_h))
        new = z * h + (1 - z) * candidate
        if lengths is None:
            h = new
            outputs.append(h.to(x.dtype))
        else:
            running = (t < lengths)[:, None, None]  # (B, 1, 1)
            h = torch.where(running, new, h)
            outputs.append(torch.where(running, h, torch.zeros_like(h)).to(x.dtype))
    out = torch.stack(outputs, dim=1) if steps else x.new_zeros(batch, 0, nodes, h.shape[-1])
    return out, h
