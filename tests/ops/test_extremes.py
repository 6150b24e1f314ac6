"""Sizes of nothing, numbers at the edge of their range, and regions repeated or broken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import aufast
from aufast import nn, ops, reference
from tests.samples import TYPICAL, Sample, relative_error, ways

pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")
BACKENDS = ["reference"] + (["cpu"] if aufast.backends()["cpu"].startswith("ready") else [])
SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 1e-40)
EACH_ARGUMENT = [(sample, name) for sample in TYPICAL for name, t in sample.tensors.items() if t is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("nodes", "cin", "cout"), [(0, 3, 4), (3, 0, 4), (3, 3, 0)], ids=["m", "c_in", "c"])
def test_a_graph_of_nothing_gives_nothing(nodes: int, cin: int, cout: int, backend: str) -> None:
    def embedding() -> Tensor:
        return torch.randn(nodes, 2, requires_grad=True)

    pools = [torch.randn(2, cout + cin, cout, requires_grad=True) for _ in range(3)]
    x = torch.randn(2, 3, nodes, cin)
    out, last = ops.graph_gru(x, embedding(), embedding(), *pools, backend=backend)
    # Without inputs the state stays at zero: tanh(0) = 0.
    assert out.shape == (2, 3, nodes, cout) and last.shape == (2, nodes, cout) and not out.any()
    W = torch.randn(2, cin, cout, requires_grad=True)
    out = ops.graph_conv(torch.randn(2, nodes, cin), embedding(), embedding(), W, backend=backend)
    assert out.shape == (2, nodes, cout) and not out.any()
    out.sum().backward()
    assert not W.grad.any()


@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize(("sample", "name"), EACH_ARGUMENT, ids=lambda v: str(v))
def test_an_extreme_number_in_any_argument_is_as_visible_as_in_the_definition(
    sample: Sample, name: str, value: float
) -> None:
    """Never an error, and never a finite number where exact formulas in the same order have none."""
    tensors = sample.inputs(requires_grad=False)
    tensors[name].view(-1)[0] = value
    truth = ways(sample)["reference"](tensors)
    for way, call in ways(sample).items():
        for actual, expected in zip(call(tensors), truth, strict=True):
            assert torch.equal(actual.isfinite(), expected.isfinite()), way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled CPU part is not built")
def test_a_graph_whose_products_leave_half_precision_is_made_in_float32(dtype: torch.dtype) -> None:
    """300² · 2 is more than float16 holds; the kernel's sums are float32."""
    x, Q, W = torch.randn(2, 3, 4), torch.randn(3, 2), torch.randn(2, 4, 5)
    arguments = [t.to(dtype) for t in (x, torch.full((3, 2), 300.0), Q, W)]
    truth = reference.graph_conv(*(t.double() for t in arguments))
    out = ops.graph_conv(*arguments, backend="cpu")
    assert out.isfinite().all() and relative_error(out, truth) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_beyond_float32_give_nan_and_no_number(backend: str) -> None:
    U = torch.full((3, 2), 1e30)
    out = ops.graph_conv(torch.randn(2, 3, 4), U, torch.randn(3, 2), torch.randn(2, 4, 5), backend=backend)
    assert out.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_box_given_many_times_gathers_as_many_gradients(backend: str) -> None:
    maps = torch.randn(1, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    box = torch.tensor([[[1.3, 2.1, 6.4, 7.7]]], dtype=torch.float64)
    (once,) = torch.autograd.grad(ops.roi_crop(maps, box, backend=backend).cos().sum(), maps)
    many = ops.roi_crop(maps, box.expand(1, 24, 4), backend=backend)
    (gathered,) = torch.autograd.grad(many.cos().sum(), maps)
    torch.testing.assert_close(gathered, 24 * once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_factor_that_is_not_finite_is_seen_in_its_own_crop(value: float) -> None:
    roi = nn.AdaptiveRoi(8, 3, squeeze=4)
    with torch.no_grad():
        roi.scale.bias[4] = value  # x1 of the second box
    boxes = torch.tensor([[1.0, 1.0, 5.0, 5.0]]).expand(2, 3, 4)
    crops = roi(torch.randn(2, 8, 9, 9), boxes)[0]
    assert crops[:, 1].isnan().all()
    assert crops[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_map_that_is_nan_outside_of_a_box_does_not_reach_it(backend: str) -> None:
    """Zeros outside: what no sample touches is not multiplied by zero, which would be NaN."""
    maps = torch.full((1, 2, 9, 9), torch.nan)
    maps[..., 2:7, 2:7] = 1.0
    crops = ops.roi_crop(maps, torch.tensor([[[3.0, 3.0, 6.0, 6.0]]]), (3, 3), backend=backend)
    assert torch.equal(crops, torch.ones_like(crops))


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_deterministic_mode_changes_and_refuses_nothing(sample: Sample) -> None:
    def results() -> list[Tensor]:
        leaves = sample.inputs()
        outputs = sample.public(leaves)
        wanted = [t for t in leaves.values() if t is not None]
        return [*outputs, *torch.autograd.grad([o.cos().sum() for o in outputs], wanted)]

    before = results()
    if "cpu" not in BACKENDS and sample.operator == "roi_crop":
        pytest.skip("grid_sample's backward, which the definition uses, has no such promise")
    torch.use_deterministic_algorithms(True)
    try:
        after = results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
