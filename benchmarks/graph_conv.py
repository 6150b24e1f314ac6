"""graph_conv at AAR's size: 12 AUs, the gates' 192 inputs and 96 outputs; one clip's frames, and sixteen."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Case, Run, measure, runs

NODES, EMBEDDING, INPUTS, OUTPUTS = 12, 8, 192, 96


def make(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, NODES, INPUTS, generator=generator)
    U, Q = torch.randn(2, NODES, EMBEDDING, generator=generator)
    W = torch.randn(EMBEDDING, INPUTS, OUTPUTS, generator=generator) / INPUTS**0.5
    return tuple(t.to(dtype) for t in (x, U, Q, W))


def case(batch: int) -> Case:
    mix = 2 * batch * NODES * NODES * INPUTS
    product = 2 * batch * NODES * INPUTS * OUTPUTS
    theta = 2 * NODES * EMBEDDING * INPUTS * OUTPUTS
    x, out = batch * NODES * INPUTS, batch * NODES * OUTPUTS
    parameters = 2 * NODES * EMBEDDING + EMBEDDING * INPUTS * OUTPUTS
    forward = x + parameters + out
    return Case(
        "graph_conv",
        f"batch{batch}",
        f"batch={batch} m={NODES} {INPUTS}→{OUTPUTS} ce={EMBEDDING}",
        functools.partial(make, batch),
        flops=mix + product + theta,
        moved=(4 * forward, 4 * (forward + out + 2 * (x + parameters))),
        dtypes=(torch.float32, torch.bfloat16),
    )


CASES = [case(48), case(768)]
PEERS = {"hoisted": peers.graph_conv_hoisted, "compiled": peers.compiled(peers.graph_conv_hoisted)}


@pytest.mark.parametrize("run", runs(CASES, PEERS), ids=str)
def test_graph_conv(benchmark, run: Run) -> None:
    measure(benchmark, run)
