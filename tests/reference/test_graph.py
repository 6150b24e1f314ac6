"""What the graph operators mean beyond their formulas: no graph, streaming, padding, and AGCRN's cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from aufast.reference import graph_conv, graph_gru
from tests.reference import loops


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def gru_arguments(c_in: int = 2, c: int = 3, m: int = 4, ce: int = 2) -> list[Tensor]:
    return [randn(m, ce), randn(m, ce), *(randn(ce, c + c_in, c) for _ in range(3))]


def test_without_embeddings_the_graph_is_the_identity_and_U_gets_no_gradient() -> None:
    x, Q, W = randn(2, 5, 3), randn(5, 2), randn(2, 3, 4)
    U = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    out = graph_conv(x, U, Q, W)
    torch.testing.assert_close(out, torch.einsum("bni,ne,eio->bno", x, Q, W))
    out.square().sum().backward()
    assert torch.equal(U.grad, torch.zeros_like(U))


def test_equal_embeddings_share_one_map() -> None:
    x, U, W = randn(2, 5, 3), randn(5, 2), randn(3, 4)
    pool = torch.cat([W[None], torch.zeros(1, 3, 4, dtype=torch.float64)])
    Q = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(5, 2)
    torch.testing.assert_close(graph_conv(x, U, None, W), graph_conv(x, U, Q, pool))


def test_chunks_that_carry_the_state_give_the_numbers_of_one_call() -> None:
    x, parameters = randn(2, 7, 4, 2), gru_arguments()
    out, last = graph_gru(x, *parameters)
    pieces, state = [], None
    for piece in x.split([1, 4, 2], dim=1):
        states, state = graph_gru(piece, *parameters, state)
        pieces.append(states)
    torch.testing.assert_close(torch.cat(pieces, dim=1), out, rtol=1e-14, atol=0)
    torch.testing.assert_close(state, last, rtol=1e-14, atol=0)
    torch.testing.assert_close(last, out[:, -1], rtol=0, atol=0)


def test_a_sequence_stops_at_its_own_length() -> None:
    x, parameters, h0 = randn(3, 5, 4, 2), gru_arguments(), randn(3, 4, 3)
    out, last = graph_gru(x, *parameters, h0, lengths=torch.tensor([3, 0, 5]))
    for b, length in enumerate((3, 0, 5)):
        alone, state = graph_gru(x[b : b + 1, :length], *parameters, h0[b : b + 1])
        torch.testing.assert_close(out[b, :length], alone[0], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(last[b], state[0], rtol=1e-14, atol=1e-15)
        assert not out[b, length:].any()


def test_what_follows_the_end_of_a_sequence_does_not_matter() -> None:
    x, parameters = randn(2, 4, 4, 2), gru_arguments()
    x[0, 2:] = torch.nan
    x.requires_grad_()
    out, last = graph_gru(x, *parameters, lengths=torch.tensor([2, 4]))
    assert out.isfinite().all() and last.isfinite().all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_agcrn_cell_is_the_graph_gru_with_renamed_gates_and_permuted_rows(order: int) -> None:
    """AGCRN: U = Q = E, row softmax, input rows before state rows, and r and z change places."""
    batch, steps, m, c_in, c, ce = 2, 3, 4, 2, 3, 2
    x, E, h0 = randn(batch, steps, m, c_in), randn(m, ce), randn(batch, m, c)
    gate_W, gate_b = randn(ce, order, c_in + c, 2 * c), randn(ce, 2 * c)
    update_W, update_b = randn(ce, order, c_in + c, c), randn(ce, c)

    state, states = h0.numpy(), []
    cell = [t.numpy() for t in (E, gate_W, gate_b, update_W, update_b)]
    for t in range(steps):
        state = loops.agcrn_cell(x[:, t].numpy(), state, *cell)
        states.append(state)

    def state_first(W: Tensor) -> Tensor:
        return torch.cat([W[:, :, c_in:], W[:, :, :c_in]], dim=2)

    agcrn_z, agcrn_r = state_first(gate_W).split(c, dim=-1)
    bias_z, bias_r = gate_b.split(c, dim=-1)
    out, last = graph_gru(
        x, E, E, agcrn_r, agcrn_z, state_first(update_W), h0,
        biases=(bias_r, bias_z, update_b), normalization="softmax",
    )  # fmt: skip
    expected = np.stack(states, axis=1)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(last.numpy(), expected[:, -1], rtol=1e-12, atol=1e-12)
