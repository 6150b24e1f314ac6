"""The C++ kernels of graph_conv and graph_gru against the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import aufast
from aufast import reference

pytestmark = [
    pytest.mark.skipif(
        "graph_gru" not in aufast.backends()["cpu"], reason=f"CPU kernels: {aufast.backends()['cpu']}"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
]

NORMALIZATIONS = ("global", "softmax")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    before = torch.get_num_threads()
    yield 1, 2, 3, 7
    torch.set_num_threads(before)


def relative(value: Tensor, truth: Tensor, floor: float = 1e-6) -> float:
    """Relative RMS error; a truth of (nearly) zero is compared with `floor` instead."""
    assert value.shape == truth.shape
    value, truth = value.detach(), truth.detach()
    if truth.numel() == 0:
        return 0.0
    return float((value.double() - truth).norm() / truth.norm().clamp(min=floor * truth.numel() ** 0.5))


def random_tensors(
    *shapes: tuple[int, ...] | None, scales: tuple[float, ...], dtype: torch.dtype
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    return [
        None
        if shape is None
        else (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def present(values: list | tuple) -> list:
    return [value for value in values if value is not None]


def needs_of(inputs: list[Tensor | None]) -> int:
    return sum(1 << k for k, value in enumerate(inputs) if value is not None)


def truth_of(
    function, inputs: list[Tensor | None], grads: list[Tensor]
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs and gradients of the reference in float64."""
    leaves = [None if value is None else value.double().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    pairs = [(o, g.double()) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if not pairs:
        return outputs, [torch.zeros_like(leaf) for leaf in present(leaves)]
    targets, weights = zip(*pairs, strict=True)
    return outputs, list(torch.autograd.grad(targets, present(leaves), weights, materialize_grads=True))


def embedding_scale(ce: int) -> float:
    """Keeps similarities at a few units: of a sharper softmax one would measure the rounding alone."""
    return min(0.5, 1.5 / max(ce, 1) ** 0.5)


def conv_inputs(lead, m, cin, cout, ce, order, normalization, shared, biased, dtype) -> list[Tensor | None]:
    pool = () if shared else (ce,)
    K = (order,) if normalization == "softmax" else ()
    shapes = ((*lead, m, cin), (m, ce), None if shared else (m, ce), (*pool, *K, cin, cout))
    return random_tensors(
        *shapes,
        (*pool, cout) if biased else None,
        scales=(1, embedding_scale(ce), 0.5, 0.2, 0.5),
        dtype=dtype,
    )


def run_conv(inputs: list[Tensor | None], grad: Tensor, normalization: str) -> list[Tensor]:
    code = NORMALIZATIONS.index(normalization)
    out = torch.ops.aufast.graph_conv(*inputs, code)
    grads = torch.ops.aufast.graph_conv_backward(grad, *inputs, code, needs_of(inputs))
    return [out, *(g for g, value in zip(grads, inputs, strict=True) if value is not None)]


CONV_SIZES = {
    "paper": ((5,), 12, 192, 96, 8),
    "paper-many": ((201,), 12, 32, 16, 8),
    "ones": ((2, 3), 2, 1, 1, 1),
    "no-frames": ((0,), 3, 4, 5, 2),
    "no-leading": ((), 13, 17, 16, 5),
    "primes": ((97,), 23, 7, 33, 3),
    "most-by-channels": ((96,), 32, 33, 16, 3),
    "wide": ((3,), 40, 64, 512, 64),
    "no-inputs": ((4,), 3, 0, 5, 2),
    "no-outputs": ((4,), 3, 5, 0, 2),
    "no-nodes": ((4,), 0, 5, 4, 2),
    "no-embeddings": ((3,), 5, 6, 7, 0),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("normalization", "order"), [("global", 1), ("softmax", 1), ("softmax", 2), ("softmax", 4)]
)
@pytest.mark.parametrize("form", ["pool", "pool-bias", "shared", "shared-bias"])
@pytest.mark.parametrize("size", CONV_SIZES)
def test_conv_equals_reference(size, form, normalization, order, dtype):
    shared, biased = form.startswith("shared"), form.endswith("bias")
    if shared and size == "no-embeddings":
        pytest.skip("the shared form has no embeddings of its own")
    inputs = conv_inputs(*CONV_SIZES[size], order, normalization, shared, biased, dtype)
    out_shape = (*inputs[0].shape[:-1], inputs[3].shape[-1])
    (grad,) = random_tensors(out_shape, scales=(1,), dtype=dtype)
    (out,), grads = truth_of(
        lambda *a: (reference.graph_conv(*a, normalization=normalization),), inputs, [grad]
    )
    for value, truth in zip(run_conv(inputs, grad, normalization), [out, *grads], strict=True):
        assert value.dtype == dtype
        assert relative(value, truth) < TOLERANCE[dtype]


def gru_inputs(batch, steps, m, cin, c, ce, order, normalization, h0, biased, dtype) -> list[Tensor | None]:
    K = (order,) if normalization == "softmax" else ()
    W, b = (ce, *K, c + cin, c), (ce, c) if biased else None
    shapes = ((batch, steps, m, cin), (m, ce), (m, ce), W, W, W, (batch, m, c) if h0 else None, b, b, b)
    inputs = random_tensors(
        *shapes, scales=(1, embedding_scale(ce), 0.5, 0.15, 0.15, 0.15, 1, 0.5, 0.5, 0.5), dtype=dtype
    )
    if h0:
        inputs[6] = inputs[6].to(torch.promote_types(dtype, torch.float32))
    return inputs


def gru_definition(lengths: Tensor | None, normalization: str):
    def definition(*a: Tensor | None) -> tuple[Tensor, Tensor]:
        biases = None if a[7] is None else a[7:]
        return reference.graph_gru(*a[:7], biases=biases, lengths=lengths, normalization=normalization)

    return definition


def gru_grads(inputs: list[Tensor | None]) -> list[Tensor]:
    batch, steps, m, _ = inputs[0].shape
    c, state = inputs[3].shape[-1], torch.promote_types(inputs[0].dtype, torch.float32)
    out, last = random_tensors((batch, steps, m, c), (batch, m, c), scales=(1, 1), dtype=torch.float64)
    return [out.to(inputs[0].dtype), last.to(state)]


def run_gru(inputs, grads: list[Tensor], lengths: Tensor | None, normalization: str) -> list[Tensor]:
    code = NORMALIZATIONS.index(normalization)
    out, h_last, saved = torch.ops.aufast.graph_gru(*inputs, lengths, code, True)
    plain, plain_last, _ = torch.ops.aufast.graph_gru(*inputs, lengths, code, False)
    assert torch.equal(out, plain) and torch.equal(h_last, plain_last)
    results = torch.ops.aufast.graph_gru_backward(
        *grads, *inputs, lengths, out, saved, code, needs_of(inputs)
    )
    return [out, h_last, *(g for g, value in zip(results, inputs, strict=True) if value is not None)]


def random_lengths(batch: int, steps: int) -> Tensor:
    lengths = torch.randint(0, steps + 1, (batch,), generator=torch.Generator().manual_seed(2))
    lengths[:2] = torch.tensor([0, steps])[:batch]
    return lengths


GRU_SIZES = {
    "paper-narrow": (3, 5, 12, 24, 32, 8),
    "one-clip": (1, 48, 12, 16, 16, 8),
    "primes": (9, 7, 5, 3, 4, 2),
    "one-step": (2, 1, 3, 17, 17, 3),
    "many-nodes": (17, 3, 23, 16, 16, 5),
    "many-sequences": (40, 9, 2, 5, 16, 2),
    "no-steps": (4, 0, 3, 2, 5, 2),
    "no-sequences": (0, 4, 3, 2, 5, 2),
    "no-inputs": (5, 4, 3, 0, 6, 2),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("normalization", "order"), [("global", 1), ("softmax", 1), ("softmax", 2), ("softmax", 3)]
)
@pytest.mark.parametrize("options", ["bare", "h0", "biases", "lengths", "h0-biases-lengths"])
@pytest.mark.parametrize("size", GRU_SIZES)
def test_gru_equals_reference(size, options, normalization, order, dtype):
    sizes = GRU_SIZES[size]
    inputs = gru_inputs(*sizes, order, normalization, "h0" in options, "biases" in options, dtype)
    lengths = random_lengths(*sizes[:2]) if "lengths" in options else None
    grads = gru_grads(inputs)
    outputs, wanted = truth_of(gru_definition(lengths, normalization), inputs, grads)
    for value, truth in zip(run_gru(inputs, grads, lengths, normalization), [*outputs, *wanted], strict=True):
        assert relative(value, truth) < 3 * TOLERANCE[dtype]


# One dimension at a time at the largest size that is promised, the others small; but seven nodes at least in
# wide products, because the gradient of a graph of two is a difference of two nearly equal numbers.
LARGE_CONV = {
    "m-1024-ce-64": ((2,), 1024, 3, 5, 64),
    "frames-1000": ((1000,), 7, 17, 5, 2),
    "inputs-1000": ((3,), 7, 1000, 17, 2),
    "outputs-1000": ((3,), 7, 17, 1000, 2),
}
LARGE_GRU = {
    "m-1024-ce-64": (1, 2, 1024, 2, 3, 64),
    "steps-2000": (2, 2000, 3, 2, 5, 2),
    "channels-512": (2, 3, 7, 17, 512, 2),
    "inputs-1000": (2, 3, 7, 1000, 5, 2),
    "batch-1000": (1000, 3, 7, 3, 17, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("normalization", "order"), [("global", 1), ("softmax", 3)])
@pytest.mark.parametrize("size", LARGE_CONV)
def test_large_conv_equals_reference(size, normalization, order, dtype):
    inputs = conv_inputs(*LARGE_CONV[size], order, normalization, False, True, dtype)
    (grad,) = random_tensors((*inputs[0].shape[:-1], inputs[3].shape[-1]), scales=(1,), dtype=dtype)
    (out,), grads = truth_of(
        lambda *a: (reference.graph_conv(*a, normalization=normalization),), inputs, [grad]
    )
    for value, truth in zip(run_conv(inputs, grad, normalization), [out, *grads], strict=True):
        assert relative(value, truth) < TOLERANCE[dtype]


# Without 2,000 steps of a Chebyshev graph, over which the definition takes most of a minute.
LARGE_GRU_CASES = [(size, "global", 1) for size in LARGE_GRU]
LARGE_GRU_CASES += [(size, "softmax", 3) for size in LARGE_GRU if size != "steps-2000"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("size", "normalization", "order"), LARGE_GRU_CASES)
def test_large_gru_equals_reference(size, normalization, order, dtype):
    sizes = LARGE_GRU[size]
    inputs = gru_inputs(*sizes, order, normalization, True, True, dtype)
    grads, lengths = gru_grads(inputs), random_lengths(*sizes[:2])
    outputs, wanted = truth_of(gru_definition(lengths, normalization), inputs, grads)
    for value, truth in zip(run_gru(inputs, grads, lengths, normalization), [*outputs, *wanted], strict=True):
        assert relative(value, truth) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("batch", [1, 3, 8, 33])
def test_gru_has_the_same_bits_at_any_thread_count(batch, thread_counts):
    inputs = gru_inputs(batch, 6, 12, 40, 24, 8, 1, "global", True, True, torch.float32)
    grads, lengths = gru_grads(inputs), random_lengths(batch, 6)
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        results.append(run_gru(inputs, grads, lengths, "global"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("frames", [1, 50, 300])
def test_conv_has_the_same_bits_at_any_thread_count(frames, thread_counts):
    inputs = conv_inputs((frames,), 17, 40, 24, 8, 3, "softmax", False, True, torch.float32)
    (grad,) = random_tensors((frames, 17, 24), scales=(1,), dtype=torch.float32)
    results = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        results.append(run_conv(inputs, grad, "softmax"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "size", [(8, 12, 12, 96, 96, 8), (1, 5, 12, 17, 30, 3), (9, 3, 12, 64, 32, 10)], ids=str
)
def test_low_precision_is_as_near_as_pytorch(size, dtype):
    """At most twice as far from float64 as PyTorch's own low precision, outputs and every gradient."""
    inputs = gru_inputs(*size, 1, "global", False, True, dtype)
    grads = gru_grads(inputs)
    definition = gru_definition(None, "global")
    outputs, wanted = truth_of(definition, inputs, grads)
    leaves = [None if value is None else value.clone().requires_grad_() for value in inputs]
    low = definition(*leaves)
    own = [*low, *torch.autograd.grad(low, present(leaves), grads)]
    for value, truth, theirs in zip(
        run_gru(inputs, grads, None, "global"), [*outputs, *wanted], own, strict=True
    ):
        assert relative(value, truth) <= 2 * relative(theirs, truth) + 1e-6
    x, U, Q, W = inputs[0], inputs[1], inputs[2], inputs[3][:, -inputs[0].shape[-1] :]
    truth = reference.graph_conv(x.double(), U.double(), Q.double(), W.double())
    ours = torch.ops.aufast.graph_conv(x, U, Q, W, None, 0)
    assert relative(ours, truth) <= 2 * relative(reference.graph_conv(x, U, Q, W), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("normalization", "order"), [("global", 1), ("softmax", 3)])
@pytest.mark.parametrize(
    "size",
    [((48,), 12, 192, 96, 8), ((5,), 7, 80, 48, 3), ((100,), 5, 48, 32, 4), ((3,), 33, 32, 16, 5)],
    ids=str,
)
def test_low_precision_conv_is_as_near_as_pytorch(size, normalization, order, dtype):
    """The same for graph_conv's gradients, split by channels and by nodes."""
    inputs = conv_inputs(*size, order, normalization, False, True, dtype)
    (grad,) = random_tensors((*inputs[0].shape[:-1], inputs[3].shape[-1]), scales=(1,), dtype=dtype)

    def definition(*a: Tensor) -> tuple[Tensor]:
        return (reference.graph_conv(*a, normalization=normalization),)

    outputs, wanted = truth_of(definition, inputs, [grad])
    leaves = [value.clone().requires_grad_() for value in inputs]
    low = definition(*leaves)
    own = [*low, *torch.autograd.grad(low, leaves, grad)]
    for value, truth, theirs in zip(
        run_conv(inputs, grad, normalization), [*outputs, *wanted], own, strict=True
    ):
        assert relative(value, truth) <= 2 * relative(theirs, truth) + 1e-6


def test_layouts_do_not_matter():
    inputs = gru_inputs(3, 4, 5, 16, 16, 4, 1, "global", True, False, torch.float32)
    grads = gru_grads(inputs)
    grads[0] = torch.ones(()).expand(grads[0].shape)
    strided = [None if v is None else v.transpose(0, 1).contiguous().transpose(0, 1) for v in inputs]
    strided[0] = torch.nn.functional.pad(inputs[0], (3, 2))[..., 3:-2]
    plain = run_gru(inputs, [g.contiguous() for g in grads], None, "global")
    assert all(torch.equal(a, b) for a, b in zip(plain, run_gru(strided, grads, None, "global"), strict=True))


def test_what_lies_after_a_sequence_end_is_never_read():
    inputs = gru_inputs(4, 6, 5, 16, 16, 4, 1, "global", True, False, torch.float64)
    lengths, grads = torch.tensor([0, 6, 3, 1]), gru_grads(inputs)
    clean = run_gru(inputs, grads, lengths, "global")
    inputs[0] = inputs[0].clone()
    for sequence, length in enumerate(lengths):
        inputs[0][sequence, length:] = float("nan")
    assert all(
        torch.equal(a, b) for a, b in zip(clean, run_gru(inputs, grads, lengths, "global"), strict=True)
    )


def test_unrelated_nodes_have_no_graph_gradient():
    """U = 0: N(0) = 0, S = I, and the gradient of U is zero."""
    inputs = conv_inputs((4,), 6, 16, 16, 3, 1, "global", False, False, torch.float64)
    inputs[1] = torch.zeros_like(inputs[1])
    grad = torch.ones(4, 6, 16, dtype=torch.float64)
    out, _, grad_U, *_ = run_conv(inputs, grad, "global")
    assert relative(out, reference.graph_conv(*inputs)) < 1e-12
    assert torch.equal(grad_U, torch.zeros_like(grad_U))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frames", [3, 97], ids=["by-channels", "by-nodes"])
def test_only_wanted_conv_gradients_come_back(frames, dtype):
    inputs = conv_inputs((frames,), 5, 48, 32, 3, 1, "global", False, True, dtype)
    (grad,) = random_tensors((frames, 5, 32), scales=(1,), dtype=dtype)
    every = torch.ops.aufast.graph_conv_backward(grad, *inputs, 0, 31)
    for k in range(5):
        one = torch.ops.aufast.graph_conv_backward(grad, *inputs, 0, 1 << k)
        assert torch.equal(one[k], every[k])
        assert all(one[j].shape == (0,) for j in range(5) if j != k)


def test_only_wanted_gradients_come_back():
    inputs = gru_inputs(2, 3, 4, 5, 6, 2, 1, "global", True, True, torch.float64)
    grads = gru_grads(inputs)
    out, _, saved = torch.ops.aufast.graph_gru(*inputs, None, 0, True)
    every = torch.ops.aufast.graph_gru_backward(*grads, *inputs, None, out, saved, 0, 1023)
    for k in range(10):
        one = torch.ops.aufast.graph_gru_backward(*grads, *inputs, None, out, saved, 0, 1 << k)
        assert torch.equal(one[k], every[k])
        assert all(one[j].shape == (0,) for j in range(10) if j != k)


LEVEL_CHECK = """
import sys; sys.path.insert(0, {folder!r})
import torch, test_cpu_graph_kernels as t
for dtype in t.TOLERANCE:
    for order, normalization in ((1, "global"), (3, "softmax")):
        for size in ("paper-narrow", "primes", "many-nodes"):
            t.test_gru_equals_reference(size, "h0-biases-lengths", normalization, order, dtype)
        for size in ("paper", "primes", "paper-many"):
            t.test_conv_equals_reference(size, "pool-bias", normalization, order, dtype)
t.test_low_precision_is_as_near_as_pytorch((8, 12, 12, 96, 96, 8), torch.bfloat16)
t.test_low_precision_is_as_near_as_pytorch((9, 3, 12, 64, 32, 10), torch.bfloat16)
"""


@pytest.mark.parametrize(
    "level",
    [
        "baseline",
        "avx2",
        pytest.param("avx512", marks=pytest.mark.slow),  # avx512_bf16 has its functions, and more
        "avx512_bf16",
        pytest.param("amx", marks=pytest.mark.slow),
    ],
)
def test_every_instruction_set_level(level):
    code = LEVEL_CHECK.format(folder=os.path.dirname(__file__))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AUFAST_CPU_ISA": level},
        capture_output=True,
        text=True,
    )
    if "asks for more than this CPU has" in run.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert run.returncode == 0, run.stderr


def test_unknown_instruction_set_level_is_an_error():
    code = (
        "import torch, aufast; one = torch.ones(1, 1); "
        "torch.ops.aufast.graph_conv(one, one, None, one, None, 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AUFAST_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "AUFAST_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or amx, got sse9" in run.stderr


def test_kernels_run_after_a_fork():
    inputs = conv_inputs((100,), 12, 16, 16, 4, 1, "global", False, False, torch.float32)
    before = torch.ops.aufast.graph_conv(*inputs, 0)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(before, torch.ops.aufast.graph_conv(*inputs, 0)) else 1)
    assert os.waitpid(child, 0)[1] == 0


KEPT_WORKSPACE_CHECK = """
import sys; sys.path.insert(0, {folder!r})
import torch, test_cpu_graph_kernels as t
conv, gru = torch.ops.aufast.graph_conv, torch.ops.aufast.graph_gru
calls = []
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for frames, m, cin, cout, ce in ((7, 5, 33, 17, 3), (96, 12, 96, 96, 8), (1, 2, 2, 2, 1)):
        inputs = t.conv_inputs((frames,), m, cin, cout, ce, 1, "global", False, True, dtype)
        calls.append(lambda inputs=inputs: conv(*inputs, 0))
        sequences = t.gru_inputs(2, 5, m, cin, cout, ce, 1, "global", True, True, dtype)
        calls.append(lambda inputs=sequences: gru(*inputs, None, 0, True)[0])
first = [call() for call in calls]
for _ in range(2):
    for call, value in reversed(list(zip(calls, first))):
        assert torch.equal(call(), value)
print([value.double().nansum().item() for value in first])
"""


def test_a_workspace_kept_between_calls_changes_no_bit():
    code = KEPT_WORKSPACE_CHECK.format(folder=os.path.dirname(__file__))
    kept = {name: value for name, value in os.environ.items() if name != "AUFAST_FRESH_WORKSPACE"}
    printed = []
    for environment in (kept, kept | {"AUFAST_FRESH_WORKSPACE": "1"}):
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        printed.append(run.stdout)
    assert printed[0] == printed[1]
