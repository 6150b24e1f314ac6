"""Calls drawn at random, on every backend that is here, against the definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aufast.ops import backends
from tests.samples import Tensors, relative_error, run
from tests.strategies import CALLS, SPECIAL, Call, examples

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior"),
]
BACKENDS = [
    name
    for name in ("cpu", "triton")
    if all(backends.can_run(name, operator, torch.empty(0)) is None for operator in CALLS)
]
each = pytest.mark.parametrize(("operator", "backend"), [(o, b) for o in CALLS for b in BACKENDS])


def computed(call: Call, backend: str) -> Callable[[Tensors], tuple[Tensor, ...]]:
    return lambda leaves: call.public(leaves, backend)


@each
def test_float64_is_the_definitions(operator: str, backend: str) -> None:
    @examples(40)
    @given(CALLS[operator]())
    def check(call: Call) -> None:
        truth = run(computed(call, "reference"), call.sample.inputs())
        actual = run(computed(call, backend), call.sample.inputs())
        assert actual.keys() == truth.keys()
        for name in truth:
            assert relative_error(actual[name], truth[name]) <= 1e-11, name

    check()


@each
def test_lower_precision_is_near_what_the_definition_reaches(operator: str, backend: str) -> None:
    """At most four times as far from the truth as the definition in that dtype, and eight roundings."""

    @examples(30)
    @given(CALLS[operator](), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def check(call: Call, dtype: torch.dtype) -> None:
        rounded = call.sample.inputs(dtype, requires_grad=False)
        exact = {k: None if t is None else t.double().requires_grad_() for k, t in rounded.items()}
        truth = run(computed(call, "reference"), exact)
        definition = run(computed(call, "reference"), call.sample.inputs(dtype))
        actual = run(computed(call, backend), call.sample.inputs(dtype))
        limit = 4 * max(relative_error(definition[name], truth[name]) for name in truth)
        for name in truth:
            assert actual[name].dtype == definition[name].dtype
            error = relative_error(actual[name], truth[name])
            assert error <= limit + 8 * torch.finfo(dtype).eps, name

    check()


def spread_by_zeros(call: Call, special: float) -> bool:
    """Whether the definition spreads a number by 0 · Inf or 0 · NaN alone.

    The first support of a softmax graph is I: the definition multiplies the other nodes by zero, a kernel
    leaves them out. Where it is the only one, no number reaches another node; where others follow, a NaN does
    and an infinity may end in a gate that is 0 or 1.
    """
    if call.sample.options.get("normalization") != "softmax":
        return False
    name = "W_z" if call.sample.operator == "graph_gru" else "W"
    return math.isinf(special) or call.views[name](call.sample.tensors[name]).shape[-3] == 1


@each
def test_a_number_that_is_not_finite_stays_in_its_image_or_sequence(operator: str, backend: str) -> None:
    """And is never made finite: where the definition has no finite number, nobody has."""

    @examples(30)
    @given(CALLS[operator](), st.sampled_from(SPECIAL), st.integers(0, 10**6))
    def check(call: Call, special: float, place: int) -> None:
        leaves = call.sample.inputs(requires_grad=False)
        first = next(iter(leaves))
        arguments = {k: None if t is None else call.views[k](t).clone() for k, t in leaves.items()}
        clean = call.sample.public(arguments, backend)
        values = arguments[first]
        if not values.numel() or values.dim() < 3:
            return
        index = place % values.numel()
        values[torch.unravel_index(torch.tensor(index), values.shape)] = special
        spoiled = call.sample.public(arguments, backend)
        truth = call.sample.public(arguments, "reference")
        mine = index // (values.numel() // len(values))
        for before, after, exact in zip(clean, spoiled, truth, strict=True):
            others = [k for k in range(len(before)) if k != mine]
            assert torch.equal(before[others], after[others])
            assert spread_by_zeros(call, special) or not (after.isfinite() & ~exact.isfinite()).any()

    check()
