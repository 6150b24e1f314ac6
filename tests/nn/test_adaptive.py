"""AdaptiveGraphGRU: AGCRN's numbers, gradients and training steps, and the state dicts of its forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aufast import reference
from aufast.nn import AdaptiveGraphGRU, agcrn_state_dict
from aufast.reference.agcrn import agcrn

SIZES = {"in_features": 2, "hidden": 5, "nodes": 7, "embedding": 3}
NODES = (7, 61)  # the C++ kernels mix a graph of many nodes another way


def layer_of(**options) -> AdaptiveGraphGRU:
    layer = AdaptiveGraphGRU(**SIZES | {"dtype": torch.float64} | options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def parameters_of(layer: AdaptiveGraphGRU) -> list[Tensor]:
    pools = [layer.gate.weights_pool, layer.gate.bias_pool, layer.update.weights_pool, layer.update.bias_pool]
    return [layer.node_embeddings, *pools]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("nodes", NODES)
def test_numbers_and_gradients_are_the_plain_forms(order: int, nodes: int) -> None:
    layer = layer_of(order=order, nodes=nodes)
    x = torch.randn(2, 6, nodes, 2, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(2, nodes, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *parameters_of(layer), h0]
    results = []
    for out, last in (layer(x, h0), agcrn(*inputs)):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, last, *torch.autograd.grad((out * weight).sum() + last.square().sum(), inputs)])
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("nodes", NODES)
def test_ten_training_steps_are_the_plain_forms(nodes: int) -> None:
    x, target = (torch.randn(3, 4, nodes, width, dtype=torch.float64) for width in (2, 5))
    start = layer_of(nodes=nodes)
    ends = []
    for fused in (True, False):
        layer = layer_of(nodes=nodes)
        layer.load_state_dict(start.state_dict())
        optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
        for _ in range(10):
            optimiser.zero_grad()
            out = layer(x)[0] if fused else agcrn(x, *parameters_of(layer))[0]
            nn.functional.mse_loss(out, target).backward()
            optimiser.step()
        ends.append(layer.state_dict())
    for name, truth in ends[1].items():
        torch.testing.assert_close(ends[0][name], truth, rtol=1e-9, atol=1e-10)
        assert not torch.equal(truth, start.state_dict()[name])


def test_state_first_and_the_usual_gates_are_the_graph_gru() -> None:
    layer = layer_of(concat="state-first", gates="gru", order=3)
    x = torch.randn(2, 6, 7, 2, dtype=torch.float64)
    E, gate_weights, gate_bias, update_weights, update_bias = parameters_of(layer)
    W_z, W_r = gate_weights.chunk(2, dim=-1)
    biases = (*gate_bias.chunk(2, dim=-1), update_bias)
    expected = reference.graph_gru(x, E, E, W_z, W_r, update_weights, biases=biases, normalization="softmax")
    torch.testing.assert_close(layer(x), expected)


def test_without_bias() -> None:
    layer, biased = layer_of(bias=False), layer_of()
    biased.load_state_dict(layer.state_dict(), strict=False)
    for name, value in biased.named_parameters():
        if name.endswith("bias_pool"):
            nn.init.zeros_(value)
    x = torch.randn(2, 3, 7, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), biased(x))


def test_chunks_and_lengths() -> None:
    layer = layer_of()
    x = torch.randn(2, 6, 7, 2, dtype=torch.float64)
    whole, last = layer(x)
    first, state = layer(x[:, :4])
    second, state = layer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, last)
    short, ends = layer(x, lengths=torch.tensor([6, 4]))
    torch.testing.assert_close(ends[1], whole[1, 3])
    assert short[1, 4:].abs().max() == 0


def test_embeddings_may_come_with_the_call() -> None:
    layer, outer = layer_of(), layer_of(own_embeddings=False)
    outer.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 3, 7, 2, dtype=torch.float64)
    assert "node_embeddings" not in outer.state_dict()
    torch.testing.assert_close(outer(x, embeddings=layer.node_embeddings), layer(x))
    with pytest.raises(ValueError, match=r"embeddings \(N, ce\) must be given where own_embeddings=False"):
        outer(x)


def renamed(layers: list[AdaptiveGraphGRU], cell: str, embeddings: str | None) -> dict[str, Tensor]:
    """The state dict that a model of these layers has elsewhere."""
    found = {} if embeddings is None else {embeddings: layers[0].node_embeddings}
    for number, layer in enumerate(layers):
        for name, value in layer.state_dict().items():
            if name != "node_embeddings":
                found[cell.format(number) + name] = value
    return found | {"end_conv.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("cell", "embeddings"),
    [
        pytest.param("encoder.dcrnn_cells.{}.", "node_embeddings", id="agcrn-libcity"),
        pytest.param("module.encoder.dcrnn_cells.{}.", "module.node_embeddings", id="wrapped"),
        pytest.param("recurrent.", None, id="pyg-temporal"),
    ],
)
def test_public_state_dicts(cell: str, embeddings: str | None) -> None:
    layers = [layer_of(), layer_of()] if "{}" in cell else [layer_of()]
    for number, layer in enumerate(layers):
        loaded = layer_of(own_embeddings=embeddings is not None)
        loaded.load_state_dict(agcrn_state_dict(renamed(layers, cell, embeddings), number))
        for name, value in loaded.state_dict().items():
            owner = layers[0] if name == "node_embeddings" else layer
            assert torch.equal(value, owner.state_dict()[name])


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    whole = renamed([layer_of()], "cells.{}.", "node_embeddings")
    with pytest.raises(KeyError, match="layer 1 is not there; the state dict has 1 cells"):
        agcrn_state_dict(whole, 1)
    part = {name: value for name, value in whole.items() if name != "cells.0.update.bias_pool"}
    with pytest.raises(KeyError, match="cells.0.update.bias_pool is missing"):
        agcrn_state_dict(part)
    with pytest.raises(ValueError, match="which embeddings are the layer's: node_embeddings, b.node"):
        agcrn_state_dict(whole | {"b.node_embeddings": torch.zeros(1)})


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="AdaptiveGraphGRU: nodes must be an integer of at least 1, got 0"):
        AdaptiveGraphGRU(2, 5, 0)
    with pytest.raises(ValueError, match="gates must be one of agcrn, gru, got 'lstm'"):
        AdaptiveGraphGRU(2, 5, 7, gates="lstm")
    with pytest.raises(ValueError, match=r"x must have shape \(B, T, N, 2\), got \(2, 3, 7, 5\)"):
        layer_of()(torch.zeros(2, 3, 7, 5, dtype=torch.float64))
