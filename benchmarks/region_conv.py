"""region_conv in AAR's first region layer: 8×8, 4×4 and 2×2 patches of a 176×176 map, BatchNorm folded."""

from __future__ import annotations

import pytest

from benchmarks.harness import Run, measure, runs
from benchmarks.region_cases import LAYERS, PEERS, case

CASES = [case(grid) for grid in LAYERS]


@pytest.mark.parametrize("run", runs(CASES, PEERS), ids=str)
def test_region_conv(benchmark, run: Run) -> None:
    measure(benchmark, run)
