"""AU centres from landmarks, and the attention maps AAR regresses to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from aufast.faces.landmarks import Points, as_points_49

# Per AU: first point, second point (49-point scheme), and the shift down in units of s, the horizontal
# distance of the inner eye corners. The first point is the image-left one, except for AU 23, 24 and 25, whose
# two points are the middle of the upper and of the lower lip.
CENTERS: dict[int, tuple[int, int, float]] = {
    1: (4, 5, -1 / 2),
    2: (1, 8, -1 / 3),
    4: (2, 7, 1 / 3),
    6: (24, 29, 1.0),
    7: (21, 26, 0.0),
    9: (15, 17, -1 / 2),
    10: (43, 45, 0.0),
    12: (31, 37, 0.0),
    14: (31, 37, 0.0),
    15: (31, 37, 0.0),
    17: (41, 39, 1 / 2),
    23: (34, 40, 0.0),
    24: (34, 40, 0.0),
    25: (34, 40, 0.0),
    26: (41, 39, 1 / 2),
}

# MARGL cuts the face into halves, so there every AU has one centre in each: 23, 24 and 25, which lie on the
# midline, take the two peaks of the upper lip.
HALVES: dict[int, tuple[int, int, float]] = {**CENTERS, **dict.fromkeys((23, 24, 25), (33, 35, 0.0))}

_TABLES = {"attention": CENTERS, "margl": HALVES}
_INNER_EYE_CORNERS = (22, 25)


def au_centers(
    landmarks: Points, aus: Sequence[int], scheme: Literal["margl", "attention"] = "margl"
) -> Points:
    """The two centres of every AU.

    Args:
        landmarks: array or tensor (..., 49, 2), (x, y) in pixels.
        aus: the m AUs, by number, in the order wanted.
        scheme: "margl" puts the centre in the image-left half first and the one in the image-right half
            second; "attention" is the pair AAR takes the maximum over (for AU 23, 24 and 25 the upper and the
            lower lip).

    Returns:
        (..., 2, m, 2), (x, y) in the same pixels; NumPy in, NumPy out, torch in, torch out (and
        differentiable).

    Raises:
        TypeError: the coordinates are not numbers.
        ValueError: an AU without centres, another scheme, not 49 points, or a coordinate that is NaN or
            infinite.
    """
    if scheme not in _TABLES:
        raise ValueError(f"scheme must be one of {', '.join(map(repr, _TABLES))}, got {scheme!r}")
    table = _TABLES[scheme]
    unknown = [au for au in aus if au not in table]
    if unknown:
        raise ValueError(
            f"AU {', '.join(map(str, unknown))} has no centre; known are {', '.join(map(str, table))}"
        )
    points = as_points_49(landmarks)
    is_tensor = isinstance(points, torch.Tensor)
    if not (torch.isfinite(points) if is_tensor else np.isfinite(points)).all():
        raise ValueError("landmarks must be finite, but some coordinates are NaN or infinite")

    first, second, shift = ([table[au][k] for au in aus] for k in range(3))
    left, right = _INNER_EYE_CORNERS
    s = abs(points[..., left, 0] - points[..., right, 0])[..., None, None]  # (..., 1, 1)
    shift = points.new_tensor(shift) if is_tensor else np.array(shift, points.dtype)  # (m,)
    centers = points[..., np.array([first, second], np.int64), :]  # (..., 2, m, 2)
    centers[..., 1] = centers[..., 1] + shift * s
    return centers


def attention_targets(
    centers: np.ndarray | torch.Tensor, size: int = 44, image_size: int = 176, delta: float = 3.0
) -> torch.Tensor:
    """Predefined attention maps: the larger of two Gaussians, one per centre (AAR eq. (1), (2)).

    A cell of the map covers image_size/size pixels, so position x of the image is position
    (x + 1/2)·size/image_size - 1/2 of the map, not rounded to a cell. This keeps the map of a mirrored face
    the mirror image of the face's map.

    Args:
        centers: array or tensor (..., 2, m, 2), (x, y) in pixels of the image the network sees.
        size: side of the map in cells.
        image_size: side of that image in pixels.
        delta: standard deviation in cells.

    Returns:
        float32 tensor (..., m, size, size), rows are y; on the centres' device.

    Raises:
        ValueError: another shape, a centre that is NaN or infinite, or a size or deviation that is not
            positive.
    """
    centers = torch.as_tensor(centers, dtype=torch.float32)
    if centers.ndim < 3 or centers.shape[-3] != 2 or centers.shape[-1] != 2:
        raise ValueError(f"centers must have shape (..., 2, m, 2), got {tuple(centers.shape)}")
    if not torch.isfinite(centers).all():
        raise ValueError("centers must be finite, but some coordinates are NaN or infinite")
    if size < 1 or image_size < 1 or not delta > 0:
        raise ValueError(f"size, image_size and delta must be positive, got {size}, {image_size} and {delta}")
    centers = (centers + 0.5) * (size / image_size) - 0.5
    cells = torch.arange(size, dtype=torch.float32, device=centers.device)
    # exp(-(dx² + dy²) / 2δ²) is a column times a row.
    gauss = torch.exp((centers[..., None] - cells).square() / (-2 * delta**2))  # (..., 2, m, 2, size)
    rows, columns = gauss[..., 1, :, None], gauss[..., 0, None, :]
    return (rows * columns).amax(dim=-4)  # (..., 2, m, size, size) -> (..., m, size, size)
