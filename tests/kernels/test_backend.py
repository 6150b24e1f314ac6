"""Triton as a backend: when it is chosen, what it says where it cannot run, and float64."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aufast.ops import backends
from tests.samples import TYPICAL, Sample, assert_same, differences_agree, run

ON_A_GPU = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU and Triton, and without compiled CUDA kernels."""
    monkeypatch.setitem(backends._missing, "triton", None)
    monkeypatch.setitem(backends._kernels, "triton", frozenset(backends.OPERATORS))
    monkeypatch.setitem(backends._kernels, "cuda", frozenset())
    monkeypatch.setattr(backends, "_too_old", lambda index: None)


@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_auto_prefers_compiled_kernels_then_triton_then_the_definition(
    operator: str, with_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backends.choose(operator, ON_A_GPU, "auto") == "triton"
    monkeypatch.setitem(backends._kernels, "cuda", frozenset({operator}))
    monkeypatch.setitem(backends._missing, "cuda", None)
    assert backends.choose(operator, ON_A_GPU, "auto") == "cuda"
    assert backends.choose(operator, ON_A_GPU, "triton") == "triton"
    monkeypatch.setitem(backends._kernels, "cuda", frozenset())
    monkeypatch.setitem(backends._kernels, "triton", frozenset())
    assert backends.choose(operator, ON_A_GPU, "auto") == "reference"


@pytest.mark.skipif(
    "triton" not in backends._missing or not backends._missing["triton"], reason="Triton runs here"
)
@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_a_request_without_a_gpu_says_so(sample: Sample) -> None:
    with pytest.raises(
        RuntimeError, match=f"{sample.operator}: the 'triton' backend cannot run here: .*Triton|CUDA"
    ):
        sample.public(sample.inputs(torch.float32), "triton")


def test_a_request_for_a_cpu_tensor_says_so(with_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._devices, "triton", ("cuda",))
    with pytest.raises(RuntimeError, match="'triton' backend cannot run here: the input is on cpu"):
        TYPICAL[0].public(TYPICAL[0].inputs(), "triton")


def test_the_reason_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends._triton_missing() == "Triton is not installed"


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_float64_takes_the_definition(sample: Sample) -> None:
    """Also its derivatives, of the overload's own backward; nothing of Triton is needed."""
    operator = getattr(torch.ops.aufast, sample.operator).triton

    def call(tensors: dict) -> tuple[torch.Tensor, ...]:
        out = operator(*sample.raw_arguments(tensors))
        return out[:2] if isinstance(out, tuple) else (out,)

    truth = run(lambda tensors: sample.public(tensors, "reference"), sample.inputs())
    assert_same(run(call, sample.inputs()), truth, 1e-12)
    tensors = {name: t for name, t in sample.inputs().items() if t is not None}
    assert differences_agree(lambda t: call({**dict.fromkeys(sample.tensors), **t}), tensors)


def test_the_overload_goes_backward_through_its_own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = TYPICAL[1]
    called = []
    kernels = SimpleNamespace(
        graph_conv=lambda x, U, Q, W, bias, code: x.new_ones(*x.shape[:-1], W.shape[-1]),
        graph_conv_backward=lambda grad, *inputs: (
            called.append(inputs[-1]) or tuple(map(torch.zeros_like, inputs[:5]))
        ),
    )
    monkeypatch.setitem(sys.modules, "aufast.kernels.graph_conv", kernels)
    monkeypatch.setitem(backends._devices, "triton", ("cuda", "cpu"))
    out = torch.ops.aufast.graph_conv.triton(*sample.raw_arguments(sample.inputs(torch.float32)))
    assert out.eq(1).all()
    out.sum().backward()
    assert called == [0b11111]


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_the_raw_operator_looks_at_every_tensors_device(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher looks at one tensor: here it is told which kernel to call, as a mixture would be."""
    operator = getattr(torch.ops.aufast, sample.operator).triton
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    first, second, *rest = sample.raw_arguments(sample.inputs(torch.float32, requires_grad=False))
    names = list(sample.tensors)
    with pytest.raises(ValueError, match=r"\.triton: the tensors are on cpu, and its kernel runs on cuda$"):
        operator.redispatch(key, first, second, *rest)
    match = f"aufast::{sample.operator}: {names[1]} is on meta, but {names[0]} is on cpu"
    with pytest.raises(ValueError, match=match):
        operator.redispatch(key, first, second.to("meta"), *rest)


def large_graph(nodes: int) -> list[Any]:
    """Arguments of `graph_gru` and of its backward up to `lengths`."""
    shapes = [(2, 3, nodes, 4), (nodes, 2), (nodes, 2), *[(2, 9, 5)] * 3]
    return [torch.randn(shape) for shape in shapes] + [None] * 5


@pytest.mark.parametrize("nodes", [6, 48])
def test_a_raw_call_with_tensors_of_the_cpu_says_where_the_kernel_runs(nodes: int) -> None:
    """A graph of any size, though the CPU's kernel keeps something else for the backward from 48 nodes on."""
    arguments = large_graph(nodes)
    where = "the tensors are on cpu, and its kernel runs on cuda$"
    with pytest.raises(ValueError, match=rf"^aufast::graph_gru\.triton: {where}"):
        torch.ops.aufast.graph_gru.triton(*arguments, 0, True)
    out, h_last, saved = torch.ops.aufast.graph_gru(*arguments, 0, True)
    with pytest.raises(ValueError, match=rf"^aufast::graph_gru_backward\.triton: {where}"):
        torch.ops.aufast.graph_gru_backward.triton(out, h_last, *arguments, out, saved, 0, 63)


def test_the_backward_kernel_takes_what_its_forward_kept_and_nothing_else() -> None:
    pytest.importorskip("triton")
    from aufast.kernels import graph_gru

    arguments = large_graph(48)
    out, h_last, saved = torch.ops.aufast.graph_gru(*arguments, 0, True)
    message = (
        r"saved must be the gates \(2, 3, 48, 15\) that aufast::graph_gru\.triton keeps, got \(2, 1, 48, "
    )
    with pytest.raises(ValueError, match=message):
        graph_gru.graph_gru_backward(out, h_last, *arguments, out, saved, 0, 63)


def test_import_does_not_import_triton() -> None:
    program = "import aufast, sys; aufast.backends(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
