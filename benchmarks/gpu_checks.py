"""What must hold on a GPU before anything is timed there, as functions that run on any device.

Every check yields lines of what it found. A wrong result raises `Failed`, and a check that cannot be made
here `Skipped` with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from aufast import ops
from aufast.ops.backends import can_run
from benchmarks import gpu_cases, harness
from tests.samples import SAMPLES, TYPICAL, Sample, Tensors, relative_error, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
BACKENDS = ("cuda", "triton", "cpu")
BEYOND = 2**31
ASLEEP = 3 * 10**9  # cycles, more than a second


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


def papers_sizes(device: str, made: dict[str, Callable] | None = None) -> Iterator[str]:
    """The cases that are timed, in three dtypes, against the float64 definition, as before a timing.

    Args:
        device: where.
        made: operator -> its cases for a device; None for those of `gpu_cases`.
    """
    for make in (made or gpu_cases.CASES).values():
        for case in make(device):
            case = replace(case, dtypes=DTYPES[:3], passes=("fwd", "fwd+bwd"))
            ours = [each for each in gpu_cases.runs([case], device) if each.provider in BACKENDS]
            for each in ours:
                try:
                    harness.check(each)
                except harness.WrongResultError as error:
                    raise Failed(str(error)) from error
            yield from (f"{case.operator} {case.name} {name}" for name in sorted({r.provider for r in ours}))


def tf32(device: str) -> Iterator[str]:
    """Where PyTorch may use TF32, graph products are near the definition as TF32 is, and not as float32."""
    if device != "cuda":
        raise Skipped("TF32 is a GPU's")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for case in (
            gpu_cases.graph_conv_cases(device, (48,))[0],
            gpu_cases.graph_gru_cases(device, (16,))[0],
        ):
            exact = harness.truth(case, "fwd+bwd", torch.float32)
            for run in gpu_cases.runs([replace(case, dtypes=DTYPES[:1], passes=("fwd+bwd",))], device):
                if run.provider in gpu_cases.BACKENDS:
                    found = harness.compute(run.function, case.make(torch.float32), run.mode)
                    errors = {name: harness.distance(found[name], value) for name, value in exact.items()}
                    worst = max(errors.values())
                    _demand(worst < 1e-2, f"{case.operator} {run.provider}: {worst:.1e} off with TF32")
                    _demand(
                        errors["output 0"] > 1e-5,
                        f"{case.operator} {run.provider}: TF32 is allowed and not used",
                    )
                    yield f"{case.operator} {run.provider}: at most {worst:.1e} off"
    finally:
        torch.set_float32_matmul_precision(before)


def same_bits_again(device: str) -> Iterator[str]:
    """Two calls, the same bits, outputs and gradients."""
    for sample, backend in _everywhere(device, TYPICAL):
        for dtype in DTYPES[:2]:
            first, second = (results(device, sample, backend, dtype) for _ in range(2))
            for name, value in first.items():
                equal = torch.equal(value.nan_to_num(7), second[name].nan_to_num(7))
                _demand(equal, f"{sample} {backend} {dtype}: {name} differs from call to call")
        yield f"{sample.operator} {backend}"


def same_bits_at_size(device: str, made: list[harness.Case] | None = None) -> Iterator[str]:
    """Two calls at the largest sizes that are timed, the same bits, outputs and gradients.

    Args:
        device: where.
        made: cases; None for those of `roi_crop` and the largest of `graph_gru`.
    """
    sizes = gpu_cases.roi_crop_cases(device) + gpu_cases.graph_gru_cases(device, (256,))
    for case in sizes if made is None else made:
        for each in gpu_cases.runs([replace(case, passes=("fwd+bwd",))], device):
            if each.provider not in BACKENDS:
                continue
            first, second = (
                harness.compute(each.function, case.make(each.dtype), each.mode) for _ in range(2)
            )
            for name, value in first.items():
                equal = torch.equal(value, second[name])
                _demand(equal, f"{case.operator} {each}: {name} differs from call to call")
            yield f"{case.operator} {each}"


@contextmanager
def poisoned() -> Iterator[None]:
    """NaN in all memory that PyTorch hands out and nobody has written yet."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextmanager
def beside_a_busy_stream(stream: torch.cuda.Stream) -> Iterator[Callable[[], bool]]:
    """Work inside goes to `stream` while the default one sleeps; the value tells whether it still does."""
    torch.cuda.synchronize()
    torch.cuda._sleep(ASLEEP)
    with torch.cuda.stream(stream):
        yield lambda: not torch.cuda.default_stream().query()
    torch.cuda.synchronize()


