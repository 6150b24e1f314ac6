"""The persistent graph-GRU in the emulator: tiles, barriers, exchange and tails against the definition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from aufast import reference
from aufast.ops import graph_gru_cuda
from tests.cuda.emulator.building import ROOT, emulated
from tests.ops.test_cpu_graph_kernels import (
    gru_definition,
    gru_grads,
    gru_inputs,
    present,
    random_lengths,
    relative,
    truth_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")
DEVICES = ("sm_90", "sm_80", "sm_86")
NORMALIZATIONS = ("global", "softmax")


class Size(NamedTuple):
    batch: int
    steps: int
    nodes: int
    inputs: int
    channels: int
    embeddings: int
    order: int = 1
    normalization: str = "global"
    h0: bool = True
    biased: bool = True
    ends: bool = True

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor | None], Tensor | None]:
        lengths = random_lengths(self.batch, self.steps) if self.ends else None
        return gru_inputs(*self[:-1], dtype), lengths


# Two groups of blocks run at a time in the emulator, so tiles of 8, 16 and 32 sequences appear from 1, 17 and
# 33 sequences on (low precision has none of 8), and beyond 64 groups take tiles in turn.
SIZES = {
    "one-clip": Size(1, 6, 4, 5, 16, 3, h0=False, biased=False, ends=False),
    "primes": Size(9, 4, 5, 3, 7, 2),
    "sixteens": Size(23, 3, 3, 4, 20, 2),
    "thirty-twos": Size(40, 2, 3, 4, 18, 2),
    "turns": Size(131, 2, 3, 2, 5, 2),
    "one-node": Size(3, 3, 1, 2, 16, 2),
    "sixteen-nodes": Size(2, 2, 16, 3, 16, 3, biased=False),
    "two-supports": Size(5, 3, 4, 3, 20, 3, 2, "softmax"),
    "three-supports": Size(18, 2, 3, 3, 17, 3, 3, "softmax", h0=False),
    "more-strips-than-warps": Size(2, 2, 2, 4, 104, 2),
    "paper": Size(2, 2, 12, 96, 96, 8, h0=False, biased=False, ends=False),
    "too-large-to-stay": Size(2, 2, 2, 3, 250, 2, h0=False),
    "no-inputs": Size(3, 3, 4, 0, 16, 3),
}
PAPER = pytest.param("paper", marks=pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    torch.ops.load_library(emulated(ROOT / "csrc" / "cuda" / "graph_gru.cu"))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUFAST_EMULATED_LOG", str(tmp_path / "launches"))
    return tmp_path / "launches"


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def run(
    inputs: list[Tensor | None], grads: list[Tensor], lengths: Tensor | None, normalization: str
) -> list[Tensor]:
    """Outputs and the gradients of what is there; the forward pass that saves nothing has the same bits."""
    code, needs = (
        NORMALIZATIONS.index(normalization),
        sum(1 << k for k, v in enumerate(inputs) if v is not None),
    )
    out, h_last, saved = graph_gru_cuda.graph_gru(*inputs, lengths, code, True)
    plain, plain_last, nothing = graph_gru_cuda.graph_gru(*inputs, lengths, code, False)
    assert torch.equal(out, plain) and torch.equal(h_last, plain_last) and nothing.shape == (0,)
    found = graph_gru_cuda.graph_gru_backward(*grads, *inputs, lengths, out, saved, code, needs)
    for gradient, value in zip(found, inputs, strict=True):
        assert gradient.shape == ((0,) if value is None else value.shape) and gradient.is_contiguous()
        assert value is None or gradient.dtype == value.dtype
    return [out, h_last, *(g for g, value in zip(found, inputs, strict=True) if value is not None)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_the_definition(
    device: str, size: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUFAST_EMULATED_DEVICE", device)
    inputs, lengths = SIZES[size].tensors(torch.float32)
    grads, normalization = gru_grads(inputs), SIZES[size].normalization
    outputs, wanted = truth_of(gru_definition(lengths, normalization), inputs, grads)
    for value, truth in zip(run(inputs, grads, lengths, normalization), [*outputs, *wanted], strict=True):
        assert relative(value, truth) < 5e-6
    for line in log.read_text().splitlines():
        blocks, cluster, threads, shared = map(int, line.split())
        assert cluster == (SIZES[size].nodes if device == "sm_90" else 0)
        assert blocks % SIZES[size].nodes == 0 and threads <= 384
        assert shared <= {"sm_90": 227, "sm_80": 163, "sm_86": 99}[device] << 10


@pytest.mark.parametrize("size", ["one-clip", "sixteens", "thirty-twos", "two-supports", "turns", PAPER])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES[:2])
def test_low_precision_is_as_near_as_pytorch(
    device: str, dtype: torch.dtype, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice as far from float64 as PyTorch's own low precision, outputs and every gradient."""
    monkeypatch.setenv("AUFAST_EMULATED_DEVICE", device)
    inputs, lengths = SIZES[size].tensors(dtype)
    grads, normalization = gru_grads(inputs), SIZES[size].normalization
    definition = gru_definition(lengths, normalization)
    outputs, wanted = truth_of(definition, inputs, grads)
    leaves = [None if value is None else value.clone().requires_grad_() for value in inputs]
    low = definition(*leaves)
    own = [*low, *torch.autograd.grad(low, present(leaves), grads)]
    found = run(inputs, grads, lengths, normalization)
    for value, truth, theirs in zip(found, [*outputs, *wanted], own, strict=True):
        assert relative(value, truth) <= 2 * relative(theirs, truth) + 1e-6


