"""The region layer against 84 separate convolutions and batch normalisations, and its parts' bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aufast.nn import PatchBatchNorm, RegionConv, RegionLayer
from aufast.nn.region import PatchStatistics


class PlainRegions(nn.Module):
    """One level of the layer as n² separate `BatchNorm2d` and `Conv2d`."""

    def __init__(self, grid, before, after):
        super().__init__()
        self.grid = grid
        self.norms = nn.ModuleList(nn.BatchNorm2d(before) for _ in range(grid * grid))
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for _ in range(grid * grid))

    def forward(self, x):
        rows = []
        for i, row in enumerate(x.chunk(self.grid, dim=2)):
            patches = []
            for j, patch in enumerate(row.chunk(self.grid, dim=3)):
                k = i * self.grid + j
                patches.append(self.convs[k](self.norms[k](patch).relu()))
            rows.append(torch.cat(patches, dim=3))
        return torch.cat(rows, dim=2)


class PlainRegionLayer(nn.Module):
    """The whole layer made of plain modules."""

    def __init__(self, before, out):
        super().__init__()
        self.conv = nn.Conv2d(before, out, 3, padding=1)
        self.levels = nn.ModuleList(
            [
                PlainRegions(8, out, out // 2),
                PlainRegions(4, out // 2, out // 4),
                PlainRegions(2, out // 4, out // 4),
            ]
        )
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x):
        y0 = self.conv(x)
        y1 = self.levels[0](y0)
        y2 = self.levels[1](y1)
        y3 = self.levels[2](y2)
        return self.norm(y0 + torch.cat([y1, y2, y3], dim=1)).relu()


def randomize(module):
    """Give every parameter and running statistic a value of its own."""
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 2)
        elif value.is_floating_point():
            value.data.normal_()


def stacked(modules, attribute, grid):
    return torch.stack([getattr(module, attribute) for module in modules]).unflatten(0, (grid, grid))


def copy_plain(layer, plain):
    layer.conv.load_state_dict(plain.conv.state_dict())
    layer.norm.load_state_dict(plain.norm.state_dict())
    with torch.no_grad():
        for region, level in zip(layer.regions, plain.levels, strict=True):
            grid = region.grid
            region.weight.copy_(stacked(level.convs, "weight", grid))
            region.bias.copy_(stacked(level.convs, "bias", grid))
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(region.norm, name).copy_(stacked(level.norms, name, grid))


@pytest.fixture
def twins():
    plain = PlainRegionLayer(3, 8).double()
    randomize(plain)
    layer = RegionLayer(3, 8, dtype=torch.float64)
    copy_plain(layer, plain)
    return layer, plain


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_outputs_and_gradients_equal_separate_modules(twins, training, channels_last):
    layer, plain = (module.train(training) for module in twins)
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer(ours), plain(theirs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(expected)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.conv.weight.grad, plain.conv.weight.grad)
    torch.testing.assert_close(layer.norm.weight.grad, plain.norm.weight.grad)
    for region, level in zip(layer.regions, plain.levels, strict=True):
        for own, modules in ((region, level.convs), (region.norm, level.norms)):
            for name in ("weight", "bias"):
                expected = torch.stack([getattr(module, name).grad for module in modules])
                torch.testing.assert_close(getattr(own, name).grad.flatten(0, 1), expected)


def test_running_statistics_equal_separate_modules(twins):
    layer, plain = (module.train() for module in twins)
    for _ in range(3):
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64) * 3 + 1
        layer(x)
        plain(x)
    for region, level in zip(layer.regions, plain.levels, strict=True):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(region.norm, name), stacked(level.norms, name, region.grid))
        assert region.norm.num_batches_tracked == level.norms[0].num_batches_tracked == 3


def test_evaluation_leaves_statistics_alone(twins):
    layer = twins[0].eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(torch.randn(1, 3, 16, 16, dtype=torch.float64))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize(("before", "out", "count"), [(3, 32, 322_464), (32, 64, 1_292_928)])
def test_parameter_count(before, out, count):
    layer = RegionLayer(before, out, device="meta")
    assert sum(parameter.numel() for parameter in layer.parameters()) == count


def test_starts_as_convolutions_do():
    layer = RegionLayer(3, 16)
    bound = (9 * 16) ** -0.5
    weight = layer.regions[0].weight
    assert 0.95 * bound < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.05
    assert (layer.regions[0].norm.weight == 1).all()


def test_reset_parameters_forgets():
    layer = RegionLayer(3, 8)
    layer(torch.randn(2, 3, 16, 16))
    old = layer.regions[0].weight.clone()
    layer.reset_parameters()
    assert not torch.equal(old, layer.regions[0].weight)
    assert (layer.regions[0].norm.running_var == 1).all()
    assert layer.regions[0].norm.num_batches_tracked == 0


def test_bfloat16_autocast_stays_near_float32():
    layer = RegionLayer(3, 16)
    x = torch.randn(2, 3, 32, 32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert layer.regions[0].norm.running_mean.dtype == torch.float32


def test_repr_names_the_sizes():
    text = repr(RegionLayer(3, 8))
    assert "grid=8, 8, 4" in text
    assert "momentum=0.1" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegionLayer(3, 10), "out_channels must be divisible by 4, got 10"),
        (lambda: RegionLayer(0, 8), "in_channels must be an integer of at least 1, got 0"),
        (lambda: RegionLayer(3, 8, grids=(8, 4)), "grids must be three sizes"),
        (lambda: RegionConv(2, 3, 4)(torch.ones(1, 3, 5, 4)), r"divisible by 2, got \(1, 3, 5, 4\)"),
        (lambda: RegionConv(2, 3, 4)(torch.ones(1, 2, 4, 4)), r"\(B, 3, H, W\).*got \(1, 2, 4, 4\)"),
        (lambda: RegionConv(2, 3, 4)(torch.ones(3, 4, 4)), r"\(B, 3, H, W\).*got \(3, 4, 4\)"),
        (
            lambda: PatchBatchNorm(4, 3)(torch.ones(1, 3, 4, 4)),
            "at least 2 values per patch and channel, got 1",
        ),
    ],
    ids=["channels", "zero", "grids", "indivisible", "channel-count", "rank", "one-value"],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patch_statistics_are_var_means_to_any_order():
    def plain(patches):
        return torch.var_mean(patches, dim=(0, 3, 5), correction=0, keepdim=True)

    patches = torch.randn(2, 3, 2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(PatchStatistics.apply(patches), plain(patches))
    weights = [torch.randn(1, 3, 2, 1, 2, 1, dtype=torch.float64) for _ in range(2)]
    found, expected = (
        torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, f(patches), strict=True)), patches)
        for f in (PatchStatistics.apply, plain)
    )
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(PatchStatistics.apply, patches, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(PatchStatistics.apply, patches)


def test_statistics_of_patches_keep_their_digits_far_from_zero():
    patches = 1000 + torch.randn(2, 3, 2, 5, 2, 7)
    exact = torch.var_mean(patches.double(), dim=(0, 3, 5), correction=0, keepdim=True)
    for found, truth in zip(PatchStatistics.apply(patches), exact, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)
