"""graph_gru at AAR's size: 48 frames, 12 AUs, 96 channels; one clip, a training batch, a large one."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks import memory, peers
from benchmarks.harness import PASSES, Case, Run, check, measure, runs

STEPS, NODES, WIDTH, EMBEDDING = 48, 12, 96, 8


def make(batch: int, dtype: torch.dtype, steps: int = STEPS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, steps, NODES, WIDTH, generator=generator)
    U, Q = torch.randn(2, NODES, EMBEDDING, generator=generator)
    shape = (3, EMBEDDING, 2 * WIDTH, WIDTH)
    gates = torch.randn(shape, generator=generator) / (2 * WIDTH * EMBEDDING) ** 0.5
    return tuple(t.to(dtype) for t in (x, U, Q, *gates))


def case(batch: int, passes: tuple[str, ...] = PASSES, low: bool = True) -> Case:
    mixes = 2 * batch * STEPS * NODES * NODES * (WIDTH + 2 * WIDTH)  # of x, of h, and of r ★ h
    products = 2 * batch * STEPS * NODES * (2 * WIDTH) * (3 * WIDTH)
    theta = 2 * NODES * EMBEDDING * (2 * WIDTH) * (3 * WIDTH)
    x = out = batch * STEPS * NODES * WIDTH
    parameters = 2 * NODES * EMBEDDING + EMBEDDING * (2 * WIDTH) * (3 * WIDTH)
    forward = x + parameters + out
    return Case(
        "graph_gru",
        f"B{batch}",
        f"B={batch} T={STEPS} m={NODES} c={WIDTH} ce={EMBEDDING}",
        functools.partial(make, batch),
        flops=mixes + products + theta,
        moved=(4 * forward, 4 * (forward + out + out + 2 * (x + parameters))),
        passes=passes,
        dtypes=(torch.float32, torch.bfloat16) if low else (torch.float32,),
    )


CASES = [case(1, low=False), case(8), case(32, passes=("fwd",))]
PEERS = {"hoisted": peers.graph_gru_hoisted, "compiled": peers.compiled(peers.graph_gru_hoisted)}
# torch.compile unrolls the 48 steps: half a minute for each of these, so not every size.
COMPILED = {("B1", "fwd"), ("B1", "fwd+bwd"), ("B8", "fwd")}
RUNS = runs(CASES, PEERS, lambda run: run.provider != "compiled" or (run.case.name, run.mode) in COMPILED)
MEMORY_RUNS = [
    run
    for run in RUNS
    if (run.case.name, run.mode, run.dtype) == ("B8", "fwd+bwd", torch.float32) and run.provider != "compiled"
]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_graph_gru(benchmark, run: Run) -> None:
    measure(benchmark, run)


@pytest.mark.parametrize("run", MEMORY_RUNS, ids=str)
def test_training_memory(benchmark, run: Run) -> None:
    check(run)
    memory.measure(benchmark, run, f"graph_gru {run.case.name}")