@pytest.mark.parametrize("size", ["one-clip", "primes", "thirty-twos", "two-supports", PAPER])
@pytest.mark.parametrize("device", DEVICES[:2])
def test_tf32_where_pytorch_may_use_it(
    device: str, size: str, monkeypatch: pytest.MonkeyPatch, tf32: None
) -> None:
    """TF32 keeps eleven bits: errors of about 2⁻¹², and not those of float32."""
    monkeypatch.setenv("AUFAST_EMULATED_DEVICE", device)
    inputs, lengths = SIZES[size].tensors(torch.float32)
    grads, normalization = gru_grads(inputs), SIZES[size].normalization
    outputs, wanted = truth_of(gru_definition(lengths, normalization), inputs, grads)
    for value, truth in zip(run(inputs, grads, lengths, normalization), [*outputs, *wanted], strict=True):
        assert relative(value, truth) < 1e-3
    assert relative(run(inputs, grads, lengths, normalization)[1], outputs[1]) > 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES[:2])
def test_nothing_is_read_after_a_sequences_end(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of x, nor of the incoming gradient, nor of what the forward pass saved."""
    monkeypatch.setenv("AUFAST_EMULATED_DEVICE", device)
    inputs, lengths = SIZES["primes"].tensors(dtype)
    assert lengths.min() < inputs[0].shape[1]
    after = torch.arange(inputs[0].shape[1]) >= lengths[:, None]  # (B, T)
    grads, found = gru_grads(inputs), []
    for filler in (0.0, torch.nan):
        inputs[0][after] = filler
        grads[0][after] = filler
        out, h_last, saved = graph_gru_cuda.graph_gru(*inputs, lengths, 0, True)
        saved[after] = filler
        gradients = graph_gru_cuda.graph_gru_backward(*grads, *inputs, lengths, out, saved, 0, 0b1111111111)
        found.append([out, h_last, *gradients])
    for expected, value in zip(*found, strict=True):
        assert torch.equal(value, expected)
    assert found[1][2][after].eq(0).all()


def test_long_sums_of_float16_do_not_overflow() -> None:
    """S and Θ have gradients above 65,504 here; those of U and W, which are returned, fit float16."""
    batch, steps, nodes, channels = 200, 2, 3, 16
    half = {"dtype": torch.float16}
    x = torch.full((batch, steps, nodes, channels), 20.0, **half)
    U = torch.tensor([[10.0], [9.0], [11.0]], **half)
    Q, W = torch.full((nodes, 1), 0.02, **half), torch.full((1, 2 * channels, channels), 0.1, **half)
    inputs = [x, U, Q, W, W, W, None, None, None, None]
    grads = [torch.full((batch, steps, nodes, channels), 100.0, **half), torch.zeros(batch, nodes, channels)]
    _, truth = truth_of(gru_definition(None, "global"), inputs, grads)
    out, _, saved = graph_gru_cuda.graph_gru(*inputs, None, 0, True)
    found = graph_gru_cuda.graph_gru_backward(*grads, *inputs, None, out, saved, 0, 0b111010)
    theta_gradient = truth[5] / (nodes * 0.02)  # the nodes are nearly alike
    assert theta_gradient.max() > 65504 > truth[5].max()
    for k in (1, 3, 4, 5):
        assert relative(found[k], truth[k]) < 1e-2


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("size", ["primes", "sixteens", "turns", "two-supports"])
@pytest.mark.parametrize("device", ["sm_90", "sm_80"])
def test_the_order_of_threads_does_not_matter(
    device: str, size: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No barrier is missing: whoever runs first, the bits are the same."""
    monkeypatch.setenv("AUFAST_EMULATED_DEVICE", device)
    inputs, lengths = SIZES[size].tensors(dtype)
    grads, normalization = gru_grads(inputs), SIZES[size].normalization
    in_turn = run(inputs, grads, lengths, normalization)
    for order in range(1, 5):
        monkeypatch.setenv("AUFAST_EMULATED_ORDER", str(order))
        again = run(inputs, grads, lengths, normalization)
        assert all(torch.equal(a, b) for a, b in zip(in_turn, again, strict=True)), f"order {order}"


def test_the_exchange_does_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters or global memory, matrices that stay or stream: the sums are the same."""
    inputs, lengths = Size(3, 2, 3, 8, 112, 2).tensors(torch.float32)
    grads, found = gru_grads(inputs), []
    for device in DEVICES:
        monkeypatch.setenv("AUFAST_EMULATED_DEVICE", device)
        found.append(run(inputs, grads, lengths, "global"))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


def test_chunks_are_one_call() -> None:
    inputs, _ = SIZES["primes"].tensors(torch.float32)
    whole, last, _ = graph_gru_cuda.graph_gru(*inputs, None, 0, False)
    x, *parameters = inputs
    first, state, _ = graph_gru_cuda.graph_gru(x[:, :1], *parameters, None, 0, False)
    parameters[5] = state
    rest, state, _ = graph_gru_cuda.graph_gru(x[:, 1:], *parameters, None, 0, False)
    assert relative(torch.cat([first, rest], dim=1), whole) < 1e-6 and relative(state, last) < 1e-6


def test_what_lies_after_a_sequence_end_is_never_read() -> None:
    inputs, _ = Size(4, 6, 5, 4, 16, 4, biased=False).tensors(torch.float32)
    lengths, grads = torch.tensor([0, 9, 3, -1]), gru_grads(inputs)
    clean = run(inputs, grads, lengths, "global")
    inputs[0], grads[0] = inputs[0].clone(), grads[0].clone()
    for sequence, length in enumerate(lengths.clamp(min=0)):
        inputs[0][sequence, length:] = float("nan")
        grads[0][sequence, length:] = float("nan")
    again = run(inputs, grads, lengths, "global")
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_layouts_do_not_matter() -> None:
    inputs, lengths = Size(3, 4, 5, 16, 16, 4).tensors(torch.float32)
    grads = gru_grads(inputs)
    grads[0] = torch.ones(()).expand(grads[0].shape)
    strided = [None if v is None else v.transpose(0, 1).contiguous().transpose(0, 1) for v in inputs]
    shifted = torch.empty(inputs[6].numel() + 1)[1:].view(inputs[6].shape).copy_(inputs[6])
    plain = run(inputs, [g.contiguous() for g in grads], lengths, "global")
    for h0 in (strided[6], shifted):  # the second starts at an odd address
        strided[6] = h0
        again = run(strided, grads, lengths, "global")
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_only_wanted_gradients_come_back() -> None:
    inputs, _ = Size(2, 3, 4, 5, 6, 2, ends=False).tensors(torch.float32)
    grads = gru_grads(inputs)
    out, _, saved = graph_gru_cuda.graph_gru(*inputs, None, 0, True)
    every = graph_gru_cuda.graph_gru_backward(*grads, *inputs, None, out, saved, 0, 1023)
    for k in range(10):
        one = graph_gru_cuda.graph_gru_backward(*grads, *inputs, None, out, saved, 0, 1 << k)
        assert torch.equal(one[k], every[k])
        assert all(one[j].shape == (0,) for j in range(10) if j != k)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (Size(2, 3, 4, 5, 6, 2), torch.float64),
        (Size(2, 3, 17, 5, 6, 2), torch.float32),
        (Size(2, 3, 2, 5, 129, 2, 2, "softmax"), torch.float32),
        (Size(0, 3, 2, 5, 6, 2), torch.float32),
        (Size(2, 0, 2, 5, 6, 2), torch.bfloat16),
        (Size(2, 3, 2, 5, 0, 2), torch.float32),
    ],
    ids=["float64", "many-nodes", "many-channels", "no-sequences", "no-steps", "no-channels"],
)
def test_the_definition_takes_what_the_kernel_cannot(size: Size, dtype: torch.dtype) -> None:
    """Where there is no kernel for it, the operator falls back, forward and backward."""
    calls = []

    def fallback(*arguments: object) -> str:
        calls.append(arguments)
        return "fallen back"

    inputs, lengths = size.tensors(dtype)
    forward = graph_gru_cuda._or_else(graph_gru_cuda.graph_gru, fallback, 0)
    backward = graph_gru_cuda._or_else(graph_gru_cuda.graph_gru_backward, fallback, 2)
    assert forward(*inputs, lengths, 0, False) == "fallen back"
    assert backward(*gru_grads(inputs), *inputs, lengths, None, None, 0, 1) == "fallen back"
    assert len(calls) == 2


def test_the_kernel_takes_what_it_can() -> None:
    inputs, _ = SIZES["primes"].tensors(torch.float32)
    forward = graph_gru_cuda._or_else(graph_gru_cuda.graph_gru, lambda *arguments: None, 0)
    out, h_last, _ = forward(*inputs, None, 0, False)
    biases = tuple(inputs[7:])
    expected, last = reference.graph_gru(*inputs[:7], biases=biases)
    assert relative(out, expected) < 5e-6 and relative(h_last, last) < 5e-6


def test_the_reason_names_the_size() -> None:
    x, W = torch.empty(2, 3, 17, 5), torch.empty(2, 11, 6)
    assert graph_gru_cuda.cannot_run(x[:, :, :16], W) is None
    assert "at most 16, and the graph has 17" in graph_gru_cuda.cannot_run(x, W)
    assert "at most 256" in graph_gru_cuda.cannot_run(x[:, :, :4], torch.empty(2, 2, 134, 129))


def steps_arguments() -> dict[str, Tensor | None | bool]:
    """Of `graph_gru_steps`, two sequences of three steps; K = 1."""
    nodes, batch, steps, channels = 2, 2, 3, 16
    return {
        "gates": torch.zeros(nodes, batch, steps, 3 * channels),
        "theta": torch.zeros(nodes, 3 * channels * channels),
        "supports": torch.zeros(nodes, 1, nodes),
        "h0": torch.zeros(batch, nodes, channels),
        "lengths": torch.full((batch,), steps),
        "tf32": False,
        "save": False,
    }


@pytest.mark.parametrize("name", ["theta", "supports", "h0", "lengths"])
def test_raw_steps_refuse_what_does_not_fit(name: str) -> None:
    """Device, size, dtype and layout of every tensor, before its address goes to a kernel."""
    right = steps_arguments()
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    steps = torch.ops.aufast.graph_gru_steps.default.redispatch
    assert len(steps(key, *right.values())) == 3
    with pytest.raises(RuntimeError, match=f"graph_gru_steps: {name} is on another device than gates"):
        steps(key, *(right | {name: right[name].to("meta")}).values())
    twice = right[name].repeat_interleave(2, dim=-1)
    for wrong in (twice, right[name].to(torch.float16), twice[..., ::2]):
        with pytest.raises(RuntimeError, match=f"graph_gru_steps: {name} has a size, dtype or layout"):
            steps(key, *(right | {name: wrong}).values())
    with pytest.raises(RuntimeError, match="the gates must be float32, bfloat16 or float16"):
        steps(key, *(right | {"gates": right["gates"].double()}).values())


def test_raw_steps_refuse_an_unaligned_theta() -> None:
    """A block copies its matrices sixteen bytes at a time."""
    right = steps_arguments()
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    forward = torch.ops.aufast.graph_gru_steps.default.redispatch
    backward = torch.ops.aufast.graph_gru_steps_backward.default.redispatch
    out, h_last, saved = forward(key, *(right | {"save": True}).values())
    shifted = torch.zeros(right["theta"].numel() + 1)[1:].view_as(right["theta"])
    _, _, supports, h0, lengths, tf32, _ = right.values()
    assert len(backward(key, out, h_last, out, saved, right["theta"], supports, h0, lengths, tf32)) == 2
    with pytest.raises(RuntimeError, match="graph_gru_steps: theta must begin at a multiple of 16 bytes"):
        forward(key, *(right | {"theta": shifted}).values())
    with pytest.raises(RuntimeError, match="graph_gru_steps_backward: theta must begin at a multiple of 16"):
        backward(key, out, h_last, out, saved, shifted, supports, h0, lengths, tf32)
