"""roi_crop at MARGL's three levels: 24 regions an image, 6×6 crops."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Case, Run, measure, runs

BATCH, REGIONS, SIZE = 16, 24, 6
# Backbone level -> channels, side of the map, side of the initial box around an AU centre.
LEVELS = {"layer2": (128, 24, 10), "layer3": (256, 12, 5), "layer4": (512, 6, 2)}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def boxes(side: int, extent: int) -> Tensor:
    """Boxes (B, R, 4) around random centres, sides scaled by up to ±20 % as an adaptive ROI's are.

    Where a sample falls exactly between two cells the gradient of a box jumps, and rounding decides which
    side a provider sees. So no sample lies within 1e-3 pixels of such a place.
    """
    generator = torch.Generator().manual_seed(2)
    offsets = (torch.arange(SIZE, dtype=torch.float64) + 0.5) / SIZE

    def interval() -> Tensor:
        while True:
            centre, scale = torch.rand(2, BATCH * REGIONS, 64, generator=generator, dtype=torch.float64)
            length = extent * (0.8 + 0.4 * scale)
            start = (centre * side - length / 2).float().double()
            stop = (start + length).float().double()
            samples = start[..., None] + offsets * (stop - start)[..., None] - 0.5  # (B*R, 64, SIZE)
            clear = ((samples - samples.round()).abs() > 1e-3).all(-1)  # (B*R, 64)
            if clear.any(1).all():
                pick = clear.int().argmax(1, keepdim=True)
                return torch.cat([start.gather(1, pick), stop.gather(1, pick)], dim=1).float()  # (B*R, 2)

    x, y = interval(), interval()
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1).view(BATCH, REGIONS, 4)


def make(level: str, layout: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    channels, side, extent = LEVELS[level]
    features = torch.randn(BATCH, channels, side, side, generator=torch.Generator().manual_seed(0))
    return features.to(dtype, memory_format=FORMATS[layout]), boxes(side, extent)


def case(level: str, layout: str) -> Case:
    channels, side, _ = LEVELS[level]
    crops = BATCH * REGIONS * channels * SIZE * SIZE
    features = BATCH * channels * side * side
    rois = BATCH * REGIONS * 4
    forward = features + rois + crops
    # The backward reads the features again, and the crops' gradient, and writes its own.
    both = forward + features + rois + crops + features + rois
    return Case(
        "roi_crop",
        f"{level}-{layout}",
        f"B={BATCH} R={REGIONS} C={channels} H=W={side} {layout}",
        functools.partial(make, level, layout),
        flops=9 * crops,  # two horizontal blends and a vertical one, a + t·(b - a) each
        moved=(4 * forward, 4 * both),
    )


CASES = [case(level, layout) for level in LEVELS for layout in FORMATS]
PEERS = {"stn": peers.roi_crop_stn, "merged": peers.roi_crop_merged}


@pytest.mark.parametrize("run", runs(CASES, PEERS), ids=str)
def test_roi_crop(benchmark, run: Run) -> None:
    measure(benchmark, run)
