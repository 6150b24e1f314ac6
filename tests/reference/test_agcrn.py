"""The definition of AGCRN's layer against loops in NumPy, and its gradients against differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aufast.reference.agcrn import agcrn


def parameters(nodes: int, cin: int, hidden: int, order: int, ce: int) -> list[torch.Tensor]:
    shapes = ((nodes, ce), (ce, order, cin + hidden, 2 * hidden), (ce, 2 * hidden))
    shapes += ((ce, order, cin + hidden, hidden), (ce, hidden))
    return [torch.randn(shape, dtype=torch.float64) * 0.5 for shape in shapes]


def conv(x: np.ndarray, E: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """One frame (N, cin), node by node and support by support."""
    nodes, order = len(E), weights.shape[1]
    A = np.exp(np.maximum(E @ E.T, 0))
    A /= A.sum(axis=1, keepdims=True)
    supports = [np.eye(nodes), A]
    while len(supports) < order:
        supports.append(2 * A @ supports[-1] - supports[-2])
    out = np.zeros((nodes, weights.shape[-1]))
    for node in range(nodes):
        for d in range(E.shape[1]):
            out[node] += E[node, d] * bias[d]
            for k in range(order):
                out[node] += (supports[k][node] @ x) @ (E[node, d] * weights[d, k])
    return out


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_definition_equals_loops(order: int) -> None:
    batch, steps, nodes, cin, hidden = 2, 3, 5, 2, 4
    x = torch.randn(batch, steps, nodes, cin, dtype=torch.float64)
    h0 = torch.randn(batch, nodes, hidden, dtype=torch.float64)
    values = parameters(nodes, cin, hidden, order, ce=3)
    E, gate_weights, gate_bias, update_weights, update_bias = (value.numpy() for value in values)
    out, last = agcrn(x, *values, h0)
    for b in range(batch):
        h = h0[b].numpy()
        for t in range(steps):
            frame = x[b, t].numpy()
            gates = sigmoid(conv(np.concatenate([frame, h], axis=1), E, gate_weights, gate_bias))
            z, r = gates[:, :hidden], gates[:, hidden:]
            joined = np.concatenate([frame, z * h], axis=1)
            h = r * h + (1 - r) * np.tanh(conv(joined, E, update_weights, update_bias))
            np.testing.assert_allclose(out[b, t].numpy(), h, rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(last[b].numpy(), out[b, -1].numpy())


def test_no_steps_keep_the_state() -> None:
    h0 = torch.randn(2, 5, 4, dtype=torch.float64)
    out, last = agcrn(torch.zeros(2, 0, 5, 2, dtype=torch.float64), *parameters(5, 2, 4, 2, 3), h0)
    assert out.shape == (2, 0, 5, 4)
    assert torch.equal(last, h0)


def test_gradients() -> None:
    inputs = [torch.randn(1, 2, 3, 1, dtype=torch.float64), *parameters(3, 1, 2, 2, ce=2)]
    torch.autograd.gradcheck(agcrn, [value.requires_grad_() for value in inputs])
