"""The short way of calls that passed before: the same bits, and never where the long way is needed."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import aufast
from aufast import ops, reference
from aufast.ops import direct

pytestmark = pytest.mark.skipif(
    not aufast.backends()["cpu"].startswith("ready"), reason=f"CPU kernels: {aufast.backends()['cpu']}"
)


def crop(features: Tensor, rois: Tensor, **options) -> Tensor:
    return ops.roi_crop(features, rois, (2, 3), **options)


CALLS = {
    "roi_crop": (
        crop,
        lambda features, rois: reference.roi_crop(features, rois, (2, 3)),
        lambda: (torch.randn(1, 2, 5, 6), torch.tensor([[[0.5, 1.0, 4.0, 4.5]]])),
    ),
    "graph_conv": (
        ops.graph_conv,
        reference.graph_conv,
        lambda: (torch.randn(2, 3, 4), torch.randn(3, 2), torch.randn(3, 2), torch.randn(2, 4, 5)),
    ),
    "graph_gru": (
        lambda *inputs: ops.graph_gru(*inputs)[0],
        lambda *inputs: reference.graph_gru(*inputs)[0],
        lambda: (torch.randn(2, 3, 3, 4), *torch.randn(2, 3, 2), *torch.randn(3, 2, 6, 2)),
    ),
    "region_conv": (
        ops.region_conv,
        reference.region_conv,
        lambda: (torch.randn(2, 3, 4, 6), torch.randn(2, 2, 4, 3, 3, 3), torch.randn(2, 2, 4)),
    ),
}


@pytest.fixture(params=CALLS)
def remembered(request):
    """An operator's function, its definition, and inputs of a call that passed."""
    function, definition, make = CALLS[request.param]
    inputs = make()
    direct.passed.clear()
    function(*inputs)
    assert len(direct.passed) == 1
    yield function, definition, inputs
    direct.passed.clear()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_same_bits(remembered) -> None:
    function, definition, inputs = remembered
    short = function(*inputs)
    direct.passed.clear()
    assert torch.equal(short, function(*inputs))
    torch.testing.assert_close(short, definition(*inputs))


def test_gradients_are_recorded(remembered) -> None:
    function, definition, inputs = remembered
    leaves = [value.clone().requires_grad_() for value in inputs]
    truth = torch.autograd.grad(definition(*leaves).sum(), leaves)
    for found, exact in zip(torch.autograd.grad(function(*leaves).sum(), leaves), truth, strict=True):
        torch.testing.assert_close(found, exact)
    with torch.no_grad():
        assert not function(*leaves).requires_grad
    with torch.inference_mode():
        assert function(*leaves).is_inference()


@pytest.fixture
def leaves(remembered) -> list[Tensor]:
    """Inputs of a call that passed with gradients wanted, so that the next one goes the short way."""
    function, _, inputs = remembered
    leaves = [value.clone().requires_grad_() for value in inputs]
    assert "Recorded" not in function(*leaves).grad_fn.name()
    assert "Recorded" in function(*leaves).grad_fn.name()
    return leaves


def test_recorded_gradients_have_the_same_bits(remembered, leaves) -> None:
    function, _, _ = remembered
    weights = torch.randn_like(function(*leaves))
    for wanted in (leaves, leaves[:1], leaves[1:]):
        short = torch.autograd.grad(function(*leaves), wanted, weights)
        kept = direct.passed.copy()
        direct.passed.clear()
        long = torch.autograd.grad(function(*leaves), wanted, weights)
        direct.passed.update(kept)
        assert all(map(torch.equal, short, long))
    frozen = [leaves[0].detach(), *leaves[1:]]
    assert torch.autograd.grad(function(*frozen).sum(), leaves[1])[0].shape == leaves[1].shape


def test_recorded_gradients_of_higher_order_batched_and_under_checkpointing(remembered, leaves) -> None:
    function, definition, _ = remembered

    def second_order(f) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(*leaves).pow(2).sum(), leaves[1], create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), leaves)

    for found, exact in zip(second_order(function), second_order(definition), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    out = function(*leaves)
    weights = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves[1], weights, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(batched[2], torch.autograd.grad(out, leaves[1], weights[2])[0])
    for reentrant in (True, False):
        again = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=reentrant)
        torch.testing.assert_close(
            torch.autograd.grad(again.sum(), leaves[1])[0]
            if not reentrant
            else _accumulated(again, leaves[1]),
            torch.autograd.grad(function(*leaves).sum(), leaves[1])[0],
        )


def _accumulated(out: Tensor, leaf: Tensor) -> Tensor:
    """The gradient as `backward` leaves it, which re-entrant checkpointing asks for."""
    out.sum().backward()
    return leaf.grad


def test_modes_and_transforms_see_the_call(remembered) -> None:
    function, definition, inputs = remembered
    with Seen() as seen:
        out = function(*inputs)
    assert any("aufast" in name for name in seen.names)
    with FakeTensorMode() as mode:
        assert function(*map(mode.from_tensor, inputs)).shape == out.shape
    stacked = torch.stack([inputs[0], -inputs[0]])
    mapped = torch.vmap(lambda x: function(x, *inputs[1:]))(stacked)
    torch.testing.assert_close(mapped[1], definition(-inputs[0], *inputs[1:]))
    gradients = [
        torch.func.grad(lambda x, f=f: f(x, *inputs[1:]).sum())(inputs[0]) for f in (function, definition)
    ]
    torch.testing.assert_close(*gradients)


def test_a_traced_program_holds_the_operator(remembered) -> None:
    function, definition, inputs = remembered
    traced = torch.jit.trace(lambda x: function(x, *inputs[1:]), (inputs[0],), check_trace=False)
    other = torch.randn_like(inputs[0])
    torch.testing.assert_close(traced(other), definition(other, *inputs[1:]))


def test_other_shapes_are_checked(remembered) -> None:
    function, _, inputs = remembered
    with pytest.raises(ValueError, match="must have shape"):
        function(inputs[0], *(value[..., :1] for value in inputs[1:]))


def test_autocast_and_the_choice_of_a_backend_hold(remembered) -> None:
    function, definition, inputs = remembered
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*inputs).dtype == (torch.float32 if function is crop else torch.bfloat16)
    with aufast.use_backend("reference"):
        assert torch.equal(function(*inputs), definition(*inputs))
    assert aufast.explain(function, *inputs).count("cpu") > 1


def test_regions_in_low_precision_are_widened_every_time() -> None:
    features, rois = CALLS["roi_crop"][2]()
    direct.passed.clear()
    first = crop(features, rois.bfloat16())
    assert not direct.passed
    assert torch.equal(crop(features, rois.bfloat16()), first)


def test_memory_of_signatures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_MOST", 3)
    features, rois = CALLS["roi_crop"][2]()
    for size in range(1, 9):
        ops.roi_crop(features, rois, (size, size))
        assert len(direct.passed) <= 3
    direct.passed.clear()
