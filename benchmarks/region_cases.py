"""AAR's first region layer at the paper's sizes, for the CPU's benchmark and for the GPU's."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Case

BATCH, SIDE = 4, 176
# Patches a side -> channels in and out.
LAYERS = {8: (32, 16), 4: (16, 8), 2: (8, 8)}


def make(grid: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    cin, cout = LAYERS[grid]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, weight = randn(batch, cin, SIDE, SIDE), randn(grid, grid, cout, cin, 3, 3) / (9 * cin) ** 0.5
    bias, scale, shift = (
        randn(grid, grid, cout),
        1 + 0.1 * randn(grid, grid, cin),
        0.1 * randn(grid, grid, cin),
    )
    return tuple(t.to(dtype) for t in (x, weight, bias, scale, shift))


def case(grid: int, batch: int = BATCH) -> Case:
    cin, cout = LAYERS[grid]
    pixels = batch * SIDE * SIDE
    parameters = grid * grid * (9 * cin * cout + cout + 2 * cin)
    forward = pixels * (cin + cout) + parameters
    return Case(
        "region_conv",
        f"{grid}x{grid}",
        f"B={batch} {grid}×{grid} patches {SIDE}² {cin}→{cout}",
        functools.partial(make, grid, batch),
        flops=2 * pixels * 9 * cin * cout,
        moved=(4 * forward, 4 * (forward + pixels * (2 * cin + cout) + 2 * parameters)),
    )


PEERS = {"loop": peers.region_conv_loop, "grouped": peers.region_conv_grouped}
