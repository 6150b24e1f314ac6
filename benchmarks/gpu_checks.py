"""What must hold on a GPU before anything is timed there, as functions that run on any device.

Every check yields lines of what it found. A wrong result raises `Failed`, and a check that cannot be made
here `Skipped` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from aufast import ops
from aufast.ops.backends import can_run
from tests.samples import SAMPLES, TYPICAL, Sample, Tensors, relative_error, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
BEYOND = 2**31


class Failed(AssertionError):
    """A wrong result."""


class Skipped(Exception):
    """A check that cannot be made here."""


def backends_for(sample: Sample, device: str) -> list[str]:
    """Who can compute a sample's operator on this device, beside the reference."""
    names = ("cuda", "triton") if device == "cuda" else ("cpu",)
    empty = torch.empty(0, device=device)
    return [name for name in names if can_run(name, sample.operator, empty) is None]


def on(device: str, sample: Sample, backend: str) -> Callable[[Tensors], tuple[Tensor, ...]]:
    """The public function on a device, called with arguments that are elsewhere."""
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in sample.options.items()}
    there = replace(sample, options=options)

    def call(tensors: Tensors) -> tuple[Tensor, ...]:
        moved = {name: None if t is None else t.to(device) for name, t in tensors.items()}
        return there.public(moved, backend)

    return call


def results(device: str, sample: Sample, backend: str, dtype: torch.dtype) -> Tensors:
    """Outputs and gradients by name, in the CPU's memory, where `run` makes the incoming gradients."""
    call = on(device, sample, backend)
    return run(lambda tensors: tuple(output.cpu() for output in call(tensors)), sample.inputs(dtype))


def _everywhere(device: str, samples: list[Sample]) -> Iterator[tuple[Sample, str]]:
    for sample in samples:
        yield from ((sample, backend) for backend in backends_for(sample, device))


def _demand(right: bool, what: str) -> None:
    if not right:
        raise Failed(what)


def agreement(device: str) -> Iterator[str]:
    """Outputs and gradients of every backend, option and dtype against the float64 definition on the CPU.

    Low precision may be at most twice as far from it as the definition in that dtype.
    """
    worst: dict[tuple[str, str, torch.dtype], float] = {}
    for sample, backend in _everywhere(device, SAMPLES):
        for dtype in DTYPES:
            inputs = sample.inputs(dtype)
            exact = {
                k: None if t is None else t.detach().double().requires_grad_() for k, t in inputs.items()
            }
            truth = run(lambda t, s=sample: s.public(t, "reference"), exact)
            found = results(device, sample, backend, dtype)
            plain = {}
            if dtype not in TOLERANCES:
                plain = run(lambda t, s=sample: s.public(t, "reference"), sample.inputs(dtype))
            for name, value in found.items():
                error = relative_error(value, truth[name])
                limit = TOLERANCES.get(dtype)
                if limit is None:
                    limit = 2 * relative_error(plain[name], truth[name]) + torch.finfo(dtype).eps
                what = f"{sample} {backend} {dtype}: {name} is {error:.1e} off, allowed is {limit:.1e}"
                _demand(error <= limit, what)
                key = sample.operator, backend, dtype
                worst[key] = max(worst.get(key, 0.0), error)
    for (operator, backend, dtype), error in worst.items():
        yield f"{operator} {backend} {str(dtype).removeprefix('torch.')}: at most {error:.1e} off"


def same_bits_again(device: str) -> Iterator[str]:
    """Two calls, the same bits, outputs and gradients."""
    for sample, backend in _everywhere(device, TYPICAL):
        for dtype in DTYPES[:2]:
            first, second = (results(device, sample, backend, dtype) for _ in range(2))
            for name, value in first.items():
                equal = torch.equal(value.nan_to_num(7), second[name].nan_to_num(7))
                _demand(equal, f"{sample} {backend} {dtype}: {name} differs from call to call")
        yield f"{sample.operator} {backend}"


def other_stream(device: str) -> Iterator[str]:
    """On a stream of its own, the same bits; nobody waits for the default stream, which is kept busy."""
    if device != "cuda":
        raise Skipped("streams are a GPU's")
    for sample, backend in _everywhere(device, TYPICAL):
        expected = results(device, sample, backend, torch.float32)
        busy = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            busy = busy @ busy
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = results(device, sample, backend, torch.float32)
        stream.synchronize()
        for name, value in found.items():
            equal = torch.equal(value.nan_to_num(7), expected[name].nan_to_num(7))
            _demand(equal, f"{sample} {backend}: {name} differs on another stream")
        yield f"{sample.operator} {backend}"


