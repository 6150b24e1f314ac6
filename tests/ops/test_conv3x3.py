"""conv3x3 is conv2d by other sums: output and gradients at every size, layout, dtype, level and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import aufast
from aufast.ops.conv3x3 import conv3x3, fused_conv3x3, serves

pytestmark = [
    pytest.mark.skipif(
        not aufast.backends()["cpu"].startswith("ready"), reason="the compiled CPU part is not built"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
]
# Relative RMS error against float64.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
# Batch, groups, inputs, outputs, height, width.
SHAPES = [
    pytest.param((2, 9, 128, 128, 6, 6), id="regions"),
    pytest.param((9, 8, 64, 128, 6, 6), id="blocks_of_images"),
    pytest.param((2, 1, 64, 64, 48, 40), id="one_network"),
    pytest.param((1, 2, 32, 272, 13, 17), id="two_networks"),
    pytest.param((5, 1, 32, 16, 5, 7), id="odd_sizes"),
    pytest.param((1, 17, 16, 48, 1, 1), id="one_pixel"),
    pytest.param((3, 2, 16, 16, 1, 9), id="one_row"),
    pytest.param((2, 8, 16, 32, 11, 2), id="tall"),
    pytest.param((0, 2, 16, 16, 6, 6), id="no_image"),
    pytest.param((0, 8, 16, 16, 6, 6), id="no_image_of_many"),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """(B, G, C, h, w) as crops come, as a channels_last map, as a plain one, or as a part of one."""
    if layout == "crops":
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "channels_last":
        return x.flatten(1, 2).contiguous(memory_format=torch.channels_last).unflatten(1, x.shape[1:3])
    return F.pad(x, (1, 2))[..., 1:-2] if layout == "view" else x


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "crops") -> tuple[Tensor, Tensor, Tensor]:
    """Maps, filters and the incoming gradient, some of them exact zeros as after a ReLU."""
    batch, groups, inputs, outputs, height, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, groups, inputs, height, width, generator=generator).relu()
    weight = torch.randn(groups * outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    grad = torch.randn(batch, groups * outputs, height, width, generator=generator)
    return laid_out(x.to(dtype), layout), weight.to(dtype), grad.to(dtype)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.flatten(1, 2), weight, padding=1, groups=x.shape[1])


def results(function, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def distance(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@pytest.mark.parametrize("layout", ["crops", "channels_last", "plain", "view"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_the_convolutions(shape, dtype, layout):
    x, weight, grad = make(shape, dtype, layout)
    exact = results(plain, x.double(), weight.double(), grad.double())
    for actual, expected in zip(results(conv3x3, x, weight, grad), exact, strict=True):
        assert actual.dtype == dtype
        assert distance(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.skipif(
    os.environ.get("AUFAST_CPU_ISA") == "baseline",
    reason="without fused multiply-adds every product is rounded, and PyTorch's are not",
)
@pytest.mark.parametrize("groups", [1, 8], ids=["one_network", "regions"])
@pytest.mark.parametrize("channels", [64, 128])
def test_float32_is_as_near_to_the_exact_sums_as_the_sum_over_taps(channels, groups):
    """At most twice as far from float64 as PyTorch's own convolution of the same layout."""
    x, weight, grad = make((8, groups, channels, channels, 6, 6), torch.float32, "channels_last")
    exact = results(plain, x.double(), weight.double(), grad.double())
    theirs = results(plain, x, weight, grad)
    ours = results(conv3x3, x, weight, grad)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert distance(mine, truth) <= 2 * distance(other, truth)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "shortcut"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_shortcut_and_relu(dtype, groups, relu, added):
    x, weight, shortcut = make((3, groups, 32, 16, 5, 6), dtype)
    bias = torch.randn(16 * groups, dtype=dtype)
    exact = plain(x.double(), weight.double()) + bias.double()[:, None, None]
    exact = exact + shortcut.double() if added else exact
    found = fused_conv3x3(x, weight, bias, shortcut if added else None, relu=relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert distance(found, exact.relu() if relu else exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("groups", [1, 8])
def test_gradients_of_two_orders(groups):
    x, weight, _ = make((2, groups, 16, 16, 3, 2), torch.float64)
    inputs = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(conv3x3, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(conv3x3, inputs, fast_mode=True)


@pytest.mark.parametrize("groups", [2, 8])
def test_a_gradient_alone_is_the_one_of_both(groups):
    x, weight, grad = make((3, groups, 16, 32, 6, 6), torch.float32)
    _, d_x, d_weight = results(conv3x3, x, weight, grad)
    leaf = x.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(conv3x3(leaf, weight), leaf, grad)[0], d_x)
    leaf = weight.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(conv3x3(x, leaf), leaf, grad)[0], d_weight)
    assert d_weight.is_contiguous()


@pytest.mark.parametrize(
    ("shape", "ours"),  # the gradient of one network's filters is PyTorch's
    [pytest.param((9, 8, 64, 128, 6, 6), 3, id="regions"), pytest.param((5, 1, 32, 64, 31, 18), 2, id="one")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_at_any_number_of_threads_and_in_any_batch(dtype, shape, ours):
    x, weight, grad = make(shape, dtype)
    torch.set_num_threads(1)
    expected = results(conv3x3, x, weight, grad)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = results(conv3x3, x, weight, grad)
        assert all(torch.equal(again[k], expected[k]) for k in range(ours))
    for actual, whole in zip(results(conv3x3, x[3:4], weight, grad[3:4])[:2], expected, strict=False):
        assert torch.equal(actual[0], whole[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_stays_in_its_map_and_is_never_lost(value):
    x, weight, _ = make((2, 2, 16, 16, 6, 6), torch.float32)
    sound = conv3x3(x, weight)
    x[1, 0, 3, 2, 5] = value
    found = conv3x3(x, weight)
    assert not found[1, :16, 1:4, 4:].isfinite().any()  # what its taps reach
    assert torch.equal(fused_conv3x3(x, weight, relu=True).isnan(), found.isnan())
    assert torch.equal(found[0], sound[0])
    assert torch.equal(found[1, 16:], sound[1, 16:])


def test_who_is_not_served():
    x, weight, _ = make((4, 2, 16, 16, 6, 6), torch.float32)
    assert serves(x, weight)
    assert not serves(x.bfloat16(), weight.bfloat16())
    assert not serves(x[:, :, :8], weight[:, :8])
    assert not serves(x, weight[..., :2])
    assert not serves(x[:3], weight)
    assert not serves(x.to("meta"), weight.to("meta"))
    with aufast.use_backend("reference"):
        assert not serves(x, weight)
    with torch.autocast("cpu"):
        assert not serves(x, weight)
    with torch.autograd.forward_ad.dual_level():
        assert not serves(x, weight)
    seen = []
    torch.func.vmap(lambda x: seen.append(serves(x, weight)) or x)(x[None])
    assert seen == [False]


def test_what_pytorch_was_told_is_true():
    x, weight, grad = make((2, 2, 16, 32, 5, 6), torch.float32)
    maps, filters = x.permute(0, 1, 3, 4, 2), weight.unflatten(0, (2, 32))
    result = grad.permute(0, 2, 3, 1).contiguous().unflatten(3, (2, 32))
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.aufast.conv3x3.default
    torch.library.opcheck(forward, (maps, filters, torch.ones(2, 32), result, True, False), test_utils=checks)
    back = result.permute(0, 3, 1, 2, 4), filters, None, None, False, True
    torch.library.opcheck(forward, back, test_utils=checks)
    torch.library.opcheck(torch.ops.aufast.conv3x3_filters.default, (result, maps), test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(level):
    """All tests of this file again, in a process that is held to a level."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not instruction_set"]
    environment = os.environ | {"AUFAST_CPU_ISA": level}
    here = Path(__file__).parents[2]
    done = subprocess.run([*command, __file__], env=environment, cwd=here, capture_output=True, text=True)
    if "asks for more than this CPU has" in done.stdout:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
