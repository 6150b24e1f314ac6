"""AGCRN's recurrent layer at the sizes of its papers: 307 and 883 nodes, twelve steps, hidden 64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from aufast.nn.adaptive import adaptive_graph_gru
from aufast.reference.agcrn import agcrn
from benchmarks import memory, peers
from benchmarks.harness import PASSES, Case, Run, check, measure, runs

STEPS, WIDTH, INPUTS, ORDER, EMBEDDING = 12, 64, 1, 2, 10


def make(batch: int, nodes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = INPUTS + WIDTH
    shapes = ((batch, STEPS, nodes, INPUTS), (nodes, EMBEDDING), (EMBEDDING, ORDER, rows, 2 * WIDTH))
    shapes += ((EMBEDDING, 2 * WIDTH), (EMBEDDING, ORDER, rows, WIDTH), (EMBEDDING, WIDTH))
    scales = (1, 0.4, 0.1, 0.3, 0.1, 0.3)
    values = (torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, scales, strict=True))
    return tuple(value.to(dtype) for value in values)


def case(batch: int, nodes: int, passes: tuple[str, ...] = PASSES) -> Case:
    rows, dense = batch * STEPS * nodes, ORDER - 1
    mixes = 2 * rows * nodes * dense * (INPUTS + 2 * WIDTH)  # of x, of h, and of z ★ h
    products = 2 * rows * ORDER * (INPUTS + WIDTH) * 3 * WIDTH
    theta = 2 * nodes * EMBEDDING * ORDER * (INPUTS + WIDTH) * 3 * WIDTH
    x, out = rows * INPUTS, rows * WIDTH
    parameters = nodes * EMBEDDING + EMBEDDING * ORDER * (INPUTS + WIDTH) * 3 * WIDTH
    forward = x + parameters + out
    return Case(
        "agcrn",
        f"N{nodes}-B{batch}",
        f"B={batch} T={STEPS} N={nodes} c={WIDTH} K={ORDER} ce={EMBEDDING}",
        functools.partial(make, batch, nodes),
        flops=mixes + products + theta,
        moved=(4 * forward, 4 * (forward + out + out + 2 * (x + parameters))),
        passes=passes,
        kernel="graph_gru",
        fused=adaptive_graph_gru,
        definition=agcrn,
    )


CASES = [case(16, 307), case(1, 307, passes=("fwd",)), case(16, 883)]
PEERS = {"hoisted": peers.agcrn_hoisted, "compiled": peers.compiled(peers.agcrn_hoisted)}
RUNS = runs(CASES, PEERS)
MEMORY_RUNS = [
    run for run in RUNS if (run.case.name, run.mode) == ("N883-B16", "fwd+bwd") and run.provider != "compiled"
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_agcrn(benchmark, run: Run) -> None:
    measure(benchmark, run)


@pytest.mark.parametrize("run", MEMORY_RUNS, ids=str)
def test_training_memory(benchmark, run: Run) -> None:
    check(run)
    memory.measure(benchmark, run, f"agcrn {run.case.name}")
