"""What a box means: mirrored, empty, outside, not finite; and its gradient there."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from aufast.reference import roi_crop
from tests.reference import loops

# PyTorch remarks on crops of one pixel with align_corners=True; they are defined, and tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")


def test_a_box_of_whole_pixels_copies_them() -> None:
    features = torch.arange(2.0 * 5 * 6, dtype=torch.float64).reshape(1, 2, 5, 6)
    box = torch.tensor([[[1.0, 2.0, 4.0, 5.0]]], dtype=torch.float64)
    torch.testing.assert_close(roi_crop(features, box, (3, 3))[0, 0], features[0, :, 2:5, 1:4])


def test_a_swapped_box_mirrors() -> None:
    features = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    box = torch.tensor([[[0.7, 1.2, 4.1, 4.6]]], dtype=torch.float64)
    mirrored = box[..., [2, 1, 0, 3]]
    torch.testing.assert_close(roi_crop(features, mirrored), roi_crop(features, box).flip(-1))


def test_a_box_without_width_repeats_one_column() -> None:
    features = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    crop = roi_crop(features, torch.tensor([[[2.3, 1.0, 2.3, 4.0]]], dtype=torch.float64), (3, 4))
    torch.testing.assert_close(crop, crop[..., :1].expand_as(crop))
    assert crop.abs().min() > 0


@pytest.mark.parametrize("shift", [(0, 50), (-50, 0), (1e30, 0), (0, -1e300)], ids=str)
def test_a_box_outside_is_zero_without_gradient(shift: tuple[float, float]) -> None:
    features = torch.ones(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    box = torch.tensor([[[1.0, 1.0, 4.0, 4.0]]], dtype=torch.float64)
    box += torch.tensor([*shift, *shift], dtype=torch.float64)
    crop = roi_crop(features, box.requires_grad_())
    crop.sum().backward()
    assert not crop.any() and not features.grad.any() and not box.grad.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("form", ["box", "theta"])
def test_a_region_that_is_not_finite_is_nan_alone_and_passes_no_gradient(form: str, value: float) -> None:
    features = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([[0.5, 0.1, 0.0], [0.0, 0.4, 0.1]], dtype=torch.float64)
    one = torch.tensor([0.6, 0.4, 3.2, 4.1], dtype=torch.float64) if form == "box" else theta
    rois = one.expand(2, 3, *one.shape).clone()
    rois[1, 2].view(-1)[1] = value
    crops = roi_crop(features, rois.requires_grad_())
    broken = torch.zeros(2, 3, dtype=torch.bool)
    broken[1, 2] = True
    assert crops[broken].isnan().all() and not crops[~broken].isnan().any()

    crops.backward(torch.ones_like(crops))
    assert not rois.grad[broken].any() and rois.grad[~broken].any(dim=-1).all()
    alone = features.detach().clone().requires_grad_()
    good = roi_crop(alone, rois.detach()[:, :2]).sum() + roi_crop(alone[:1], rois.detach()[:1, 2:]).sum()
    good.backward()
    torch.testing.assert_close(features.grad, alone.grad)


@pytest.mark.parametrize("align_corners", [False, True])
def test_theta_means_what_grid_sample_means(align_corners: bool) -> None:
    features = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    theta = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    for b, crops in enumerate(roi_crop(features, theta, (3, 8), align_corners=align_corners)):
        grid = F.affine_grid(theta[b], [5, 3, 3, 8], align_corners=align_corners)
        copies = features[b : b + 1].expand(5, -1, -1, -1)
        torch.testing.assert_close(crops, F.grid_sample(copies, grid, align_corners=align_corners))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("form", ["box", "theta", "theta_corners"])
def test_random_regions_equal_the_loops(form: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    height, width, *size = torch.randint(1, 9, (4,), generator=generator).tolist()
    features = torch.randn(1, 2, height, width, dtype=torch.float64, generator=generator)
    shape = (1, 3, 4) if form == "box" else (1, 3, 2, 3)
    rois = torch.randn(shape, dtype=torch.float64, generator=generator) * (5 if form == "box" else 1)
    corners = form == "theta_corners"
    expected = loops.roi_crop(features.numpy(), rois.numpy(), size, corners)
    actual = roi_crop(features, rois, tuple(size), align_corners=corners)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_half_precision_is_sampled_in_float32() -> None:
    features = torch.randn(1, 2, 40, 40).bfloat16()
    box = torch.tensor([[[1.37, 2.71, 33.1, 38.9]]])
    torch.testing.assert_close(
        roi_crop(features, box), roi_crop(features.float(), box).bfloat16(), rtol=0, atol=0
    )


def test_a_map_without_pixels_is_outside_everywhere() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.0, torch.nan, 1.0, 1.0], [0.0, 0.0, 1e38, 1e38]]])
    crops = roi_crop(torch.zeros(1, 2, 0, 5), boxes, (2, 3))
    assert not crops[:, [0, 2]].any() and crops[:, 1].isnan().all()
