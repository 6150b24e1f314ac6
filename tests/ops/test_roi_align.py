"""roi_align's boxes through roi_crop: order, scale, gradients, and roi_align's numbers inside the map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aufast import reference
from aufast.ops import roi_align_crop

FEATURES = (3, 2, 12, 10)


def boxes_of(images: list[int]) -> Tensor:
    """(L, 5) boxes well inside the map."""
    corner = torch.rand(len(images), 2, dtype=torch.float64) * 4 + 1
    side = torch.rand(len(images), 2, dtype=torch.float64) * 3 + 1
    return torch.cat([torch.tensor(images, dtype=torch.float64)[:, None], corner, corner + side], dim=1)


def aligned(features: Tensor, boxes: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """roi_align with one sample a bin and aligned=True, from its definition, box by box."""
    crops = []
    for row in boxes:
        x1, y1, x2, y2 = row[1:] * scale - 0.5  # pixel middles count from 0
        xs = x1 + (torch.arange(size[1], dtype=row.dtype) + 0.5) * (x2 - x1) / size[1]
        ys = y1 + (torch.arange(size[0], dtype=row.dtype) + 0.5) * (y2 - y1) / size[0]
        left, top = xs.floor().long(), ys.floor().long()
        fx, fy = xs - left, (ys - top)[:, None]
        image = features[int(row[0])]
        rows = [image[:, top], image[:, top + 1]]  # (C, h, W)
        upper, lower = (line[..., left] * (1 - fx) + line[..., left + 1] * fx for line in rows)
        crops.append(upper * (1 - fy) + lower * fy)
    return torch.stack(crops)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rows_in_any_order_are_roi_align(scale: float) -> None:
    features = torch.randn(FEATURES, dtype=torch.float64)
    boxes = boxes_of([2, 0, 2, 2, 0])
    boxes[:, 1:] /= scale
    truth = aligned(features, boxes, (3, 4), scale)
    torch.testing.assert_close(roi_align_crop(features, boxes, (3, 4), scale), truth)


def test_a_list_per_image_is_the_same() -> None:
    features, boxes = torch.randn(FEATURES, dtype=torch.float64), boxes_of([0, 0, 2])
    lists = [boxes[:2, 1:], boxes[:0, 1:], boxes[2:, 1:]]
    assert torch.equal(roi_align_crop(features, lists, 3), roi_align_crop(features, boxes, (3, 3)))


def test_gradients_reach_features_and_boxes() -> None:
    features = torch.randn(FEATURES, dtype=torch.float64, requires_grad=True)
    boxes = boxes_of([1, 0]).requires_grad_()
    crops = roi_align_crop(features, boxes, (2, 2), 0.5)
    found = torch.autograd.grad(crops.square().sum(), (features, boxes))
    rois = torch.stack([boxes[1, 1:], boxes[0, 1:], boxes[0, 1:].detach() * 0])[:, None] * 0.5  # (3, 1, 4)
    plain = reference.roi_crop(features, rois, (2, 2))[:2]
    truth = torch.autograd.grad(plain.square().sum(), (features, boxes))
    for value, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(value, exact)


def test_no_boxes_give_no_crops() -> None:
    features = torch.randn(FEATURES)
    assert roi_align_crop(features, torch.zeros(0, 5), 3).shape == (0, 2, 3, 3)
    assert roi_align_crop(features, [torch.zeros(0, 4)] * 3, 3).shape == (0, 2, 3, 3)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.zeros(2, 4), r"boxes must have shape \(L, 5\), or be a list of \(L_b, 4\), got \(2, 4\)"),
        (torch.tensor([[3.0, 0, 0, 1, 1]]), r"boxes\[:, 0\] must be whole numbers from 0 to 2"),
        (torch.tensor([[0.5, 0, 0, 1, 1]]), r"boxes\[:, 0\] must be whole numbers"),
        ([torch.zeros(1, 4)], r"one \(L_b, 4\) tensor for each of 3 images, got \[\(1, 4\)\]"),
    ],
    ids=["columns", "image", "fraction", "list"],
)
def test_bad_boxes_are_named(boxes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roi_align_crop(torch.randn(FEATURES), boxes, 3)
