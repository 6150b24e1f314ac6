"""A small rasteriser in NumPy: shapes given in a face's own frame, drawn with soft edges on pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Patch = tuple[slice, slice]


@dataclass(frozen=True)
class Placement:
    """Where a face lies: scale, in-plane rotation in radians, and its centre in pixels."""

    scale: float
    angle: float
    x: float
    y: float

    def to_image(self, points: Array) -> Array:
        """Face coordinates (..., 2), the centre at (0, 0), to pixels."""
        cos, sin = self.scale * math.cos(self.angle), self.scale * math.sin(self.angle)
        return points @ np.array([[cos, sin], [-sin, cos]]) + (self.x, self.y)


def planes(color: Array) -> Array:
    """A colour (3,) to lay over a picture; pictures (3, h, w) stay as they are."""
    color = np.asarray(color, np.float32)
    return color[:, None, None] if color.ndim == 1 else color


class Canvas:
    """A picture being drawn.

    Skin is one colour times `1 + shade`, so that folds, light and make-up of the face are additions to a
    single plane; opaque parts are blended over it afterwards. Colours are planes too, (3, size, size): NumPy
    is several times faster along a row than along three channels.

    Args:
        size: side in pixels.
        placement: of the face.
    """

    def __init__(self, size: int, placement: Placement):
        self.size = size
        self.placement = placement
        y, x = np.mgrid[:size, :size].astype(np.float32)
        dx, dy = x - np.float32(placement.x), y - np.float32(placement.y)
        cos = np.float32(np.cos(placement.angle) / placement.scale)
        sin = np.float32(np.sin(placement.angle) / placement.scale)
        self.u = cos * dx + sin * dy  # (size, size), each pixel's place in the face's frame
        self.v = cos * dy - sin * dx
        self.shade = np.zeros((size, size), np.float32)
        self.pixels = np.zeros((3, size, size), np.float32)

    def patch(self, points: Array, margin: float) -> Patch | None:
        """The pixels around points (n, 2) of the face and `margin` beyond; None outside the picture."""
        pixels = self.placement.to_image(points)
        margin *= self.placement.scale
        (left, top), (right, bottom) = pixels.min(axis=0).tolist(), pixels.max(axis=0).tolist()
        x1, y1 = max(math.floor(left - margin), 0), max(math.floor(top - margin), 0)
        x2, y2 = min(math.ceil(right + margin) + 1, self.size), min(math.ceil(bottom + margin) + 1, self.size)
        return (slice(y1, y2), slice(x1, x2)) if x1 < x2 and y1 < y2 else None

    def spot(self, center: Array, radii: tuple[float, float], depth: float, angle: float = 0.0) -> None:
        """Add a soft elliptic spot to the shade, darker for negative depth."""
        if abs(depth) < 0.005:
            return
        center = np.asarray(center, np.float32)
        where = self.patch(center[None], 2.3 * max(radii))
        if where is None:
            return
        u, v = self.u[where] - center[0], self.v[where] - center[1]
        if angle:
            cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            u, v = cos * u + sin * v, cos * v - sin * u
        u *= np.float32(1 / radii[0])
        v *= np.float32(1 / radii[1])
        self.shade[where] += np.float32(depth) * np.exp(-(u * u + v * v))

    def fold(self, points: Array, width: float, depth: float) -> None:
        """Add a crease along a line (n, 2): a dark valley that fades at its ends, with a light rim."""
        if abs(depth) < 0.01:
            return
        points = np.asarray(points, np.float32)
        where = self.patch(points, 3 * width)
        if where is None:
            return
        distance, along, side = self._to_line(points, where)
        taper = np.sqrt(np.clip(4 * along * (1 - along), 0, 1))
        t = distance * np.float32(1 / width)
        valley = np.exp(-t * t)
        t = (side - np.float32(1.6 * width)) * np.float32(1 / width)
        rim = np.exp(-t * t) * (side > 0)
        self.shade[where] -= np.float32(depth) * taper * (valley - np.float32(0.45) * rim)

    def line(self, points: Array, width: float, color: Array, opacity: float = 1.0) -> None:
        """Blend a line of constant width over the picture."""
        points = np.asarray(points, np.float32)
        where = self.patch(points, width + 1)
        if where is None or opacity <= 0:
            return
        distance, _, _ = self._to_line(points, where)
        pixel = np.float32(self.placement.scale)
        self.blend(where, np.clip((width / 2 - distance) * pixel + 0.5, 0, 1) * np.float32(opacity), color)

    def _to_line(self, points: Array, where: Patch) -> tuple[Array, Array, Array]:
        """Distance to a line of segments, how far along it (0 to 1), and signed distance."""
        u, v = self.u[where], self.v[where]
        a, b = points[:-1], points[1:]
        d = b - a
        squared = np.maximum((d * d).sum(1), 1e-6)
        pu, pv = u - a[:, 0, None, None], v - a[:, 1, None, None]  # (segments, h, w)
        du, dv = d[:, 0, None, None], d[:, 1, None, None]
        t = np.clip((pu * du + pv * dv) * (1 / squared)[:, None, None], 0, 1)
        pu -= t * du
        pv -= t * dv
        distances = pu * pu + pv * pv
        nearest = distances.argmin(0)  # (h, w)
        rows, columns = np.arange(u.shape[0])[:, None], np.arange(u.shape[1])
        distance = np.sqrt(distances[nearest, rows, columns])
        along = (t[nearest, rows, columns] + nearest) * np.float32(1 / len(d))
        side = (du * pv - dv * pu)[nearest, rows, columns]
        return distance, along, np.copysign(distance, side)

    def between(self, upper: Array, lower: Array, margin: float = 1.0) -> tuple[Patch | None, Array]:
        """Coverage of the region between two lines (n, 2) that run from left to right.

        Returns:
            The pixels, and how much of each is covered, from 0 to 1.
        """
        where = self.patch(np.concatenate([upper, lower]), margin)
        if where is None:
            return None, np.empty((0, 0), np.float32)
        u, v = self.u[where], self.v[where]
        pixel = np.float32(self.placement.scale)
        top = np.interp(u, upper[:, 0], upper[:, 1]).astype(np.float32)
        bottom = np.interp(u, lower[:, 0], lower[:, 1]).astype(np.float32)
        cover = np.clip((v - top) * pixel + 0.5, 0, 1) * np.clip((bottom - v) * pixel + 0.5, 0, 1)
        left, right = max(upper[0, 0], lower[0, 0]), min(upper[-1, 0], lower[-1, 0])
        cover *= np.clip((u - left) * pixel + 0.5, 0, 1) * np.clip((right - u) * pixel + 0.5, 0, 1)
        return where, cover

    def disk(self, center: Array, radius: float) -> tuple[Patch | None, Array]:
        """Coverage of a disk."""
        center = np.asarray(center, np.float32)
        where = self.patch(center[None], radius + 1)
        if where is None:
            return None, np.empty((0, 0), np.float32)
        u, v = self.u[where] - center[0], self.v[where] - center[1]
        pixel = np.float32(self.placement.scale)
        return where, np.clip((np.float32(radius) - np.sqrt(u * u + v * v)) * pixel + 0.5, 0, 1)

    def blend(self, where: Patch | None, cover: Array, color: Array) -> None:
        """Lay a colour, (3,) or (3, h, w), over the picture where `cover`, (h, w), is 1."""
        if where is None:
            return
        target = self.pixels[:, where[0], where[1]]
        target += cover * (planes(color) - target)
