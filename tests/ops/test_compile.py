"""torch.compile and torch.export: same numbers, one node, no graph break, no needless recompile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import aufast
from tests.samples import TYPICAL, Sample, Tensors, assert_same, run, through_operators


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_one_more(sample: Sample) -> Sample:
    """The same call for one image or sequence more."""
    first = next(iter(sample.tensors))
    batched = {first, "rois", "h0"} & sample.tensors.keys()
    more = {k: torch.cat([t, t[:1]]) if k in batched else t for k, t in sample.tensors.items()}
    options = dict(sample.options)
    if "lengths" in options:
        options["lengths"] = torch.cat([options["lengths"], options["lengths"][:1]])
    return Sample(sample.operator, sample.name, more, options)


@pytest.mark.parametrize(
    ("operators", "dynamic"),
    [
        pytest.param(False, False, id="auto"),
        pytest.param(False, True, id="auto-dynamic", marks=pytest.mark.slow),
        pytest.param(True, False, id="operator"),
        pytest.param(True, True, id="operator-dynamic"),
    ],
)
@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_compiled_numbers_forward_and_backward(sample: Sample, operators: bool, dynamic: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=dynamic)
    def compiled(tensors: Tensors, lengths: Tensor | None) -> tuple[Tensor, ...]:
        options = sample.options | ({} if lengths is None else {"lengths": lengths})
        return Sample(sample.operator, sample.name, tensors, options).public(tensors)

    def check(call: Sample) -> None:
        truth = run(lambda t: call.public(t, "reference"), call.inputs())
        assert_same(run(lambda t: compiled(t, call.options.get("lengths")), call.inputs()), truth, 1e-12)

    # Sizes that are equal by chance are not the same size: without this, PyTorch would tie them together.
    untied = torch.fx.experimental._config.patch(use_duck_shape=False)
    never_again = torch._dynamo.config.patch(error_on_recompile=True)
    with through_operators() if operators else nullcontext(), untied:
        check(sample)
        with never_again:
            check(sample)
            # The definition loops over images and steps, so only the operator stands for any number of them.
            if dynamic and operators:
                check(with_one_more(sample))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_inductor_gives_the_same_numbers(sample: Sample) -> None:
    truth = run(lambda t: sample.public(t, "reference"), sample.inputs())
    with through_operators():
        assert_same(run(torch.compile(sample.public, fullgraph=True), sample.inputs()), truth, 1e-12)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_compiled_training_calls_both_operators_as_one_node(sample: Sample) -> None:
    """The backward graph holds the backward operator itself, not the definition taken apart."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with through_operators():
        run(torch.compile(sample.public, backend=backend, fullgraph=True), sample.inputs())
    forward, backward = graphs
    assert [name for name in forward if "aufast" in name] == [f"aufast.{sample.operator}.default"]
    assert [name for name in backward if "aufast" in name] == [f"aufast.{sample.operator}_backward.default"]


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_export_keeps_the_operator_as_one_node(sample: Sample, strict: bool) -> None:
    class Model(nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return sample.public(dict(zip(given, tensors, strict=True)))

    given = [k for k, t in sample.tensors.items() if t is not None]
    arguments = tuple(sample.inputs(torch.float32, requires_grad=False)[k] for k in given)
    with through_operators():
        program = torch.export.export(Model(), arguments, strict=strict)
        expected = Model()(*arguments)
    nodes = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [name for name in nodes if "getitem" not in name] == [f"aufast.{sample.operator}.default"]
    for actual, wanted in zip(program.module()(*arguments), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_compiled_function_follows_use_backend() -> None:
    sample = TYPICAL[1]
    calls = []

    def record(graph: torch.fx.GraphModule, example: list[Tensor]):
        calls.append(any("aufast" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(sample.public, backend=record, fullgraph=True)
    with through_operators():
        compiled(sample.inputs())
        with aufast.use_backend("reference"):
            compiled(sample.inputs())
        compiled(sample.inputs())
    assert calls == [True, False]


def test_autocast_inside_a_compiled_function() -> None:
    sample = TYPICAL[3]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(tensors: Tensors) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sample.public(tensors)[0]

    expected = sample.public(sample.inputs(torch.bfloat16))[0]
    assert torch.equal(compiled(sample.inputs(torch.float32)), expected)
