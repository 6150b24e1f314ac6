"""graph_gru's C++ kernels on graphs of many nodes, whose frames are mixed whole, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import aufast
from aufast import reference

pytestmark = [
    pytest.mark.skipif(
        "graph_gru" not in aufast.backends()["cpu"], reason=f"CPU kernels: {aufast.backends()['cpu']}"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
# batch, steps, nodes, c_in, c, ce, order, normalization
SIZES = {
    "first-layer": (3, 5, 61, 1, 20, 4, 2, "softmax"),
    "second-layer": (2, 4, 130, 32, 64, 3, 2, "softmax"),
    "one-sequence": (1, 3, 200, 2, 16, 5, 3, "softmax"),
    "identity-alone": (2, 3, 48, 16, 5, 2, 1, "softmax"),
    "global": (2, 3, 53, 3, 33, 4, 1, "global"),
    "several-chunks": (24, 3, 2000, 1, 3, 2, 2, "softmax"),
    "no-inputs": (2, 3, 50, 0, 7, 2, 2, "softmax"),
    "no-steps": (2, 0, 50, 2, 7, 2, 2, "softmax"),
    "no-sequences": (0, 3, 50, 2, 7, 2, 2, "softmax"),
}


def make(size: str, dtype: torch.dtype) -> tuple[list[Tensor], str]:
    batch, steps, m, cin, c, ce, order, normalization = SIZES[size]
    generator = torch.Generator().manual_seed(1)
    K = (order,) if normalization == "softmax" else ()
    shapes = [(batch, steps, m, cin), (m, ce), (m, ce), *[(ce, *K, c + cin, c)] * 3, (batch, m, c)]
    scales = [1, 0.4, 0.4, 0.15, 0.15, 0.15, 1, 0.5, 0.5, 0.5]
    values = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for shape, scale in zip(shapes + [(ce, c)] * 3, scales, strict=True)
    ]
    return values, normalization


def outputs_and_gradients(inputs: list[Tensor], normalization: str, backend: str, **options) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    *positional, b_z, b_r, b_h = leaves
    options |= {"biases": (b_z, b_r, b_h), "normalization": normalization}
    if backend == "reference":
        out, last = reference.graph_gru(*positional, **options)
    else:
        out, last = aufast.ops.graph_gru(*positional, backend=backend, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    total = (out * weight).sum() + last.square().sum()
    return [out, last, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def assert_close(found: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for value, exact in zip(found, truth, strict=True):
        assert value.shape == exact.shape
        floor = 1e-6 * exact.numel() ** 0.5
        assert (value.double() - exact).norm() <= tolerance * max(float(exact.norm()), floor)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference(size: str, dtype: torch.dtype) -> None:
    inputs, normalization = make(size, dtype)
    truth = outputs_and_gradients([value.double() for value in inputs], normalization, "reference")
    assert_close(outputs_and_gradients(inputs, normalization, "cpu"), truth, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", ["first-layer", "one-sequence", "identity-alone", "global", "no-steps"])
def test_a_first_state_of_zeros_needs_no_memory(size: str, dtype: torch.dtype) -> None:
    """Nothing is computed of it, in either direction, and the poisoned memory for its φ is never read."""
    inputs, normalization = make(size, dtype)
    zeros = [*inputs[:6], torch.zeros_like(inputs[6]), *inputs[7:]]
    truth = outputs_and_gradients([value.double() for value in zeros], normalization, "reference")
    leaves = [value.clone().requires_grad_() for value in inputs[:6] + inputs[7:]]
    *positional, b_z, b_r, b_h = leaves
    out, last = aufast.ops.graph_gru(
        *positional, biases=(b_z, b_r, b_h), normalization=normalization, backend="cpu"
    )
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    total = (out * weight).sum() + last.square().sum()
    found = [out, last, *torch.autograd.grad(total, leaves, materialize_grads=True)]
    assert_close(found, truth[:8] + truth[9:], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", ["first-layer", "one-sequence", "identity-alone", "global", "no-steps"])
def test_what_is_kept_has_the_shape_that_tracing_expects(size: str, dtype: torch.dtype) -> None:
    inputs, normalization = make(size, dtype)
    inputs[6] = inputs[6].to(dtype if dtype == torch.float64 else torch.float32)
    arguments = (*inputs, None, normalization == "softmax", True)
    real = torch.ops.aufast.graph_gru(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        expected = torch.ops.aufast.graph_gru(*fakes)
    assert [(a.shape, a.dtype) for a in real] == [(a.shape, a.dtype) for a in expected]


@pytest.mark.parametrize("size", ["first-layer", "global"])
def test_lengths_end_each_sequence_and_nothing_behind_is_read(size: str) -> None:
    inputs, normalization = make(size, torch.float64)
    lengths = torch.tensor([2, 0, 9][: len(inputs[0])])
    truth = outputs_and_gradients(inputs, normalization, "reference", lengths=lengths)
    for b, length in enumerate(lengths):
        inputs[0][b, length:] = torch.nan
    found = outputs_and_gradients(inputs, normalization, "cpu", lengths=lengths)
    assert_close(found, truth, 1e-12)


@pytest.mark.parametrize("size", ["first-layer", "one-sequence", "several-chunks"])
def test_the_same_bits_with_any_number_of_threads(size: str) -> None:
    inputs, normalization = make(size, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(inputs, normalization, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", ["first-layer", "second-layer", "one-sequence"])
def test_low_precision_is_as_near_as_the_reference_in_it(size: str, dtype: torch.dtype) -> None:
    inputs, normalization = make(size, dtype)
    inputs[6] = inputs[6].float()
    truth = outputs_and_gradients([value.double() for value in inputs], normalization, "reference")
    plain = outputs_and_gradients(inputs, normalization, "reference")
    found = outputs_and_gradients(inputs, normalization, "cpu")
    for value, coarse, exact in zip(found, plain, truth, strict=True):
        assert (value.double() - exact).norm() <= 2 * (coarse.double() - exact).norm()
