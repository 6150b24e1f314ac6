"""Every wrong argument is one sentence: the operator, the argument, what came and what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from aufast import ops


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


GOOD: dict[str, dict[str, Any]] = {
    "roi_crop": {"features": zeros(2, 3, 8, 6), "rois": zeros(2, 5, 4)},
    "graph_conv": {
        "x": zeros(2, 5, 3), "U": zeros(5, 2), "Q": zeros(5, 2), "W": zeros(2, 3, 4), "bias": zeros(2, 4),
    },
    "graph_gru": {
        "x": zeros(2, 7, 5, 3), "U": zeros(5, 2), "Q": zeros(5, 2),
        "W_z": zeros(2, 7, 4), "W_r": zeros(2, 7, 4), "W_h": zeros(2, 7, 4), "h0": zeros(2, 5, 4),
        "biases": (zeros(2, 4), zeros(2, 4), zeros(2, 4)), "lengths": torch.tensor([3, 7]),
    },
    "region_conv": {
        "x": zeros(2, 3, 8, 6), "weight": zeros(2, 2, 4, 3, 3, 3), "bias": zeros(2, 2, 4),
        "scale": zeros(2, 2, 3), "shift": zeros(2, 2, 3),
    },
}  # fmt: skip

SIZE = r"size must be two non-negative integers \(h, w\), got "
GATES = ("W_z", "W_r", "W_h")
# For each operator: the wrong arguments, and the words that name the culprit, what came and what was wanted.
WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "roi_crop": [
        ({"features": zeros(3, 8, 6)}, r"features must have shape \(B, C, H, W\), got \(3, 8, 6\)"),
        ({"features": zeros(2, 3, 0, 6)}, r"features must have at least one pixel, got \(2, 3, 0, 6\)"),
        ({"rois": zeros(2, 5, 5)}, r"rois must have shape \(B=2, R=5, 4\), got \(2, 5, 5\)"),
        ({"rois": zeros(3, 5, 4)}, r"rois must have shape \(B=2, R=5, 4\), got \(3, 5, 4\)"),
        ({"rois": zeros(2, 5, 3, 2)}, r"rois must have shape \(B=2, R=5, 2, 3\), got \(2, 5, 3, 2\)"),
        ({"rois": zeros(5, 4)}, r"rois must have shape \(B=2, R, 4\), got \(5, 4\)"),
        ({"align_corners": True}, "boxes .* are defined for align_corners=False; give rois as θ"),
        ({"size": (-1, 6)}, SIZE + r"\(-1, 6\)"),
        ({"size": (6.0, 6)}, SIZE + r"\(6.0, 6\)"),
        ({"size": (6, 6, 6)}, SIZE + r"\(6, 6, 6\)"),
        ({"size": 6}, SIZE + "6"),
        ({"size": None}, SIZE + "None"),
    ],
    "graph_conv": [
        ({"x": zeros(3)}, r"x must have shape \(\.\.\., m, cin\), got \(3,\)"),
        ({"U": zeros(4, 2)}, r"U must have shape \(m=5, ce=2\), got \(4, 2\)"),
        ({"Q": zeros(4, 2)}, r"Q must have shape \(m=5, ce=2\), got \(4, 2\)"),
        ({"Q": zeros(5, 3)}, r"Q must have shape \(m=5, ce=2\), got \(5, 3\)"),
        ({"Q": None}, r"W must have shape \(cin=3, cout\), got \(2, 3, 4\)"),
        ({"W": zeros(3, 3, 4)}, r"W must have shape \(ce=2, cin=3, cout=4\), got \(3, 3, 4\)"),
        ({"W": zeros(2, 2, 4)}, r"W must have shape \(ce=2, cin=3, cout=4\), got \(2, 2, 4\)"),
        ({"W": zeros(3, 4)}, r"W must have shape \(ce=2, cin=3, cout\), got \(3, 4\)"),
        ({"bias": zeros(4)}, r"bias must have shape \(ce=2, cout=4\), got \(4,\)"),
        ({"bias": zeros(2, 5)}, r"bias must have shape \(ce=2, cout=4\), got \(2, 5\)"),
        ({"normalization": "softmax"}, r"W must have shape \(ce=2, K, cin=3, cout\), got \(2, 3, 4\)"),
        ({"normalization": "softmax", "W": zeros(2, 0, 3, 4)}, "W must hold at least one support, got K=0"),
        ({"normalization": "row"}, "normalization must be 'global' or 'softmax', got 'row'"),
    ],
    "graph_gru": [
        ({"x": zeros(7, 5, 3)}, r"x must have shape \(B, T, m, c_in\), got \(7, 5, 3\)"),
        ({"U": zeros(6, 2)}, r"U must have shape \(m=5, ce=2\), got \(6, 2\)"),
        ({"Q": zeros(5, 3)}, r"Q must have shape \(m=5, ce=2\), got \(5, 3\)"),
        ({"W_z": zeros(3, 7, 4)}, r"W_z must have shape \(ce=2, c\+c_in=7, c=4\), got \(3, 7, 4\)"),
        ({"W_r": zeros(2, 7, 5)}, r"W_r must have shape \(ce=2, c\+c_in=7, c=4\), got \(2, 7, 5\)"),
        ({"W_h": zeros(2, 6, 4)}, r"W_h must have shape \(ce=2, c\+c_in=7, c=4\), got \(2, 6, 4\)"),
        (dict.fromkeys(GATES, zeros(2, 8, 4)), r"W_z must have c \+ c_in = 4 \+ 3 rows .*got \(2, 8, 4\)"),
        (
            {"normalization": "softmax"} | dict.fromkeys(GATES, zeros(2, 0, 7, 4)),
            "W_z must hold at least one support, got K=0",
        ),
        ({"normalization": None}, "normalization must be 'global' or 'softmax', got None"),
        ({"h0": zeros(2, 5, 3)}, r"h0 must have shape \(B=2, m=5, c=4\), got \(2, 5, 3\)"),
        ({"h0": zeros(1, 5, 4)}, r"h0 must have shape \(B=2, m=5, c=4\), got \(1, 5, 4\)"),
        ({"biases": zeros(3, 2, 4)}, r"biases must be three tensors \(b_z, b_r, b_h\), got Tensor"),
        ({"biases": (zeros(2, 4),) * 2}, r"biases must be three tensors \(b_z, b_r, b_h\), got tuple"),
        ({"biases": (None, zeros(2, 4), zeros(2, 4))}, "biases must be three .*, got None among them"),
        ({"biases": (zeros(2, 4), zeros(2, 4), zeros(5))}, r"biases\[2\] must have shape .* got \(5,\)"),
        ({"lengths": torch.tensor([3])}, r"lengths must be \(2,\) int64, got \(1,\) torch.int64"),
        ({"lengths": zeros(2)}, r"lengths must be \(2,\) int64, got \(2,\) torch.float32"),
        ({"lengths": [3, 7]}, r"lengths must be \(2,\) int64, got list"),
        ({"lengths": zeros(2, dtype=torch.int64, device="meta")}, "lengths is on meta, but the input is on"),
    ],
    "region_conv": [
        ({"x": zeros(3, 8, 6)}, r"x must have shape \(B, C_in, H, W\), got \(3, 8, 6\)"),
        ({"x": zeros(2, 3, 7, 6)}, "x must have H and W divisible by n=2 and not 0, got H=7 and W=6"),
        ({"x": zeros(2, 3, 8, 5)}, "x must have H and W divisible by n=2 and not 0, got H=8 and W=5"),
        ({"x": zeros(2, 3, 0, 6)}, "x must have H and W divisible by n=2 and not 0, got H=0 and W=6"),
        ({"weight": zeros(0, 0, 4, 3, 3, 3)}, r"weight must have at least one patch, .*got \(0, 0, 4"),
        ({"weight": zeros(2, 2, 0, 3, 3, 3)}, r"weight must have .* one filter and .*got \(2, 2, 0"),
        (
            {"x": zeros(2, 0, 8, 6), "weight": zeros(2, 2, 4, 0, 3, 3), "scale": None, "shift": None},
            r"weight must have .* one input channel, got \(2, 2, 4, 0",
        ),
        ({"weight": zeros(2, 1, 4, 3, 3, 3)}, r"weight must have shape \(n=2, n=2, .*got \(2, 1, 4"),
        ({"weight": zeros(2, 2, 4, 2, 3, 3)}, r"weight must have shape \(.*C_in=3, 3, 3\), got \(2, 2, 4, 2"),
        ({"weight": zeros(2, 2, 4, 3, 5, 5)}, r"weight must have shape .*3, 3\), got .*5, 5\)"),
        ({"bias": zeros(2, 2, 3)}, r"bias must have shape \(n=2, n=2, C_out=4\), got \(2, 2, 3\)"),
        ({"scale": zeros(2, 2, 4)}, r"scale must have shape \(n=2, n=2, C_in=3\), got \(2, 2, 4\)"),
        ({"shift": zeros(3)}, r"shift must have shape \(n=2, n=2, C_in=3\), got \(3,\)"),
        ({"shift": None}, "scale and shift must be given together"),
        ({"scale": None}, "scale and shift must be given together"),
    ],
}


def call(operator: str, changes: dict[str, Any]) -> Any:
    return getattr(ops, operator)(**(GOOD[operator] | changes))


def with_one(operator: str, name: str, value: Any) -> dict[str, Any]:
    """The change that puts `value` in the place of one tensor, biases[k] included."""
    if not name.startswith("biases"):
        return {name: value}
    k = int(name[-2])
    biases = GOOD[operator]["biases"]
    return {"biases": (*biases[:k], value, *biases[k + 1 :])}


FLOATING = [
    (operator, name)
    for operator, arguments in GOOD.items()
    for argument in arguments
    if argument != "lengths"
    for name in ([f"biases[{k}]" for k in range(3)] if argument == "biases" else [argument])
]


def value_of(operator: str, name: str) -> Tensor:
    return GOOD[operator]["biases"][int(name[-2])] if name.startswith("biases") else GOOD[operator][name]


@pytest.mark.parametrize("operator", GOOD)
def test_the_right_arguments_pass(operator: str) -> None:
    call(operator, {})


@pytest.mark.parametrize(
    ("operator", "changes", "words"),
    [
        pytest.param(operator, *case, id=f"{operator}-{k}-{'_'.join(case[0])}")
        for operator, cases in WRONG.items()
        for k, case in enumerate(cases)
    ],
)
def test_wrong_shapes_and_values(operator: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{operator}: {words}") as caught:
        call(operator, changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8], ids=str
)
@pytest.mark.parametrize(("operator", "name"), FLOATING, ids=".".join)
def test_numbers_that_are_not_floating(operator: str, name: str, dtype: torch.dtype) -> None:
    wrong = value_of(operator, name).to(dtype)
    with pytest.raises(TypeError, match=f"^{operator}: {re.escape(name)} must be float16, .*got {dtype}"):
        call(operator, with_one(operator, name, wrong))


@pytest.mark.parametrize(("operator", "name"), FLOATING, ids=".".join)
def test_what_is_no_tensor(operator: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{operator}: {re.escape(name)} must be a tensor, got list"):
        call(operator, with_one(operator, name, [1.0, 2.0]))


def culprit(operator: str, name: str) -> str:
    """Who is named when `name` differs: the first argument decides, so for it the second one is."""
    first, second = list(GOOD[operator])[:2]
    return re.escape(second if name == first else name)


@pytest.mark.parametrize(("operator", "name"), FLOATING, ids=".".join)
def test_another_device(operator: str, name: str) -> None:
    words = f"{culprit(operator, name)} is on (meta|cpu), but the input is on (cpu|meta)"
    with pytest.raises(ValueError, match=f"^{operator}: {words}"):
        call(operator, with_one(operator, name, value_of(operator, name).to("meta")))


@pytest.mark.parametrize(("operator", "name"), FLOATING[2:], ids=".".join)
def test_another_floating_dtype(operator: str, name: str) -> None:
    words = f"{culprit(operator, name)} is torch.float.., but the input is torch.float"
    with pytest.raises(TypeError, match=f"^{operator}: {words}"):
        call(operator, with_one(operator, name, value_of(operator, name).double()))


@pytest.mark.parametrize(("operator", "name"), FLOATING[:2], ids=".".join)
def test_regions_may_have_a_precision_of_their_own(operator: str, name: str) -> None:
    wide = value_of(operator, name).double()
    assert call(operator, {name: wide}).dtype == (torch.float64 if name == "features" else torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_region_that_is_not_finite_is_data(value: float) -> None:
    rois = GOOD["roi_crop"]["rois"].clone()
    rois[1, 3, 0] = value
    crops = call("roi_crop", {"rois": rois})
    assert crops[1, 3].isnan().all() and crops.isnan().sum() == crops[1, 3].numel()
