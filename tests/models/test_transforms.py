"""Forward mode through whole models: the derivatives of reverse mode, or an error that says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

from aufast.models import AAR, MARGL
from tests.models.examples import inputs, randomize, small

CROPPING = [name for name in MARGL.variants if name != "resnet18"]
WHOLE = ["resnet18", *AAR.variants]


def mostly_slow(names: list[str], *fast: str) -> list[Any]:
    """As parameters; all but these are run with the slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def prepared(name: str, training: bool) -> tuple[MARGL | AAR, Callable[..., Tensor], Tensor, Tensor]:
    """A model in float64, what it makes of images with a state or its own, images, and a direction."""
    model = small(name).double()
    randomize(model)
    images, *rest = inputs(model.train(training), dtype=torch.float64)

    def f(x: Tensor, state: dict[str, Tensor] | None = None) -> Tensor:
        return functional_call(model, state or {}, (x, *rest)).probabilities

    return model, f, images, torch.randn_like(images)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", mostly_slow(WHOLE, "resnet18", "aar"))
def test_forward_mode_agrees_with_reverse_mode(name: str, training: bool) -> None:
    model, f, images, direction = prepared(name, training)
    leaf = images.clone().requires_grad_()
    out = f(leaf)
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weights).sum(), leaf)
    truth = (gradient * direction).sum()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(images, direction))).tangent
    torch.testing.assert_close((tangent * weights).sum(), truth)
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    def pure(x: Tensor) -> Tensor:
        """The model with statistics of its own for every call."""
        return f(x, {key: value.clone() for key, value in state.items()})

    torch.testing.assert_close((jvp(pure, (images,), (direction,))[1] * weights).sum(), truth)


@pytest.mark.parametrize("name", mostly_slow(WHOLE, "resnet18", "aar"))
def test_a_transform_of_a_model_that_changes_its_statistics_is_refused(name: str) -> None:
    """`torch.func` wants functions without side effects; in training a model moves its running statistics."""
    _, f, images, direction = prepared(name, training=True)
    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        jvp(f, (images,), (direction,))


@pytest.mark.parametrize("name", mostly_slow(CROPPING, "margl"))
def test_forward_mode_through_crops_is_refused_in_one_sentence(name: str) -> None:
    _, f, images, direction = prepared(name, training=False)
    sentence = "^roi_crop: no forward mode .*; use reverse mode$"
    with pytest.raises(NotImplementedError, match=sentence), forward_ad.dual_level():
        f(forward_ad.make_dual(images, direction))
    with pytest.raises(NotImplementedError, match=sentence):
        jvp(f, (images,), (direction,))
