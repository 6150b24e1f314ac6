"""torchvision's `roi_align` boxes as regions of `roi_crop`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aufast.ops.roi_crop import roi_crop


def roi_align_crop(
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Crop boxes given as `torchvision.ops.roi_align` takes them, with `roi_crop`'s one sample a bin.

    The sample is the middle of its bin, so this is `roi_align(…, sampling_ratio=1, aligned=True)` for boxes
    inside the map; and gradients reach the boxes. Beyond the map values are zero, where `roi_align` repeats
    the outermost pixels for half a pixel more.

    Args:
        features: (B, C, H, W).
        boxes: (L, 5) rows of batch index, x1, y1, x2, y2; or one (L_b, 4) tensor an image.
        output_size: (h, w), or one number for both.
        spatial_scale: features pixels per unit of the boxes, as 1/16 for boxes in the pixels of the image.
        backend: as in `roi_crop`.

    Returns:
        (L, C, h, w), in the order of the boxes.

    Raises:
        TypeError, ValueError: as `roi_crop`, and where the boxes fit none of the two forms, or the images.
    """
    size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    images, boxes = _by_image(features, boxes)  # (L,), (L, 4)
    count = features.shape[0]
    order = torch.argsort(images, stable=True)
    per_image = torch.bincount(images, minlength=count)  # (B,)
    most = int(per_image.max()) if len(images) else 0
    if most == 0:
        return features.new_empty(0, features.shape[1], *size)
    rank = torch.arange(len(images), device=images.device) - (per_image.cumsum(0) - per_image)[images[order]]
    # Images with fewer boxes than the one with most get boxes of no area, whose crops are not taken.
    regions = boxes.new_zeros(count, most, 4).index_put((images[order], rank), boxes[order] * spatial_scale)
    crops = roi_crop(features, regions, size, backend=backend)  # (B, most, C, h, w)
    place = torch.empty_like(order).scatter_(0, order, rank)
    return crops[images, place]


def _by_image(features: Tensor, boxes: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Batch index (L,) and box (L, 4) of every row."""
    count = features.shape[0]
    if isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(
                "roi_align_crop: boxes must have shape (L, 5), or be a list of (L_b, 4),"
                f" got {tuple(boxes.shape)}"
            )
        images, boxes = boxes[:, 0].detach(), boxes[:, 1:]
        if len(images) and not bool(((images >= 0) & (images < count) & (images == images.floor())).all()):
            raise ValueError(f"roi_align_crop: boxes[:, 0] must be whole numbers from 0 to {count - 1}")
        return images.long(), boxes
    shapes = [tuple(value.shape) for value in boxes]
    if len(boxes) != count or any(len(shape) != 2 or shape[1] != 4 for shape in shapes):
        raise ValueError(
            f"roi_align_crop: boxes must be one (L_b, 4) tensor for each of {count} images, got {shapes}"
        )
    lengths = torch.tensor([shape[0] for shape in shapes], device=features.device)
    return torch.arange(count, device=features.device).repeat_interleave(lengths), torch.cat(list(boxes))
