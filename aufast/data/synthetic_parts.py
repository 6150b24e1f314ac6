"""The parts of the drawn face: light and folds on the skin, head and hair, eyes, brows, mouth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aufast.data.canvas import Canvas, planes
from aufast.data.synthetic_face import Identity, View, _sides, smooth

Array = np.ndarray
Strengths = Mapping[int, float]

# Half the head's width at heights of the face, top to chin; the jaw drops with AU 26.
_HEIGHTS = np.array([-128, -122, -105, -80, -45, 0, 30, 55, 72, 84, 90], float)
_HALVES = np.array([0, 26, 56, 74, 80, 77, 71, 59, 43, 22, 0], float)


def shade_face(canvas: Canvas, identity: Identity, a: Strengths, points: Array, view: View) -> None:
    """Light, relief and folds of the skin, as the canvas's shade."""
    nx, ny = canvas.u * np.float32(1 / 85), canvas.v * np.float32(1 / 115)
    round_off = nx * nx + ny * ny
    canvas.shade += np.float32(view.light[0]) * nx + np.float32(view.light[1]) * ny
    canvas.shade -= np.float32(0.22) * round_off * round_off
    rows, columns = ((plane + np.float32(1024)).astype(np.intp) & 255 for plane in (canvas.v, canvas.u))
    canvas.shade += identity.texture[rows, columns]
    for at, sign in _sides(points):
        canvas.spot(at(21, -3, -2), (17, 9), -0.14)  # eye socket
        canvas.spot(at(14, 5, -22), (4, 18), -0.06 * (1 + 2 * sign * view.light[0]))  # side of the nose
        canvas.spot(at(15, 0, -0.5), (4.0, 2.0), -0.55)  # nostril
        canvas.fold([at(14, 1, -9), at(14, -2, -4), at(14, 1, 1)], 1.6, 0.18)  # wing
    canvas.spot(points[13] - (0, 2), (6, 5), 0.14)
    canvas.spot(points[12] - (0, 8), (4, 16), 0.08)
    canvas.spot(points[16] + (0, 5), (13, 4), -0.10)
    canvas.spot(points[40] + (0, 7), (16, 4), -0.12)
    canvas.spot((points[40] + points[34]) / 2 + (0, 34), (15, 9), 0.07)  # chin
    _upper_folds(canvas, identity.age, a, points)
    _lower_folds(canvas, identity.age, a, points)


def _upper_folds(canvas: Canvas, age: float, a: Strengths, points: Array) -> None:
    """Forehead, glabella, eyes and nose root: AU 1, 2, 4, 6, 7 and 9."""
    fold, spot = canvas.fold, canvas.spot
    middle = (points[4] + points[5]) / 2
    for k in range(3):  # AU 1: across the middle of the forehead
        y = -10 - 8 * k
        fold(smooth(middle + [(-27, y + 3), (-12, y), (12, y), (27, y + 3)]), 1.6, 0.27 * age * a[1])
    spot(middle + (0, 8), (9, 10), -0.08 * a[4])
    for at, _ in _sides(points):
        for k in range(2):  # AU 2: arches above the outer brow
            y = -10 - 8 * k
            fold(
                smooth([at(1, -12, y + 6), at(1, -2, y), at(1, 12, y), at(1, 22, y + 4)]),
                1.6,
                0.27 * age * a[2],
            )
        fold([at(4, 9, -8), at(4, 11, 2), at(4, 11, 12)], 1.7, 0.42 * age * a[4])  # AU 4: frown lines
        spot(at(4, 2, -7), (8, 5), 0.09 * a[4])
        # AU 6: crow's feet, a furrow below the eye, and the cheek pushed up.
        for start, end in (((-4, -2), (-17, -9)), ((-5, 2), (-19, 2)), ((-4, 6), (-17, 13))):
            fold([at(19, *start), (at(19, *start) + at(19, *end)) / 2, at(19, *end)], 1.4, 0.34 * age * a[6])
        fold(smooth([at(24, -10, 9), at(24, 0, 12), at(23, 2, 12), at(23, 10, 8)]), 1.8, 0.30 * age * a[6])
        spot(at(24, -2, 26), (20, 10), 0.15 * a[6])
        # AU 7: a tight rim along the lower lid.
        fold(
            smooth([at(24, -8, 2.5), at(24, 1, 4.5), at(23, 0, 4.5), at(23, 8, 2.5)]), 1.5, 0.40 * age * a[7]
        )
        spot(at(24, 5, 8), (12, 3), 0.10 * a[7])
        # AU 9: the nose drawn up in wrinkles.
        fold([at(10, -10, 10), at(10, -14, 16), at(10, -17, 24)], 1.5, 0.40 * age * a[9])
        fold([at(10, -6, 14), at(10, -9, 21), at(10, -12, 29)], 1.5, 0.36 * age * a[9])
    for y in (2, 8):
        fold(smooth(points[10] + [(-9, y + 2), (-3, y), (3, y), (9, y + 2)]), 1.5, 0.38 * age * a[9])


