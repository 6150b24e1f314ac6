"""Faces turned, scaled and cut to a standard square."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aufast.faces.images import check_image
from aufast.faces.landmarks import as_points_49

BORDER = 128  # grey beyond the image's edge
ENLARGE = 2.9  # side of the square, in longer sides of the box around eyes, nose and mouth
_LEFT_EYE, _RIGHT_EYE = slice(19, 25), slice(25, 31)
_NOSE_TIP, _LEFT_MOUTH, _RIGHT_MOUTH = 13, 31, 37
_BLOCK = 4096  # output pixels at a time: their temporaries stay in the cache, and NumPy asks for no new pages
_MIN_EXTENT = 1.0  # pixels; a face narrower or flatter than this has no direction to align to


@dataclass(frozen=True, eq=False)
class AlignedFace:
    """A face in its standard square.

    Attributes:
        image: uint8 (size, size, 3) RGB.
        landmarks: float64 (49, 2), (x, y) in pixels of `image`.
        matrix: float64 (2, 3); `matrix @ (x, y, 1)` takes a pixel of the photograph to `image`.
    """

    image: np.ndarray
    landmarks: np.ndarray
    matrix: np.ndarray


def align_face(image: np.ndarray, landmarks: np.ndarray, size: int = 200) -> AlignedFace:
    """Turn the eyes level and cut the face out at a standard size, as JAA-Net and AAR prepare their data.

    The two eye centres, the nose tip and the mouth corners, turned until the eyes are level, span a box. A
    square around its centre, 2.9 times its longer side, becomes the output: the square's edges fall on the
    centres of the outermost pixels. Sampling is bilinear, without smoothing, and grey 128 beyond the image.

    Args:
        image: uint8 (H, W, 3) RGB, or (H, W) greyscale.
        landmarks: (49, 2), (x, y) in the image's pixels, the first pixel's centre at (0, 0).
        size: side of the output in pixels.

    Returns:
        The aligned image, its landmarks and the matrix that maps one to the other.

    Raises:
        TypeError: the image is not a uint8 array, or the landmarks are not numbers.
        ValueError: another shape, or landmarks that no face can have: not finite, outside the image, eyes at
            one point, all in a line, mouth above the eyes.
    """
    image = check_image(image)
    landmarks = np.asarray(as_points_49(landmarks), dtype=np.float64)
    if landmarks.shape != (49, 2):
        raise ValueError(f"landmarks must be one face, shape (49, 2), got {landmarks.shape}")
    if size < 2:
        raise ValueError(f"size must be at least 2 pixels, got {size}")
    matrix = alignment_matrix(landmarks, image.shape[:2], size)
    return AlignedFace(_warp(image, matrix, size), landmarks @ matrix[:, :2].T + matrix[:, 2], matrix)


def crop_face(face: AlignedFace, size: int) -> AlignedFace:
    """The centre of an aligned face: 176 of 200 for AAR, 192 of 200 for MARGL.

    Args:
        face: an aligned face.
        size: side of the crop in pixels, at most the face's own; an odd margin leaves its extra pixel right
            and below.

    Returns:
        The crop, with landmarks and matrix moved along.

    Raises:
        ValueError: the crop is larger than the face or has no pixels.
    """
    side = face.image.shape[0]
    if not 1 <= size <= side:
        raise ValueError(f"size must be from 1 to {side}, the aligned face's own, got {size}")
    start = (side - size) // 2
    matrix = face.matrix - [[0, 0, start], [0, 0, start]]
    pixels = np.ascontiguousarray(face.image[start : start + size, start : start + size])
    return AlignedFace(pixels, face.landmarks - start, matrix)


def alignment_matrix(landmarks: np.ndarray, image_shape: tuple[int, int], size: int) -> np.ndarray:
    """The similarity of `align_face`, float64 (2, 3), for an image of shape (H, W)."""
    if not np.isfinite(landmarks).all():
        raise ValueError("landmarks must be finite, but some coordinates are NaN or infinite")
    eyes = np.stack([landmarks[_LEFT_EYE].mean(axis=0), landmarks[_RIGHT_EYE].mean(axis=0)])  # (2, 2)
    anchors = np.concatenate([eyes, landmarks[[_NOSE_TIP, _LEFT_MOUTH, _RIGHT_MOUTH]]])  # (5, 2)
    height, width = image_shape
    # How many pixels each anchor lies beyond the image, negative inside.
    outside = np.maximum(-anchors, anchors - [width - 1, height - 1]).max(axis=1)  # (5,)
    if outside.min() > 0 or outside.max() > max(height, width):
        raise ValueError(
            f"landmarks of eyes, nose and mouth lie outside the image of {width} x {height} pixels"
        )
    direction = eyes[1] - eyes[0]
    distance = np.hypot(*direction)
    if distance < _MIN_EXTENT:
        raise ValueError(
            f"landmarks put both eyes at one place, {distance:.3g} pixels apart; is their unit pixels?"
        )

    cos, sin = direction / distance
    rotation = np.array([[cos, sin], [-sin, cos]])
    turned = anchors @ rotation.T  # (5, 2), eyes level
    low, high = turned.min(axis=0), turned.max(axis=0)
    if (high - low).min() < _MIN_EXTENT:
        raise ValueError("landmarks of eyes, nose and mouth all lie on one line")
    if turned[3:, 1].mean() < turned[:2, 1].mean():
        raise ValueError(
            "landmarks put the mouth above the eyes: left and right eye are exchanged, or y grows upward"
        )
    scale = (size - 1) / (ENLARGE * (high - low).max())
    shift = (size - 1) / 2 - scale * (low + high) / 2
    return np.column_stack([scale * rotation, shift])


def _warp(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Sample `image` at the positions `matrix` takes to the pixels of a (size, size) output."""
    height, width = image.shape[:2]
    inverse = np.linalg.inv(matrix[:, :2])

    def positions(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """x and y in the image of the output's rows from `first` until before `last`, each (rows, size)."""
        v, u = np.mgrid[first:last, :size].astype(np.float64)
        grid = np.stack([u, v], axis=-1) - matrix[:, 2]  # (rows, size, 2)
        # One pixel beyond an edge both neighbours are border, so clipping there changes nothing but indices.
        return np.moveaxis(np.clip(grid @ inverse.T, -1, [width, height]), -1, 0)

    # The part of the image that is sampled, grey where it goes beyond; a position's rounding moves by one.
    edges = [positions(row, row + 1) for row in (0, size - 1)]
    left, top = (min(int(np.floor(edge[k].min())) for edge in edges) - 1 for k in (0, 1))
    right, bottom = (max(int(np.floor(edge[k].max())) for edge in edges) + 3 for k in (0, 1))
    part = np.full((bottom - top, right - left, 3), BORDER, np.uint8)
    rows, columns = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
    inside = part[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    inside[...] = image[rows, columns]
    pixels = part.reshape(-1, 3)

    def neighbours(index: np.ndarray) -> np.ndarray:
        """Pixels as float64 planes (3, rows, size): NumPy is faster along a row than along three channels."""
        return np.moveaxis(pixels[index], -1, 0).astype(np.float64, order="C")

    out = np.empty((size, size, 3), np.uint8)
    step = max(1, _BLOCK // size)
    for first in range(0, size, step):
        x, y = positions(first, min(first + step, size))
        column, row = np.floor(x), np.floor(y)
        across, down = x - column, y - row  # weights of the far neighbours
        index = ((row - top) * (right - left) + (column - left)).astype(np.intp)
        upper = (1 - across) * neighbours(index) + across * neighbours(index + 1)
        index += right - left
        lower = (1 - across) * neighbours(index) + across * neighbours(index + 1)
        out[first : first + step] = np.moveaxis(np.rint((1 - down) * upper + down * lower), 0, -1)
    return out