def graph_replay(device: str) -> Iterator[str]:
    """Captured forward and backward, replayed on other numbers, give the bits of a plain call."""
    if device != "cuda":
        raise Skipped("CUDA graphs are a GPU's")
    for sample, backend in _everywhere(device, TYPICAL):
        call = on(device, sample, backend)

        def fresh(sample: Sample = sample) -> Tensors:
            inputs = sample.inputs(torch.float32)
            return {
                k: None if t is None else t.detach().to(device).requires_grad_() for k, t in inputs.items()
            }

        inputs = fresh()
        gradients = None

        def step(call: Callable = call, inputs: Tensors = inputs) -> tuple[Tensor, ...]:
            outputs = call(inputs)
            wanted = [t for t in inputs.values() if t is not None]
            return (*outputs, *torch.autograd.grad(outputs[0].float().square().sum(), wanted))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients = step()
        with torch.no_grad():
            for tensor in inputs.values():
                if tensor is not None:
                    tensor.mul_(0.75)
        graph.replay()
        for number, (value, expected) in enumerate(zip(gradients, step(), strict=True)):
            equal = torch.equal(value.nan_to_num(7), expected.nan_to_num(7))
            _demand(equal, f"{sample} {backend}: result {number} of the replay differs")
        yield f"{sample.operator} {backend}"


def _room(device: str, needed: int) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        raise Skipped(f"needs {needed / 2**30:.0f} GiB of free memory on the GPU")


def _large_calls(device: str, elements: int) -> Iterator[tuple]:
    """(operator, call of it on its first argument, that one's shape, its last rows to repeat, error)."""

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).bfloat16()

    box = torch.tensor([3.3, 5.1, 200.7, 90.9], device=device)
    U, W = randn(12, 4), randn(4, 96, 32, scale=0.05)
    gates, weight = randn(3, 4, 192, 96, scale=0.03), randn(2, 2, 8, 16, 3, 3)

    def crop(regions: int, side: int) -> Callable[[Tensor, str], Tensor]:
        return lambda x, name: ops.roi_crop(x, box.expand(len(x), regions, 4), (side, side), backend=name)

    yield "roi_crop", crop(2, 4), (elements // (16 * 256 * 256) + 2, 16, 256, 256), 1, 0.0
    yield "roi_crop", crop(8, 64), (elements // (8 * 16 * 64 * 64) + 2, 16, 16, 16), 1, 0.0
    # A tile of rows may begin elsewhere in the part, so sums may be rounded otherwise.
    yield (
        "graph_conv",
        lambda x, name: ops.graph_conv(x, U, U, W, backend=name),
        (elements // (12 * 96) + 5, 12, 96),
        4096,
        1e-2,
    )
    yield (
        "graph_gru",
        lambda x, name: ops.graph_gru(x, U, U, *gates, backend=name)[0],
        (elements // (2 * 12 * 96) + 5, 2, 12, 96),
        64,
        1e-2,
    )
    yield (
        "region_conv",
        lambda x, name: ops.region_conv(x, weight, backend=name),
        (elements // (16 * 256 * 256) + 2, 16, 256, 256),
        1,
        1e-2,
    )


def beyond_32_bits(device: str, elements: int = BEYOND) -> Iterator[str]:
    """Tensors of more than 2**31 elements: their last rows give what they give alone.

    Args:
        device: where.
        elements: how many a tensor must have at least.
    """
    _room(device, 24 * elements)
    samples = {sample.operator: sample for sample in TYPICAL}
    for operator, call, shape, rows, allowed in _large_calls(device, elements):
        for backend in backends_for(samples[operator], device):
            x = torch.randn(shape, device=device, dtype=torch.bfloat16)
            error = relative_error(call(x, backend)[-rows:], call(x[-rows:].clone(), backend))
            _demand(error <= allowed, f"{operator} {backend}: {error:.1e} off beyond {elements} elements")
            yield f"{operator} {backend}: {x.numel():,} elements in"


CHECKS = {
    check.__name__: check
    for check in (agreement, same_bits_again, other_stream, graph_replay, beyond_32_bits)
}