def _lower_folds(canvas: Canvas, age: float, a: Strengths, points: Array) -> None:
    """Cheeks, mouth and chin: AU 10, 12, 14, 15, 17, 23 and 24."""
    fold, spot = canvas.fold, canvas.spot
    for at, _ in _sides(points):
        fold(smooth([at(14, -5, -3), at(14, -12, 5), at(31, -8, -6)]), 2.2, 0.07 * age)  # everybody's
        # AU 10: the fold beside the nose, and the triangle above it pushed up.
        fold(
            smooth([at(14, -3, -8), at(14, -9, -3), at(14, -14, 5), at(14, -16, 13)]), 2.0, 0.42 * age * a[10]
        )
        spot(at(14, -13, -12), (10, 7), 0.13 * a[10])
        # AU 12: the fold swings out around the raised corner, the cheek balls up.
        fold(
            smooth([at(14, -6, -1), at(14, -15, 5), at(31, -9, -8), at(31, -11, 6)]), 2.2, 0.40 * age * a[12]
        )
        spot(at(31, -16, -18), (17, 12), 0.15 * a[12])
        # AU 14: a dimple beside the corner.
        spot(at(31, -6, 0), (3.0, 4.5), -0.36 * a[14])
        fold(smooth([at(31, -7, -8), at(31, -11, 0), at(31, -7, 9)]), 1.7, 0.36 * age * a[14])
        # AU 15: a line down from the corner, and the bag beside it.
        fold(smooth([at(31, -2, 3), at(31, -6, 9), at(31, -7, 19)]), 1.9, 0.42 * age * a[15])
        spot(at(31, 6, 14), (9, 6), 0.10 * a[15])
        spot(at(31, -1, 1), (3, 3), -0.25 * a[24])
        for k, (x, y) in enumerate(
            ((-5, 12), (-12, 17), (-4, 22), (-14, 26), (-8, 30))
        ):  # AU 17: chin like a peel
            spot(at(40, x, y), (2.6, 2.0), (-0.20 if k % 2 else -0.15) * a[17])
        for x in (4, 10, 16):  # AU 23: fine lines into the narrowed lips
            fold(
                [at(34, -x, -7.5), at(34, -x * 0.92, -4.5), at(34, -x * 0.85, -1.5)], 1.2, 0.48 * age * a[23]
            )
            fold([at(40, -x * 0.85, 1.5), at(40, -x * 0.92, 4.5), at(40, -x, 7.5)], 1.2, 0.42 * age * a[23])
    center = points[40]
    arc = center + np.array([(-20, 13), (-10, 8), (0, 6), (10, 8), (20, 13)])
    fold(smooth(arc), 2.0, 0.40 * age * a[17])
    spot(center + (0, 22), (15, 9), 0.12 * a[17])
    spot(points[34] - (0, 8), (22, 4), 0.16 * a[24])  # AU 24: bulges above and below the pressed lips
    spot(center + (0, 7), (20, 4), 0.20 * a[24])


def draw_head(canvas: Canvas, identity: Identity, a: Strengths, view: View) -> None:
    """Neck, skin and hair."""
    u, v = canvas.u - np.float32(20 * np.sin(view.yaw)), canvas.v
    scale = np.float32(canvas.placement.scale)
    heights = _HEIGHTS.copy()
    heights[7:] += np.array([4, 10, 13, 15]) * a[26] - np.array([0, 1, 2, 2]) * a[17]
    halves = _HALVES * identity.width
    halves[6:9] *= identity.jaw
    half = np.interp(v, heights, halves).astype(np.float32)
    out = np.abs(u) - half  # beyond the head's edge
    skull = np.clip(0.5 - out * scale, 0, 1)
    neck = np.clip((40 - np.abs(u)) * scale + 0.5, 0, 1) * (v > 30)
    skin = planes(identity.skin) * np.maximum(1 + canvas.shade, 0.05)  # (3, size, size)
    everywhere = (slice(None), slice(None))
    hull = np.clip(0.5 - (out - 9) * scale, 0, 1) * ((v < 10) & (v > heights[0]))
    canvas.blend(everywhere, hull * np.float32(0.95), identity.hair)
    canvas.blend(everywhere, neck, skin * np.float32(0.72))
    canvas.blend(everywhere, skull, skin)
    line = np.float32(identity.hairline) + np.float32(0.0045) * u * u
    fringe = 6 * identity.texture[(u.astype(np.intp) * 5) % 256, 7] / np.float32(0.03)
    cap = np.clip((line + fringe * np.float32(0.5) - v) * scale * np.float32(0.35) + 0.5, 0, 1) * (
        hull + skull > 0
    )
    canvas.blend(everywhere, cap, planes(identity.hair) * (1 + np.float32(0.5) * canvas.shade))


