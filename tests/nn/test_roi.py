"""ROI layers: β = 1 at the start, gradients reach β, and bad input is named."""

from __future__ import annotations

import pytest
import torch

from aufast import reference
from aufast.nn import AdaptiveRoi, RoiCrop

BOXES = torch.tensor([[[1.0, 2.0, 6.0, 7.0], [3.5, 0.5, 9.0, 4.0], [-1.0, 6.0, 4.0, 13.0]]] * 2)


@pytest.fixture
def features():
    return torch.randn(2, 16, 12, 12)


def test_roi_crop_is_the_definition(features):
    expected = reference.roi_crop(features, BOXES, (4, 5))
    torch.testing.assert_close(RoiCrop((4, 5))(features, BOXES), expected)


def test_starts_with_the_initial_boxes(features):
    layer = AdaptiveRoi(16, rois=3, squeeze=8)
    crops, boxes = layer(features, BOXES)
    assert torch.equal(boxes, BOXES)
    torch.testing.assert_close(crops, reference.roi_crop(layer.squeeze(features), BOXES, (6, 6)))


def test_boxes_are_factors_times_corners(features):
    layer = AdaptiveRoi(16, rois=3, squeeze=8, scale_weight_std=1.0)
    _, boxes = layer(features, BOXES)
    pooled = layer.squeeze(features).mean((2, 3))
    beta = (pooled @ layer.scale.weight.T + 1).view(2, 3, 4)
    torch.testing.assert_close(boxes, beta * BOXES)
    assert not torch.allclose(boxes[0], boxes[1])


def test_the_factors_learn(features):
    layer = AdaptiveRoi(16, rois=3, squeeze=8)
    crops, _ = layer(features, BOXES)
    crops.square().sum().backward()
    assert layer.scale.weight.grad.abs().max() > 0
    assert (layer.scale.bias.grad.abs() > 0).sum() > 6


def test_fixed_boxes_have_no_factors(features):
    layer = AdaptiveRoi(16, rois=3, squeeze=8, adaptive=False)
    crops, boxes = layer(features, BOXES)
    assert layer.scale is None
    assert boxes is BOXES
    assert crops.shape == (2, 3, 8, 6, 6)


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
def test_crops_from_the_backbone(features, adaptive):
    layer = AdaptiveRoi(16, rois=3, squeeze=8, adaptive=adaptive, crop_from="backbone")
    crops, _ = layer(features, BOXES)
    torch.testing.assert_close(crops, reference.roi_crop(features, BOXES, (6, 6)))
    assert layer.out_channels == 16
    assert (layer.squeeze is None) == (not adaptive)


def test_autocast_keeps_boxes_exact(features):
    layer = AdaptiveRoi(16, rois=3, squeeze=8, scale_bias=1.001)
    with torch.autocast("cpu", torch.bfloat16):
        crops, boxes = layer(features, BOXES)
    assert crops.dtype == torch.bfloat16
    torch.testing.assert_close(boxes, 1.001 * BOXES)


def test_repr_names_the_options():
    text = repr(AdaptiveRoi(16, rois=3, squeeze=8))
    assert "rois=3, adaptive=True, crop_from=squeezed" in text
    assert "size=(6, 6)" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveRoi(16, rois=0), "AdaptiveRoi: rois must be an integer of at least 1, got 0"),
        (
            lambda: AdaptiveRoi(16, 3, crop_from="map"),
            "crop_from must be one of squeezed, backbone, got 'map'",
        ),
        (
            lambda: AdaptiveRoi(16, 4, 8)(torch.ones(2, 16, 12, 12), BOXES),
            r"boxes must have shape \(B, 4, 4\), got \(2, 3, 4\)",
        ),
    ],
    ids=["rois", "crop_from", "boxes"],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
