"""What one timed run is: its inputs, who computes, the check that comes first, and the clock."""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from aufast import ops, reference
from aufast.ops.backends import can_run
from benchmarks.bars import BACKENDS

THREADS = min(2, len(os.sched_getaffinity(0)))
PASSES = ("fwd", "fwd+bwd")
# Relative RMS distance from the float64 reference on the same inputs, outputs and gradients alike. Low
# precision has no such number: it may be at most twice as far as the reference itself is in that dtype.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
SECONDS = 0.6  # of timed rounds for each run
ROUNDS = (7, 500)
WARM_UP = 0.15  # seconds


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        operator: its name in `aufast.ops`.
        name: short, unique within the operator; the bars go by it.
        shape: sizes for people.
        make: seed and dtype -> the operator's positional tensors, all of them differentiable.
        flops: of the forward pass without any wasted operation; the backward needs twice as many.
        moved: bytes that must be read and written, of forward and of forward + backward, in float32.
        passes: which to time.
        dtypes: for the reference and the backends; peers run in float32.
        kernel: the operator that computes it, where `operator` is a layer around one.
        fused: the layer's function, taking `backend=`; None for `aufast.ops`' own.
        definition: what it must equal; None for `aufast.reference`'s own.
    """

    operator: str
    name: str
    shape: str
    make: Callable[[torch.dtype], tuple[Tensor, ...]]
    flops: int
    moved: tuple[int, int]
    passes: tuple[str, ...] = PASSES
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    kernel: str | None = None
    fused: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    definition: Callable[..., Tensor | tuple[Tensor, ...]] | None = None

    @property
    def plain(self) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """The definition."""
        return self.definition or getattr(reference, self.operator)


@dataclass(frozen=True)
class Run:
    """One case, one pass, one dtype, one provider: one line of the results."""

    case: Case
    mode: str
    dtype: torch.dtype
    provider: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]

    def __str__(self) -> str:
        return f"{self.case.name}-{self.mode}-{dtype_name(self.dtype)}-{self.provider}"

    def facts(self) -> dict[str, str | int]:
        """What the table needs to know beside the time."""
        forward, both = self.case.moved
        return {
            "operator": self.case.operator,
            "case": self.case.name,
            "shape": self.case.shape,
            "pass": self.mode,
            "dtype": dtype_name(self.dtype),
            "provider": self.provider,
            "flops": self.case.flops * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[self.mode],
            "bytes": {"fwd": forward, "bwd": both - forward, "fwd+bwd": both}[self.mode]
            * self.dtype.itemsize
            // 4,
        }


class WrongResultError(AssertionError):
    """A provider that does not compute the operator; it is not timed."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compiler() -> str | None:
    """The system's C++ compiler, which the ceilings and torch.compile need."""
    return next(
        filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None
    )


def runs(
    cases: Iterable[Case], peers: dict[str, Callable], only: Callable[[Run], bool] = lambda run: True
) -> list[Run]:
    """Every run of these cases, the providers of one comparison next to each other.

    Args:
        cases: sizes of one operator.
        peers: name -> function, in float32.
        only: keeps a run, where not everything can be timed.
    """
    found = []
    for case in cases:
        ours = case.fused or getattr(ops, case.operator)
        kernel = case.kernel or case.operator
        backends = [b for b in BACKENDS["cpu"] if can_run(b, kernel, torch.empty(0)) is None]
        fused = {name: functools.partial(ours, backend=name) for name in backends}
        definition = {"reference": case.plain}
        for mode in case.passes:
            for dtype in case.dtypes:
                providers = definition | (peers if dtype == torch.float32 else {}) | fused
                found += [Run(case, mode, dtype, name, function) for name, function in providers.items()]
    return [run for run in found if only(run)]


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output that carries the gradient; a graph-GRU's last state is a by-product."""
    return output if isinstance(output, Tensor) else output[0]