def draw_eyes(canvas: Canvas, identity: Identity, points: Array, view: View) -> None:
    """Lids, whites, irises."""
    for upper, lower in (((19, 20, 21, 22), (19, 24, 23, 22)), ((25, 26, 27, 28), (25, 30, 29, 28))):
        top, bottom = smooth(points[list(upper)]), smooth(points[list(lower)])
        where, cover = canvas.between(top, bottom)
        if where is None:
            continue
        corners = points[[upper[0], upper[-1]]]
        width = corners[1, 0] - corners[0, 0]
        center = corners.mean(axis=0) + view.gaze + (0, -0.5)
        u, v = canvas.u[where] - np.float32(center[0]), canvas.v[where] - np.float32(center[1])
        distance = np.sqrt(u * u + v * v)
        scale = np.float32(canvas.placement.scale)

        def disk(radius: float, distance: Array = distance, scale: np.float32 = scale) -> Array:
            return np.clip((np.float32(radius) - distance) * scale + 0.5, 0, 1)

        light = np.maximum(1 + np.float32(0.7) * canvas.shade[where], 0.2)
        color = planes((228, 224, 220)) * light
        color += disk(0.235 * width) * (planes(identity.iris) - color)
        color += disk(0.10 * width) * (planes((15, 12, 12)) - color)
        glint = np.hypot(u + 2, v + 2)
        color += np.clip((1.4 - glint) * scale + 0.5, 0, 1) * (np.float32(245) - color)
        color *= 1 - np.float32(0.35) * np.clip(1 - (canvas.v[where] - np.float32(top[:, 1].min())) / 6, 0, 1)
        canvas.blend(where, cover, color)
        dark = identity.skin * np.float32(0.25)
        canvas.line(points[list(upper)] if view.blink > 0.5 else top[::3], 2.0, dark, 0.85)
        canvas.line(points[list(lower)], 0.9, identity.skin * np.float32(0.45), 0.6)
        crease = smooth(points[list(upper)] - [(0, 1), (0, 5.5), (0, 5.5), (0, 3)])
        canvas.line(crease[::3], 1.1, identity.skin * np.float32(0.55), 0.5)


def draw_brows(canvas: Canvas, identity: Identity, points: Array) -> None:
    """Both brows, with hair."""
    taper = np.array([0.25, 0.8, 1.0, 1.0, 0.75]) * identity.brow / 2
    for part, thickness in ((points[0:5], taper), (points[5:10], taper[::-1])):
        offset = np.stack([np.zeros(5), thickness], axis=1)
        where, cover = canvas.between(smooth(part - offset), smooth(part + offset))
        if where is None:
            continue
        rows = (canvas.v[where] * 3 + canvas.u[where] * 2).astype(np.intp) % 256
        hair = np.clip(0.8 + 6 * identity.texture[rows, 0], 0.4, 1)
        canvas.blend(where, cover * hair.astype(np.float32), identity.hair * np.float32(0.8))


def draw_mouth(canvas: Canvas, identity: Identity, a: Strengths, points: Array) -> None:
    """Lips, teeth and the dark between them."""
    top, bottom = smooth(points[31:38]), smooth(points[[31, 42, 41, 40, 39, 38, 37]])
    inner_top, inner_bottom = smooth(points[[31, 43, 44, 45, 37]]), smooth(points[[31, 48, 47, 46, 37]])
    color = identity.skin * identity.lips * np.float32(1 - 0.12 * a[23])
    pale = 0.55 * a[24]  # pressed lips lose their colour
    color = color * np.float32(1 - pale) + identity.skin * np.float32(0.9 * pale)
    for upper, lower, tint in ((top, inner_top, 0.93), (inner_bottom, bottom, 1.05)):
        where, cover = canvas.between(upper, lower)
        if where is not None:
            light = np.maximum(1 + canvas.shade[where], 0.1)
            canvas.blend(where, cover * np.float32(0.92), planes(color * np.float32(tint)) * light)
    if (inner_bottom[:, 1] - inner_top[:, 1]).max() > 1.5:
        where, cover = canvas.between(inner_top, inner_bottom)
        canvas.blend(where, cover, (60, 22, 22))
        teeth = np.stack([inner_top[:, 0], np.minimum(inner_top[:, 1] + 6.5, inner_bottom[:, 1])], axis=1)
        where, cover = canvas.between(inner_top * (0.96, 1), teeth * (0.96, 1))
        canvas.blend(where, cover, (226, 220, 208))
    seam = (inner_top + inner_bottom) / 2 if a[25] + a[26] < 0.1 else inner_top
    canvas.line(seam[::4], 1.3 + 1.2 * a[24] + 0.5 * a[23], identity.skin * np.float32(0.3), 0.75)
