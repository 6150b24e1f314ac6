"""A drawn face whose action units can be moved: shape, folds and features. Synthetic, and never a photograph.

Coordinates are those of the face: units of a pixel of the aligned 200×200 face, x to the image's right, y
down, the origin a little above the nose tip. An AU moves landmarks and deepens folds; the drawing follows the
moved landmarks, so the landmarks that are written out are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from aufast.aus import AU_NAMES
from aufast.data.canvas import Canvas, Placement
from aufast.faces import MIRROR_49

Array = np.ndarray

# The image-left half and the midline of a neutral face, by 49-point index.
_LEFT: dict[int, tuple[float, float]] = {
    0: (-62, -50), 1: (-52, -57), 2: (-40, -59), 3: (-28, -57), 4: (-17, -53),  # brow
    10: (0, -38), 11: (0, -24), 12: (0, -10), 13: (0, 3), 14: (-15, 12), 15: (-8, 15), 16: (0, 17),  # nose
    19: (-49, -35), 20: (-40, -41), 21: (-30, -41), 22: (-20, -34), 23: (-30, -30), 24: (-40, -30),  # eye
    31: (-28, 37), 32: (-18, 32), 33: (-7, 29), 34: (0, 31), 40: (0, 48), 41: (-8, 47), 42: (-18, 43),  # lips
    43: (-9, 37), 44: (0, 37.5), 47: (0, 38.3), 48: (-9, 37.8),
}  # fmt: skip

# How far each AU at its full strength moves them.
_MOVES: dict[int, dict[int, tuple[float, float]]] = {
    1: {4: (0, -12), 3: (0, -10), 2: (0, -4)},
    2: {0: (0, -9), 1: (0, -12), 2: (0, -8), 3: (0, -2)},
    4: {4: (4, 9), 3: (3, 8), 2: (2, 6.5), 1: (1, 4), 0: (1, 2)},
    6: {23: (0, -2.5), 24: (0, -3), 19: (1, 0)},
    7: {20: (0, 2.5), 21: (0, 2.5), 23: (0, -2.5), 24: (0, -2.5)},
    9: {14: (-1, -5), 15: (0, -4), 16: (0, -3), 13: (0, -3), 4: (2, 4), 3: (1, 3), 33: (0, -3), 34: (0, -2)},
    10: {33: (0, -8), 34: (0, -7), 32: (-1, -6), 43: (0, -7), 44: (0, -7), 14: (-2, -3), 31: (0, -1)},
    12: {31: (-9, -9), 32: (-6, -4), 42: (-6, -4), 33: (-2, -1), 41: (-3, -1), 43: (-4, -1), 48: (-4, -1)},
    14: {31: (-5, 0), 32: (-2, 1), 42: (-2, -1)},
    15: {31: (0, 9), 42: (-1, 5), 32: (0, 3)},
    17: {40: (0, -5), 41: (0, -5), 42: (0, -3), 47: (0, -3), 48: (0, -3), 44: (0, -2), 43: (0, -2),
         34: (0, -2)},
    23: {31: (6, 0), 32: (4, 1.5), 33: (1, 2), 34: (0, 2), 42: (4, -2), 41: (1, -3), 40: (0, -3), 43: (2, 0),
         48: (2, 0)},
    24: {32: (0, 2.5), 33: (0, 5), 34: (0, 4.5), 42: (0, -3), 41: (0, -6), 40: (0, -6.5)},
    25: {47: (0, 7), 48: (0, 6), 41: (0, 6), 40: (0, 6.5), 42: (0, 3), 43: (0, -1), 44: (0, -1)},
    26: {47: (0, 14), 48: (0, 12), 41: (0, 15), 40: (0, 16), 42: (0, 9), 31: (2, 4), 32: (1, 1)},
}  # fmt: skip


def _both_halves(left: Mapping[int, tuple[float, float]]) -> Array:
    points = np.zeros((49, 2))
    for index, (x, y) in left.items():
        points[index] = x, y
        points[MIRROR_49[index]] = -x, y
    return points


NEUTRAL = _both_halves(_LEFT)
MOVES = np.stack([_both_halves(_MOVES[au]) for au in AU_NAMES])  # (15, 49, 2), in the order of AU_NAMES
_ORDER = {au: k for k, au in enumerate(AU_NAMES)}
_NOSE, _MOUTH = slice(10, 19), slice(31, 49)
_EYES = (slice(19, 25), slice(25, 31))


@dataclass(frozen=True, eq=False)
class Identity:
    """What stays the same of a person."""

    shape: Array  # (49, 2), the neutral landmarks
    width: float  # of the head, 1 on average
    jaw: float
    skin: Array  # (3,) RGB
    hair: Array
    iris: Array
    lips: Array
    brow: float  # thickness
    hairline: float
    age: float  # depth of folds, 1 on average
    texture: Array  # (256, 256) of the skin


def draw_identity(generator: np.random.Generator) -> Identity:
    """A person, at random."""
    normal = generator.normal
    shape = NEUTRAL.copy()
    for part in (slice(0, 10), _NOSE, *_EYES, _MOUTH):
        center = shape[part].mean(axis=0)
        if part in _EYES:  # both eyes alike
            continue
        shape[part] = center + (shape[part] - center) * (1 + 0.06 * normal(size=2))
        shape[part, 1] += 1.5 * normal()
    eye = 1 + 0.08 * normal(size=2)
    for part in _EYES:
        center = shape[part].mean(axis=0)
        shape[part] = center + (shape[part] - center) * eye
    jitter = 0.6 * normal(size=(49, 2))
    shape += (jitter + jitter[list(MIRROR_49)] * (-1, 1)) / 2  # faces are nearly symmetric
    tone = generator.uniform(0, 1)
    skin = (1 - tone) * np.array([238, 200, 178]) + tone * np.array([120, 80, 60]) + 6 * normal(size=3)
    hair = np.array([[40, 30, 25], [92, 62, 38], [160, 120, 70], [25, 22, 22], [150, 145, 140]])
    iris = np.array([[80, 52, 32], [90, 110, 70], [95, 125, 150], [60, 40, 28]])
    coarse = normal(size=(32, 32)).repeat(8, 0).repeat(8, 1)
    kernel = np.hanning(9) / np.hanning(9).sum()
    for axis in (0, 1):
        coarse = np.apply_along_axis(np.convolve, axis, coarse, kernel, "same")
    return Identity(
        shape=shape,
        width=float(np.clip(1 + 0.05 * normal(), 0.9, 1.1)),
        jaw=float(np.clip(1 + 0.08 * normal(), 0.85, 1.15)),
        skin=np.clip(skin, 50, 250).astype(np.float32),
        hair=hair[generator.integers(len(hair))].astype(np.float32),
        iris=iris[generator.integers(len(iris))].astype(np.float32),
        lips=np.array([0.86, 0.62, 0.62], np.float32) + 0.04 * normal(size=3).astype(np.float32),
        brow=float(generator.uniform(3.5, 6.5)),
        hairline=float(generator.uniform(-106, -96)),
        age=float(generator.uniform(0.75, 1.3)),
        texture=(0.020 * coarse + 0.018 * normal(size=(256, 256))).astype(np.float32),
    )


@dataclass(frozen=True)
class View:
    """What may change from frame to frame besides the AUs.

    Args:
        placement: of the face in its picture.
        yaw, pitch: turns of the head in radians, small.
        light: (x, y) direction and strength of the light.
        blink: 0 open to 1 closed.
        gaze: (x, y) of the irises in units of the face.
    """

    placement: Placement
    yaw: float = 0.0
    pitch: float = 0.0
    light: tuple[float, float] = (0.0, 0.0)
    blink: float = 0.0
    gaze: tuple[float, float] = (0.0, 0.0)


def face_landmarks(identity: Identity, activation: Mapping[int, float], blink: float = 0.0) -> Array:
    """Landmarks (49, 2) of the face, before its pose. `activation` is 0 to 1 an AU; those left out are 0."""
    a = effective(_in_order(activation))
    points = identity.shape + np.tensordot(a, MOVES, 1)
    gap = np.maximum(points[[48, 47, 46], 1] - points[[43, 44, 45], 1], 0.6)
    points[[48, 47, 46], 1] = points[[43, 44, 45], 1] + gap
    # A lip has some thickness, however tight.
    points[[42, 41, 40, 39, 38], 1] = np.maximum(
        points[[42, 41, 40, 39, 38], 1],
        np.interp(points[[42, 41, 40, 39, 38], 0], *points[[31, 48, 47, 46, 37]].T) + 1.5,
    )
    points[[33, 34, 35], 1] = np.minimum(points[[33, 34, 35], 1], points[[43, 44, 45], 1] - 1.5)
    for upper, lower in (((20, 21), (24, 23)), ((26, 27), (30, 29))):
        down = np.maximum(points[list(lower), 1] - points[list(upper), 1] - 1.0, 0)
        points[list(upper), 1] += blink * down
    return points


def _in_order(activation: Mapping[int, float]) -> Array:
    """(15,) strengths in the order of AU_NAMES."""
    return np.array([activation.get(au, 0.0) for au in AU_NAMES])


def effective(strengths: Array) -> Array:
    """Strengths (..., 15) as a face can show them together: lips that are pressed or tight do not part."""
    shown = np.array(strengths, float)
    shut = (1 - shown[..., _ORDER[24]]) * (1 - 0.7 * shown[..., _ORDER[23]])
    for au in (25, 26):
        shown[..., _ORDER[au]] *= shut
    return shown


def project(points: Array, view: View) -> Array:
    """Turn the head: points (..., 2) of the frontal face move with how far they stand out."""
    x, y = points[..., 0], points[..., 1]
    depth = 55 * np.sqrt(np.maximum(0.05, 1 - (x / 92) ** 2 - (y / 125) ** 2))
    depth = depth + 16 * np.exp(-((x / 13) ** 2) - ((y - 5) / 18) ** 2) - 45  # the nose
    return np.stack(
        [
            x * np.cos(view.yaw) + depth * np.sin(view.yaw),
            y * np.cos(view.pitch) + depth * np.sin(view.pitch),
        ],
        axis=-1,
    )


@lru_cache(maxsize=8)
def _spline(count: int, steps: int = 5) -> Array:
    """(n, count) weights of a Catmull-Rom curve through `count` points."""
    rows = []
    for t in np.linspace(0, count - 1, (count - 1) * steps + 1):
        i = min(int(t), count - 2)
        f = t - i
        row = np.zeros(count)
        weights = (-f + 2 * f**2 - f**3, 2 - 5 * f**2 + 3 * f**3, f + 4 * f**2 - 3 * f**3, f**3 - f**2)
        for k, weight in zip((i - 1, i, i + 1, i + 2), weights, strict=True):
            row[min(max(k, 0), count - 1)] += weight / 2
        rows.append(row)
    return np.array(rows)


def smooth(points: Array) -> Array:
    """A curve through points (k, 2)."""
    return _spline(len(points)) @ points


def _sides(points: Array) -> Iterator[tuple[Callable[..., Array], float]]:
    """For each half of the face: a way to name a point by its left landmark and an offset, and its sign."""
    for sign in (1.0, -1.0):

        def at(index: int, dx: float = 0.0, dy: float = 0.0, sign: float = sign) -> Array:
            return points[index if sign > 0 else MIRROR_49[index]] + (sign * dx, dy)

        yield at, sign


def render(
    identity: Identity, activation: Mapping[int, float], view: View, background: Array
) -> tuple[Array, Array]:
    """Draw a face.

    Args:
        identity: who.
        activation: AU to strength, 0 to 1.
        view: pose, light, eyes.
        background: float32 (size, size, 3), 0 to 255, what is behind.

    Returns:
        float32 (size, size, 3), 0 to 255, and landmarks float64 (49, 2) in its pixels.
    """
    from aufast.data.synthetic_parts import draw_brows, draw_eyes, draw_head, draw_mouth, shade_face

    canvas = Canvas(background.shape[0], view.placement)
    canvas.pixels[:] = background.transpose(2, 0, 1)
    frontal = face_landmarks(identity, activation, view.blink)
    a = dict(zip(AU_NAMES, effective(_in_order(activation)).tolist(), strict=True))
    points = project(frontal, view)
    shade_face(canvas, identity, a, points, view)
    draw_head(canvas, identity, a, view)
    draw_eyes(canvas, identity, points, view)
    draw_brows(canvas, identity, points)
    draw_mouth(canvas, identity, a, points)
    return canvas.pixels.transpose(1, 2, 0), view.placement.to_image(points)
