"""Derivatives of every kind: by differences, of second order, torch.func, forward mode; right or an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.samples import (
    SAMPLES,
    TYPICAL,
    Sample,
    Tensors,
    assert_same,
    differences_agree,
    run,
    through_operators,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]
SMOOTH = [s for s in SAMPLES if s.smooth and not s.empty]


@pytest.fixture(autouse=True, params=["auto", "operator"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for what this machine chooses, and where everything goes through `torch.ops`."""
    if request.param == "auto":
        yield
    else:
        with through_operators():
            yield


def total(sample: Sample, tensors: Tensors) -> Tensor:
    """One number that depends on every output in its own way."""
    return sum((o.sin() * (k + 1)).sum() for k, o in enumerate(sample.public(tensors)))


@pytest.mark.parametrize("sample", SMOOTH, ids=str)
def test_first_derivatives_equal_differences(sample: Sample) -> None:
    assert differences_agree(sample.public, sample.inputs(), fast_mode=True)


@pytest.mark.parametrize("sample", SMOOTH, ids=str)
def test_second_derivatives_equal_differences(sample: Sample) -> None:
    assert differences_agree(sample.public, sample.inputs(), order=2, fast_mode=True)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_second_derivatives_when_the_argument_is_also_used_directly(sample: Sample) -> None:
    """Where a backward pass has no derivative, autograd can drop its share without a word: not here."""
    tensors, truth = sample.inputs(), sample.inputs()
    found = []
    for backend, inputs in ((None, tensors), ("reference", truth)):
        outputs = sample.public(inputs, backend)
        wanted = [t for t in inputs.values() if t is not None]
        first = torch.autograd.grad(sum(o.sin().sum() for o in outputs), wanted, create_graph=True)
        mixed = sum(g.square().sum() for g in first) + sum(t.sum() for t in wanted)
        second = torch.autograd.grad(mixed, wanted)
        found.append({str(k): g for k, g in enumerate(second)})
        assert any((g != 1).any() for g in second)
    assert_same(found[0], found[1], 1e-11)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_func_grad_and_vjp(sample: Sample) -> None:
    tensors = {k: t for k, t in sample.inputs(requires_grad=False).items() if t is not None}
    leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    total(sample, leaves).backward()
    truth = {k: t.grad for k, t in leaves.items()}

    assert_same(torch.func.grad(lambda t: total(sample, t))(tensors), truth, 1e-12)
    _, vjp = torch.func.vjp(lambda t: total(sample, t), tensors)
    assert_same(vjp(torch.ones((), dtype=torch.float64))[0], truth, 1e-12)


@pytest.mark.parametrize("sample", [s for s in TYPICAL if s.operator != "roi_crop"], ids=str)
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_forward_mode_agrees_with_reverse_mode(sample: Sample, compiled: bool) -> None:
    tensors = {k: t for k, t in sample.inputs(requires_grad=False).items() if t is not None}
    tangents = {k: torch.randn_like(t) for k, t in tensors.items()}

    def f(t: Tensors) -> Tensor:
        return total(sample, t)

    def derivative(t: Tensors, d: Tensors) -> Tensor:
        return torch.func.jvp(f, (t,), (d,))[1]

    truth = sum((g * tangents[k]).sum() for k, g in torch.func.grad(f)(tensors).items())
    if compiled:
        derivative = torch.compile(derivative, backend="eager", fullgraph=True)
    torch.testing.assert_close(derivative(tensors, tangents), truth)
    with forward_ad.dual_level():
        dual = f({k: forward_ad.make_dual(t, tangents[k]) for k, t in tensors.items()})
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, truth)


def test_forward_mode_of_a_crop_raises() -> None:
    """PyTorch's grid_sample has no forward mode, so the definition has none; it says so."""
    tensors = TYPICAL[0].inputs(requires_grad=False)
    for name in tensors:
        with pytest.raises(NotImplementedError, match="^roi_crop: no forward mode"), forward_ad.dual_level():
            dual = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
            TYPICAL[0].public(tensors | {name: dual})


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_vmap_over_the_first_argument(sample: Sample) -> None:
    tensors = sample.inputs(requires_grad=False)
    name, first = next(iter(tensors.items()))
    several = torch.stack([first, 2 * first, -first])

    def f(value: Tensor) -> tuple[Tensor, ...]:
        return sample.public(tensors | {name: value})

    for k, outputs in enumerate(torch.vmap(f)(several)):
        expected = torch.stack([f(value)[k] for value in several])
        torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(sample: Sample) -> None:
    tensors = {k: t for k, t in sample.inputs().items() if t is not None}
    out = sample.public(tensors)[0]
    several = torch.randn(3, *out.shape, dtype=out.dtype)
    wanted = list(tensors.values())
    batched = torch.autograd.grad(out, wanted, several, is_grads_batched=True, retain_graph=True)
    for k, one in enumerate(several):
        for grad, expected in zip(
            batched, torch.autograd.grad(out, wanted, one, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(grad[k], expected)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_raw_operators_refuse_a_tangent(sample: Sample) -> None:
    tensors = sample.inputs(requires_grad=False)
    name, first = next(iter(tensors.items()))
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(first.clone().requires_grad_(requires_grad), torch.ones_like(first))
            with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
                sample.raw(tensors | {name: dual})


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_backward_operators_refuse_a_derivative_of_their_own(sample: Sample) -> None:
    tensors = sample.inputs()
    needs = sum(1 << k for k, t in enumerate(tensors.values()) if t is not None)
    arguments = sample.raw_backward_arguments(tensors, needs)
    wanted = [t for t in tensors.values() if t is not None]
    grads = getattr(torch.ops.aufast, f"{sample.operator}_backward")(*arguments)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(grads[0].sum() + sum(t.sum() for t in wanted), wanted)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_checkpointing_gives_the_same_gradients(sample: Sample) -> None:
    truth = run(sample.public, sample.inputs())
    again = run(lambda t: checkpoint(sample.public, t, use_reentrant=False), sample.inputs())
    assert_same(again, truth, 0)
