"""What PyTorch is told about the operators: schemas, fakes, gradients, aliasing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aufast.ops.backends import OPERATORS
from tests.samples import SAMPLES, TYPICAL, Sample

pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")


# opcheck compares with ==, and NaN is not equal to itself.
COMPARABLE = [s for s in SAMPLES if s.name != "not_finite"]


def costly(sample: Sample) -> list[pytest.MarkDecorator]:
    """opcheck takes long: with the fast tests it looks at one call of each operator."""
    return [] if sample in TYPICAL else [pytest.mark.slow]


def wanted(sample: Sample) -> int:
    """The `needs` mask of every gradient that exists."""
    return sum(1 << k for k, t in enumerate(sample.tensors.values()) if t is not None)


def strides(tensor: Tensor) -> list[int]:
    """The strides that place an element: an axis of size 1 has any."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in axes if size > 1 and tensor.numel()]


@pytest.mark.parametrize(
    ("sample", "requires_grad"),
    [
        *(pytest.param(s, True, id=f"{s}-grad", marks=costly(s)) for s in COMPARABLE),
        *(pytest.param(s, False, id=f"{s}-no_grad") for s in TYPICAL),
    ],
)
def test_opcheck(sample: Sample, requires_grad: bool) -> None:
    operator = getattr(torch.ops.aufast, sample.operator).default
    inputs = sample.inputs(torch.float32, requires_grad)
    torch.library.opcheck(operator, sample.raw_arguments(inputs))


@pytest.mark.parametrize(
    ("sample", "needs"),
    [
        *(pytest.param(s, wanted(s), id=f"{s}-all", marks=costly(s)) for s in COMPARABLE),
        *(pytest.param(s, needs, id=f"{s}-{needs:b}") for s in TYPICAL for needs in (0, 1, 2)),
    ],
)
def test_opcheck_of_the_backward_operator(sample: Sample, needs: int) -> None:
    inputs = sample.inputs(torch.float32, requires_grad=False)
    operator = getattr(torch.ops.aufast, f"{sample.operator}_backward").default
    torch.library.opcheck(operator, sample.raw_backward_arguments(inputs, needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_fakes_promise_what_comes(sample: Sample, dtype: torch.dtype) -> None:
    """Shape, dtype and strides, for the operator and its backward, and for the public function."""
    inputs = sample.inputs(dtype, requires_grad=False)
    forward, backward = (getattr(torch.ops.aufast, sample.operator + end) for end in ("", "_backward"))
    calls = [
        (forward, sample.raw_arguments(inputs)),
        (backward, sample.raw_backward_arguments(inputs, wanted(sample))),
    ]
    for operator, arguments in calls:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            promised = operator(*fakes)
        came = operator(*arguments)
        single = isinstance(came, Tensor)
        for fake, real in zip([promised] if single else promised, [came] if single else came, strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
            assert strides(fake) == strides(real)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_meta_tensors_give_shapes(sample: Sample) -> None:
    inputs = sample.inputs(torch.float32)
    meta = {k: None if t is None else t.to("meta") for k, t in inputs.items()}
    options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in sample.options.items()}
    promise = Sample(sample.operator, sample.name, meta, options)
    for outputs in (promise.public(meta), promise.raw(meta)):
        for fake, real in zip(outputs, sample.public(inputs), strict=True):
            assert fake.device.type == "meta"
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_results_never_alias_the_arguments(sample: Sample) -> None:
    inputs = sample.inputs(requires_grad=False)
    places = {t.untyped_storage().data_ptr() for t in inputs.values() if t is not None and t.numel()}
    for out in sample.raw(inputs):
        assert not out.numel() or out.untyped_storage().data_ptr() not in places


@pytest.mark.parametrize("name", OPERATORS)
def test_an_unwanted_gradient_is_empty(name: str) -> None:
    (sample,) = [s for s in TYPICAL if s.operator == name]
    arguments = sample.raw_backward_arguments(sample.inputs(requires_grad=False), 0)
    grads = getattr(torch.ops.aufast, f"{name}_backward")(*arguments)
    assert [g.shape for g in grads] == [(0,)] * len(sample.tensors)
