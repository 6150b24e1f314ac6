"""Every peer computes what the reference computes: float64, outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aufast import reference
from aufast.reference.agcrn import agcrn
from benchmarks import peers
from benchmarks.harness import compiler, compute, distance


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def roi_crop_inputs() -> tuple[Tensor, ...]:
    corner = 7 * torch.rand(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    return randn(2, 3, 7, 5), torch.cat(
        [corner, corner + randn(2, 5, 2)], dim=-1
    )  # some lie outside or mirror


def graph_conv_inputs() -> tuple[Tensor, ...]:
    return randn(2, 3, 5, 7), randn(5, 4), randn(5, 4), randn(4, 7, 6)


def graph_gru_inputs() -> tuple[Tensor, ...]:
    gates = (randn(4, 9, 6), randn(4, 9, 6) + 0.1, randn(4, 9, 6) - 0.1)  # (ce, c + c_in, c)
    return randn(2, 3, 5, 3), randn(5, 4), randn(5, 4), *gates


def agcrn_inputs() -> tuple[Tensor, ...]:
    pools = (randn(4, 3, 8, 12) / 4, randn(4, 12), randn(4, 3, 8, 6) / 4, randn(4, 6))  # (ce, K, c_in + c, …)
    return randn(2, 3, 5, 2), randn(5, 4) / 2, *pools


def region_conv_inputs() -> tuple[Tensor, ...]:
    return randn(2, 3, 8, 12), randn(4, 4, 5, 3, 3, 3), randn(4, 4, 5), randn(4, 4, 3), randn(4, 4, 3) + 0.2


PEERS = [
    pytest.param(reference.roi_crop, peers.roi_crop_stn, roi_crop_inputs, id="roi_crop-stn"),
    pytest.param(reference.roi_crop, peers.roi_crop_merged, roi_crop_inputs, id="roi_crop-merged"),
    pytest.param(reference.graph_conv, peers.graph_conv_hoisted, graph_conv_inputs, id="graph_conv-hoisted"),
    pytest.param(reference.graph_gru, peers.graph_gru_hoisted, graph_gru_inputs, id="graph_gru-hoisted"),
    pytest.param(agcrn, peers.agcrn_hoisted, agcrn_inputs, id="agcrn-hoisted"),
    pytest.param(reference.region_conv, peers.region_conv_loop, region_conv_inputs, id="region_conv-loop"),
    pytest.param(
        reference.region_conv, peers.region_conv_grouped, region_conv_inputs, id="region_conv-grouped"
    ),
]


def assert_equal(definition, peer, inputs: tuple[Tensor, ...]) -> None:
    for mode in ("fwd", "fwd+bwd"):
        exact, results = compute(definition, inputs, mode), compute(peer, inputs, mode)
        assert results.keys() == exact.keys()
        assert {name: distance(results[name], exact[name]) for name in exact} == pytest.approx(
            dict.fromkeys(exact, 0), abs=1e-12
        )


@pytest.mark.parametrize(("definition", "peer", "inputs"), PEERS)
def test_peer_equals_reference(definition, peer, inputs) -> None:
    assert_equal(definition, peer, inputs())


def test_roi_crop_peers_keep_to_the_reference_in_channels_last() -> None:
    features, boxes = roi_crop_inputs()
    inputs = features.to(memory_format=torch.channels_last), boxes
    for peer in (peers.roi_crop_stn, peers.roi_crop_merged):
        assert_equal(reference.roi_crop, peer, inputs)


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("definition", "peer", "inputs"), PEERS[2:4])
def test_compiled_peer_equals_reference(definition, peer, inputs) -> None:
    assert_equal(definition, peers.compiled(peer), inputs())
