"""The check before the clock: a wrong result is never timed."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from aufast import reference
from benchmarks import agcrn, graph_conv, graph_gru, region_conv, roi_crop
from benchmarks.bars import BARS
from benchmarks.harness import Case, Run, WrongResultError, measure, runs


def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 5, 7), (5, 4), (5, 4), (4, 7, 6)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


CASE = Case("graph_conv", "tiny", "N=3 m=5", make, flops=1000, moved=(400, 1200))


class Clock:
    """Stands where pytest-benchmark's fixture stands and remembers whether it was started."""

    def __init__(self):
        self.extra_info: dict = {}
        self.group = ""
        self.timed = 0

    def pedantic(self, call, rounds: int) -> None:
        call()
        self.timed += rounds


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 1.001 * grad


def scaled(*inputs: Tensor) -> Tensor:
    return 1.001 * reference.graph_conv(*inputs)


def not_finite(*inputs: Tensor) -> Tensor:
    return reference.graph_conv(*inputs) + torch.nan


def transposed(*inputs: Tensor) -> Tensor:
    return reference.graph_conv(*inputs).mT


def wrong_gradient(x: Tensor, *rest: Tensor) -> Tensor:
    return reference.graph_conv(WrongGradient.apply(x), *rest)


@pytest.mark.parametrize("wrong", [scaled, not_finite, transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_a_wrong_output_is_not_timed(wrong, mode: str) -> None:
    clock = Clock()
    with pytest.raises(WrongResultError, match="output 0"):
        measure(clock, Run(CASE, mode, torch.float32, "wrong", wrong))
    assert clock.timed == 0


def test_a_wrong_gradient_is_not_timed() -> None:
    clock = Clock()
    with pytest.raises(WrongResultError, match="gradient 0"):
        measure(clock, Run(CASE, "fwd+bwd", torch.float32, "wrong", wrong_gradient))
    assert clock.timed == 0


def test_bfloat16_may_be_twice_as_far_as_the_reference_and_no_farther() -> None:
    def noisy(scale: float, *inputs: Tensor) -> Tensor:
        out = reference.graph_conv(*inputs)
        return (out.float() * (1 + scale)).to(out.dtype)

    clock = Clock()
    measure(clock, Run(CASE, "fwd", torch.bfloat16, "close", functools.partial(noisy, 1e-3)))
    assert clock.timed
    clock = Clock()
    with pytest.raises(WrongResultError):
        measure(clock, Run(CASE, "fwd", torch.bfloat16, "far", functools.partial(noisy, 3e-2)))
    assert clock.timed == 0


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_a_right_result_is_timed_with_its_facts(mode: str) -> None:
    clock = Clock()
    measure(clock, Run(CASE, mode, torch.float32, "reference", reference.graph_conv))
    assert clock.timed >= 7
    assert clock.extra_info == {
        "operator": "graph_conv",
        "case": "tiny",
        "shape": "N=3 m=5",
        "pass": mode,
        "dtype": "float32",
        "provider": "reference",
        "flops": {"fwd": 1000, "fwd+bwd": 3000}[mode],
        "bytes": {"fwd": 400, "fwd+bwd": 1200}[mode],
    }


def test_every_operators_bar_is_about_runs_that_exist() -> None:
    found = [
        *runs(roi_crop.CASES, roi_crop.PEERS),
        *runs(graph_conv.CASES, graph_conv.PEERS),
        *graph_gru.RUNS,
        *runs(region_conv.CASES, region_conv.PEERS),
        *agcrn.RUNS,
    ]
    names = {(run.case.operator, str(run)) for run in found}
    memory = {
        (run.case.operator, f"{run.case.name}-memory-float32-{run.provider}")
        for run in (*graph_gru.MEMORY_RUNS, *agcrn.MEMORY_RUNS)
    }
    operators = {operator for operator, _ in names}
    models = {"aar", "margl"}  # test_models.py is about theirs
    assert {bar.operator for bar in BARS["cpu"]} == operators | models
    for bar in BARS["cpu"]:
        if bar.operator not in operators:
            continue
        dtype, provider = bar.dtype, bar.against
        if bar.against in ("fma", "float32"):
            dtype, provider = "float32" if bar.against == "float32" else bar.dtype, "reference"
        assert (bar.operator, f"{bar.case}-{bar.mode}-{dtype}-{provider}") in names | memory, bar
        assert (bar.operator, f"{bar.case}-{bar.mode}-{bar.dtype}-reference") in names | memory, bar