def other_stream(device: str) -> Iterator[str]:
    """On a stream of its own, the same bits, while the default stream is kept asleep.

    What would be launched on the default stream is not there yet when its result is read: its memory is NaN.
    """
    if device != "cuda":
        raise Skipped("streams are a GPU's")
    for sample, backend in _everywhere(device, TYPICAL):
        expected = results(device, sample, backend, torch.float32)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # its memory and its libraries' handles are made, which waits
            results(device, sample, backend, torch.float32)
        with poisoned(), beside_a_busy_stream(stream) as still_busy:
            found = results(device, sample, backend, torch.float32)
            _demand(
                still_busy(),
                f"{sample} {backend}: it waited for the default stream, or that one woke too early",
            )
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
    """(operator, call, its first argument's shape, more by row, the others, last rows, error, bytes)."""

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).bfloat16()

    box = torch.tensor([3.3, 5.1, 200.7, 90.9], device=device)
    U, W = randn(12, 4), randn(4, 96, 32, scale=0.05)
    gates, weight = randn(3, 4, 192, 96, scale=0.03).unbind(), randn(2, 2, 8, 16, 3, 3)

    def crop(side: int) -> Callable[..., Tensor]:
        return lambda x, rois, backend: ops.roi_crop(x, rois, (side, side), backend=backend)

    for regions, side, size in ((2, 4, 256), (8, 64, 16)):
        images = elements // (16 * max(size * size, regions * side * side)) + 2
        rois = box.expand(images, regions, 4)
        yield "roi_crop", crop(side), (images, 16, size, size), (rois,), (), 1, 1e-2, 16 * elements
    # A tile of rows may begin elsewhere in the part, so sums may be rounded otherwise.
    yield (
        "graph_conv",
        lambda x, U, W, backend: ops.graph_conv(x, U, U, W, backend=backend),
        (elements // (12 * 96) + 5, 12, 96),
        (),
        (U, W),
        4096,
        1e-2,
        24 * elements,
    )
    yield (
        "region_conv",
        lambda x, weight, backend: ops.region_conv(x, weight, backend=backend),
        (elements // (16 * 256 * 256) + 2, 16, 256, 256),
        (),
        (weight,),
        1,
        1e-2,
        16 * elements,
    )
    yield (
        "graph_gru",
        lambda x, U, *gates, backend: ops.graph_gru(x, U, U, *gates, backend=backend)[0],
        (elements // (2 * 12 * 96) + 5, 2, 12, 96),
        (),
        (U, *gates),
        64,
        1e-2,
        32 * elements,
    )


def _last_rows(call: Callable, by_row: list[Tensor], others: tuple[Tensor, ...], rows: int) -> Tensors:
    """The output's last rows, and the gradients where they alone have one: what comes before has none."""
    leaves = [t.detach().requires_grad_() for t in (*by_row, *others)]
    out = call(*leaves)
    grad = torch.zeros_like(out)
    values = torch.randn(grad[-rows:].shape, generator=torch.Generator().manual_seed(1))
    grad[-rows:] = values.to(grad)
    found = {"output": out[-rows:].detach().clone()}
    for k, gradient in enumerate(torch.autograd.grad(out, leaves, grad)):
        if k < len(by_row):
            nothing = torch.count_nonzero(gradient[:-rows]) == 0
            _demand(bool(nothing), f"gradient {k} is not zero where none came in")
            gradient = gradient[-rows:].clone()
        found[f"gradient {k}"] = gradient
    return found


def beyond_32_bits(device: str, elements: int = BEYOND) -> Iterator[str]:
    """Tensors of more than 2**31 elements: their last rows give what they give alone, forward and backward.

    Args:
        device: where.
        elements: how many a tensor must have at least.
    """
    samples = {sample.operator: sample for sample in TYPICAL}
    for operator, call, shape, by_row, others, rows, allowed, needed in _large_calls(device, elements):
        for backend in backends_for(samples[operator], device):
            _room(device, needed)
            every = [torch.randn(shape, device=device, dtype=torch.bfloat16), *by_row]
            last = [t[-rows:].clone() for t in every]

            def on_backend(*tensors: Tensor, call: Callable = call, backend: str = backend) -> Tensor:
                return call(*tensors, backend=backend)

            found, alone = (_last_rows(on_backend, given, others, rows) for given in (every, last))
            for name, value in found.items():
                error = relative_error(value, alone[name])
                what = f"{operator} {backend}: {name} is {error:.1e} off beyond {elements} elements"
                _demand(error <= allowed, what)
            yield f"{operator} {backend}: {every[0].numel():,} elements in"
            del every, last, found, alone  # before the next are made


CHECKS = {
    check.__name__: check
    for check in (
        agreement,
        papers_sizes,
        tf32,
        same_bits_again,
        same_bits_at_size,
        other_stream,
        graph_replay,
        beyond_32_bits,
    )
}
