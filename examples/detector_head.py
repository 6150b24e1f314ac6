"""A detector's second stage with boxes that learn: proposals move toward the object by gradient alone.

The maps are generated: one bright blob each, and a proposal beside it. A head scores each crop; its
gradient with respect to the proposal, which `roi_align` does not have, moves the box onto the blob. Run it
with `python examples/detector_head.py`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from aufast.ops import roi_align_crop

SIDE = 16


def generated_maps(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps (count, 1, SIDE, SIDE) and the blobs' centres (count, 2) as x, y."""
    centers = 4 + 8 * torch.rand(count, 2, generator=generator)
    axis = torch.arange(SIDE) + 0.5
    squares = [(axis - centers[:, k, None]) ** 2 for k in range(2)]
    return torch.exp(-(squares[1][:, None, :, None] + squares[0][:, None, None, :]) / 8), centers


class Head(nn.Module):
    """Offsets of a proposal's corners, learned for all proposals, and a score for each crop."""

    def __init__(self, proposals: Tensor):
        super().__init__()
        self.boxes = nn.Parameter(proposals)  # (L, 5)
        self.window = nn.Parameter(torch.ones(1, 5, 5) / 25, requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        boxes = torch.cat([self.boxes[:, :1].detach(), self.boxes[:, 1:]], dim=1)
        crops = roi_align_crop(features, boxes, 5)  # (L, C, 5, 5)
        return (crops * self.window).sum((1, 2, 3))


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=120)
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(0)
    maps, centers = generated_maps(8, generator)
    start = centers + torch.tensor([1.5, -1.5])
    proposals = torch.cat([torch.arange(8.0)[:, None], start - 2, start + 2], dim=1)
    head = Head(proposals)
    optimiser = torch.optim.Adam([head.boxes], lr=0.05)

    def distance() -> float:
        middle = (head.boxes[:, 1:3] + head.boxes[:, 3:]).detach() / 2
        return (middle - centers).norm(dim=1).mean().item()

    before = distance()
    for _ in range(options.iterations):
        optimiser.zero_grad()
        (-head(maps).sum()).backward()
        optimiser.step()
    print(f"boxes' distance from the generated blobs: {before:.2f} pixels before, {distance():.2f} after")
    return before, distance()


if __name__ == "__main__":
    main()
