"""The emulator itself: it runs right kernels, and says or shows where one is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.emulator.building import ROOT, emulated

ORDERS = range(6)


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    torch.ops.load_library(emulated(ROOT / "tests" / "cuda" / "emulator" / "check.cu"))


def neighbours(mistake: int, order: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setenv("AUFAST_EMULATED_ORDER", str(order))
    out = torch.zeros(3, 64)
    torch.ops.aufast_emulator.neighbours(out, mistake)
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_cluster_read_each_other(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (3 * torch.arange(64.0).roll(1) + 300).expand(3, 64)
    assert torch.equal(neighbours(0, order, monkeypatch), expected)


def test_a_thread_that_misses_a_barrier_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a barrier waits for threads that never come"):
        neighbours(1, 0, monkeypatch)


def test_shared_memory_starts_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    assert neighbours(2, 0, monkeypatch).isnan().all()


@pytest.mark.parametrize(
    "mistake", [3, 4, 5], ids=["read-too-early", "overwritten-too-early", "left-too-early"]
)
def test_a_missing_barrier_gives_other_bits_in_some_order(
    mistake: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = neighbours(0, 0, monkeypatch)
    assert not all(torch.equal(neighbours(mistake, order, monkeypatch), expected) for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_a_cooperative_launch_meets_in_global_memory(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUFAST_EMULATED_ORDER", str(order))
    out = torch.zeros(2)
    torch.ops.aufast_emulator.in_turn(out, 0)
    assert out[0] == 11  # ((0 · 2 + 1) · 2 + 2) · 2 + 3


def test_a_count_that_is_never_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a barrier waits for threads that never come"):
        torch.ops.aufast_emulator.in_turn(torch.zeros(2), 1)
