"""The graph layers: they call the operators with their own parameters, start well, and name bad input."""

from __future__ import annotations

import pytest
import torch

from aufast import reference
from aufast.nn import GraphConv, GraphGRU

FORMS = {
    "specific": {},
    "specific-bias": {"bias": True},
    "tied": {"tie_embeddings": True},
    "softmax": {"normalization": "softmax", "order": 3, "bias": True},
    "agcrn": {"normalization": "softmax", "order": 2, "bias": True, "tie_embeddings": True},
}


def fill(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize(
    "options",
    [*FORMS.values(), {"shared": True}, {"shared": True, "bias": True}],
    ids=[*FORMS, "shared", "shared-bias"],
)
def test_graph_conv_is_the_definition(options):
    layer = fill(GraphConv(5, 6, nodes=4, embedding=3, dtype=torch.float64, **options))
    x = torch.randn(2, 7, 4, 5, dtype=torch.float64)
    Q = None if options.get("shared") else layer.U if options.get("tie_embeddings") else layer.Q
    expected = reference.graph_conv(x, layer.U, Q, layer.W, layer.bias, normalization=layer.normalization)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_graph_gru_is_the_definition(options):
    layer = fill(GraphGRU(5, 6, nodes=4, embedding=3, dtype=torch.float64, **options))
    x, h0 = torch.randn(2, 7, 4, 5, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    lengths = torch.tensor([3, 7])
    pools = (layer.b_z, layer.b_r, layer.b_h) if options.get("bias") else None
    Q = layer.U if options.get("tie_embeddings") else layer.Q
    expected, last = reference.graph_gru(
        x,
        layer.U,
        Q,
        layer.W_z,
        layer.W_r,
        layer.W_h,
        h0,
        biases=pools,
        lengths=lengths,
        normalization=layer.normalization,
    )
    found, state = layer(x, h0, lengths)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, last)
    (found.square().sum() + state.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_gru_in_chunks_equals_one_call():
    layer = GraphGRU(5, 6, nodes=4, dtype=torch.float64)
    x = torch.randn(2, 9, 4, 5, dtype=torch.float64)
    whole, last = layer(x)
    first, state = layer(x[:, :4])
    second, state = layer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("embedding", [2, 8, 32])
def test_a_nodes_own_matrix_starts_with_xaviers_variance(embedding):
    layer = GraphConv(64, 32, nodes=500, embedding=embedding)
    theta = torch.einsum("ne,eio->nio", layer.Q, layer.W)
    assert abs(theta.var() / (2 / (64 + 32)) - 1) < 0.15


def test_same_seed_same_parameters():
    layer = GraphGRU(5, 6, nodes=4, bias=True)
    torch.manual_seed(0)
    layer.reset_parameters()
    first = {key: value.clone() for key, value in layer.state_dict().items()}
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(torch.equal(value, first[key]) for key, value in layer.state_dict().items())
    assert layer.b_z.abs().max() == 0


def test_tied_embeddings_are_one_parameter():
    assert set(GraphGRU(5, 6, nodes=4, tie_embeddings=True).state_dict()) == {"U", "W_z", "W_r", "W_h"}


def test_autocast_keeps_the_state_in_float32():
    layer = GraphGRU(5, 6, nodes=4)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = layer(torch.randn(2, 3, 4, 5))
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32


def test_repr_names_the_sizes():
    layer = GraphGRU(5, 6, nodes=4, embedding=3, normalization="softmax", order=2, tie_embeddings=True)
    expected = "5, 6, nodes=4, embedding=3, normalization=softmax, order=2, tie_embeddings=True, bias=False"
    assert layer.extra_repr() == expected
    assert GraphConv(5, 6, nodes=4, shared=True).extra_repr().endswith("shared=True, bias=False")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GraphConv(5, 6, nodes=0), "GraphConv: nodes must be an integer of at least 1, got 0"),
        (
            lambda: GraphGRU(5, 6, 4, embedding=2.5),
            "GraphGRU: embedding must be an integer of at least 1, got 2.5",
        ),
        (
            lambda: GraphGRU(5, 6, 4, normalization="row"),
            "normalization must be one of global, softmax, got 'row'",
        ),
        (lambda: GraphConv(5, 6, 4, order=2), "order is 1 for normalization 'global', got 2"),
        (lambda: GraphConv(5, 6, 4)(torch.ones(2, 3, 5)), r"m=4|must have shape"),
    ],
    ids=["nodes", "embedding", "normalization", "order", "node-count"],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