def incoming(output: Tensor) -> Tensor:
    """The gradient that arrives at an output: the same numbers for every provider, in the output's layout."""
    generator = torch.Generator(output.device).manual_seed(1)
    values = torch.randn(output.shape, generator=generator, device=output.device).bfloat16()
    return torch.empty_like(output).copy_(values)


def compute(function: Callable, inputs: tuple[Tensor, ...], mode: str) -> dict[str, Tensor]:
    """Outputs by name, and gradients of all inputs where the pass has a backward."""
    if mode == "fwd":
        with torch.no_grad():
            output = function(*inputs)
        outputs = (output,) if isinstance(output, Tensor) else output
        return {f"output {k}": value for k, value in enumerate(outputs)}
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    output = function(*inputs)
    outputs = (output,) if isinstance(output, Tensor) else output
    gradients = torch.autograd.grad(outputs[0], inputs, incoming(outputs[0]))
    named = {f"output {k}": value.detach() for k, value in enumerate(outputs)}
    return named | {f"gradient {k}": value for k, value in enumerate(gradients)}


@functools.lru_cache(maxsize=1)  # the providers of one comparison come one after the other
def truth(case: Case, mode: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference in float64 on the inputs as this dtype holds them."""
    inputs = tuple(t.double() for t in case.make(dtype))
    return compute(case.plain, inputs, mode)


def distance(result: Tensor, exact: Tensor) -> float:
    """Relative RMS error; infinite for a result that is not finite or of another shape."""
    if result.shape != exact.shape or not result.isfinite().all():
        return float("inf")
    return float((result.double() - exact).norm() / exact.norm())


@functools.lru_cache(maxsize=1)
def allowed(case: Case, mode: str, dtype: torch.dtype) -> dict[str, float]:
    """The distance that each result may have."""
    exact = truth(case, mode, dtype)
    if dtype in TOLERANCES:
        return dict.fromkeys(exact, TOLERANCES[dtype])
    plain = compute(case.plain, case.make(dtype), mode)
    return {name: 2 * distance(plain[name], value) for name, value in exact.items()}


def check(run: Run) -> None:
    """Compare everything that the run computes with the float64 reference.

    Raises:
        WrongResultError: naming the provider, the first wrong result and its distance.
    """
    exact = truth(run.case, run.mode, run.dtype)
    limits = allowed(run.case, run.mode, run.dtype)
    results = compute(run.function, run.case.make(run.dtype), run.mode)
    for name, value in exact.items():
        error = distance(results[name], value)
        if not error <= limits[name]:  # a NaN is wrong too
            raise WrongResultError(
                f"{run.case.operator} {run}: {name} is {error:.1e} (relative RMS) from the float64 reference,"
                f" allowed is {limits[name]:.1e}; not timed"
            )


def work(run: Run) -> Callable[[], object]:
    """The thing that is timed: a call, its backward, or both; inputs and gradient are ready."""
    inputs = run.case.make(run.dtype)
    if run.mode == "fwd":
        return torch.no_grad()(functools.partial(run.function, *inputs))
    inputs = tuple(t.requires_grad_() for t in inputs)
    output = first(run.function(*inputs))
    gradient = incoming(output.detach())
    if run.mode == "bwd":
        return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)
    return lambda: torch.autograd.grad(first(run.function(*inputs)), inputs, gradient)


def measure(benchmark, run: Run) -> None:
    """Check a run, then time it."""
    benchmark.group = f"{run.case.operator} {run.case.name} {run.mode} {dtype_name(run.dtype)}"
    benchmark.extra_info |= run.facts()
    check(run)
    timed(benchmark, work(run), SECONDS, ROUNDS)


def timed(benchmark, call: Callable[[], object], seconds: float, rounds: tuple[int, int]) -> None:
    """Time a call; rounds are as many as fit into `seconds`, within the fewest and the most of `rounds`."""
    calls, start = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - start < WARM_UP:
        call()
        calls += 1
    each = (time.perf_counter() - start) / calls
    fewest, most = rounds
    benchmark.pedantic(call, rounds=int(min(max(seconds / each, fewest), most)))
