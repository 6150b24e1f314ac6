"""Landmark schemes: 68, 66 and 49 points, and the mirror map of the 49.

The 49-point scheme is the one the AU centres and the alignment are written in: brows 0-9, nose 10-18, the
image-left eye 19-24, the image-right eye 25-30, outer lip 31-42, inner lip 43-48. Coordinates are (x, y) in
pixels with the centre of the first pixel at (0, 0) and y growing downward; "left" and "right" always mean the
image's, not the person's.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

Points = TypeVar("Points", np.ndarray, torch.Tensor)  # what comes in goes out

# 49-point i is 68-point FROM_68[i]: no jaw (0-16), no inner mouth corners (60, 64).
FROM_68 = (*range(17, 60), *range(61, 64), *range(65, 68))
# The 66-point scheme of active appearance models has the same jaw and no inner mouth corners at all.
FROM_66 = tuple(range(17, 66))
_SELECTIONS = {68: FROM_68, 66: FROM_66, 49: tuple(range(49))}

# Point i of a mirrored face is point MIRROR_49[i] of the face.
MIRROR_49 = (
    *range(9, -1, -1),  # brows
    *(10, 11, 12, 13),  # nose bridge
    *(18, 17, 16, 15, 14),  # nostrils
    *(28, 27, 26, 25, 30, 29),  # image-left eye takes the image-right eye's points ...
    *(22, 21, 20, 19, 24, 23),  # ... and the other way round; lids swap ends within an eye
    *(37, 36, 35, 34, 33, 32, 31),  # outer lip, upper
    *(42, 41, 40, 39, 38),  # outer lip, lower
    *(45, 44, 43),  # inner lip, upper
    *(48, 47, 46),  # inner lip, lower
)


def as_points(points: Points, name: str = "landmarks") -> Points:
    """Landmarks as a floating array or tensor (..., n, 2): torch stays torch, integers become float64."""
    if isinstance(points, torch.Tensor):
        points = points if points.is_floating_point() else points.double()
    else:
        try:
            points = np.asarray(points)
        except ValueError as error:
            raise ValueError(
                f"{name} must all have the same number of points, but the rows differ in length"
            ) from error
        if points.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be numbers, got dtype {points.dtype}")
        points = points if points.dtype.kind == "f" else points.astype(np.float64)
    if points.ndim < 2 or points.shape[-1] != 2:
        raise ValueError(f"{name} must have shape (..., n, 2), x and y per point, got {tuple(points.shape)}")
    return points


def as_points_49(points: Points, name: str = "landmarks") -> Points:
    """As `as_points`, for functions that read points by their 49-point index."""
    points = as_points(points, name)
    if points.shape[-2] != 49:
        raise ValueError(
            f"{name} must be 49 points, shape (..., 49, 2), got {tuple(points.shape)}; "
            "landmarks_49 converts 68 and 66 points"
        )
    return points


def landmarks_49(points: Points, one_based: bool = False) -> Points:
    """Reduce 68-, 66- or 49-point landmarks to the 49-point scheme.

    Args:
        points: array or tensor (..., 68 | 66 | 49, 2), (x, y) in pixels. NaN marks a missing point and is
            passed on.
        one_based: the coordinates count the first pixel as 1, as in lists written by MATLAB; 1 is subtracted.
            Nothing in the numbers tells the two apart, so the caller has to.

    Returns:
        (..., 49, 2), 0-based; NumPy in, NumPy out, torch in, torch out. Integers become float64.

    Raises:
        TypeError: the coordinates are not numbers.
        ValueError: another number of points, rows with different numbers of points, or no (x, y) axis.
    """
    points = as_points(points)
    if points.shape[-2] not in _SELECTIONS:
        raise ValueError(
            f"landmarks must be 68, 66 or 49 points, got {points.shape[-2]} (shape {tuple(points.shape)})"
        )
    selected = points[..., list(_SELECTIONS[points.shape[-2]]), :]  # (..., 49, 2)
    return selected - 1 if one_based else selected


def mirror_landmarks(points: Points, width: int) -> Points:
    """Landmarks of the mirrored image: x becomes width - 1 - x, and left and right points change places.

    Args:
        points: array or tensor (..., 49, 2), (x, y) in pixels of the image that is mirrored (after cropping).
        width: that image's width in pixels.

    Returns:
        (..., 49, 2), of the kind and dtype given.

    Raises:
        TypeError: the coordinates are not numbers.
        ValueError: not 49 points, or a width below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1 pixel, got {width}")
    mirrored = as_points_49(points)[..., list(MIRROR_49), :]  # indexing by a list copies
    mirrored[..., 0] = width - 1 - mirrored[..., 0]
    return mirrored
