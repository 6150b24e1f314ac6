"""What a model sees, drawn on the frame: landmarks, regions or attention, and a bar for every AU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Okabe and Ito's colours, which people who see fewer colours tell apart; a face keeps its own.
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))
PANEL = 150  # pixels of the bars' panel
MIN_HEIGHT = 360  # so that twelve AUs can be read
MAX_SIDE = 4096  # of the picture: thin frames must not become huge ones, and encoders have limits too
_SHOWN = 3  # faces with bars of their own
_HEAT = 0.45  # opacity of full attention


@dataclass(frozen=True, eq=False)
class FaceView:
    """A face to draw.

    Attributes:
        face_id: chooses its colour.
        box: x1, y1, x2, y2 in the frame's pixels.
        points: (n, 2) landmarks, or None.
        probabilities: (m,), or None where there are none.
        rois: boxes (n, 4) in pixels of the aligned face, or None.
        attention: map (s, s) over the aligned face, or None.
        matrix: (2, 3), from the frame's pixels to the aligned face's, or None.
        size: side of the aligned face in pixels.
    """

    face_id: int
    box: Sequence[float]
    points: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    rois: np.ndarray | None = None
    attention: np.ndarray | None = None
    matrix: np.ndarray | None = None
    size: int = 0


def draw_overlay(
    image: np.ndarray, faces: Sequence[FaceView], aus: Sequence[int], threshold: float = 0.5, title: str = ""
) -> np.ndarray:
    """Draw faces onto a frame and their AU probabilities beside it.

    Args:
        image: uint8 (H, W, 3) RGB.
        faces: to draw.
        aus: the m AUs of the bars.
        threshold: from which a bar is full in colour; a line marks it.
        title: over the bars, such as the time.

    Returns:
        uint8 (H', W', 3), of even sides, as video codecs want them. It depends on the frame's size alone.
    """
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    scale = min(max(1.0, MIN_HEIGHT / height), MAX_SIDE / max(height, width))
    height, width = (max(2, 2 * round(scale * v / 2)) for v in (height, width))
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    for face in faces:
        if face.attention is not None:
            _draw_attention(picture, face, scale)
    draw = ImageDraw.Draw(picture, "RGBA")
    for face in faces:
        _draw_face(draw, face, scale)
    whole = max(height, MIN_HEIGHT)
    canvas = Image.new("RGB", (width + PANEL, whole), (24, 24, 24))
    canvas.paste(picture, (0, 0))
    _draw_bars(ImageDraw.Draw(canvas), width, whole, faces, aus, threshold, title)
    return np.asarray(canvas)


def _color(face: FaceView) -> tuple[int, int, int]:
    return COLORS[face.face_id % len(COLORS)]


def _draw_attention(picture, face: FaceView, scale: float) -> None:
    """Lay the attention map over the place in the frame that the aligned face was cut from."""
    from PIL import Image

    cells = len(face.attention)
    heat = np.zeros((cells, cells, 4), np.uint8)
    heat[..., 0] = 255
    heat[..., 1] = 255 * (1 - face.attention)  # yellow to red
    heat[..., 3] = 255 * _HEAT * face.attention
    # Pillow asks where a position of the output lies in the map, both with pixel 0 from 0 to 1; the matrix
    # speaks of the middles of pixels.
    linear = face.matrix[:, :2] / scale
    shift = face.matrix[:, 2] + 0.5 - face.matrix[:, :2].sum(axis=1) / 2
    back = np.column_stack([linear, shift]) * (cells / face.size)
    layer = Image.fromarray(heat).transform(
        picture.size, Image.Transform.AFFINE, back.ravel().tolist(), Image.Resampling.BILINEAR
    )
    picture.paste(layer, (0, 0), layer)


def _draw_face(draw, face: FaceView, scale: float) -> None:
    color = _color(face)
    place = [scale * (v - 0.5) for v in face.box]  # the box ends between pixels
    if place[2] > place[0] and place[3] > place[1]:
        draw.rectangle(place, outline=color)
    if face.rois is not None:
        inverse = np.linalg.inv(face.matrix[:, :2])
        x1, y1, x2, y2 = face.rois.T  # each (n,)
        corners = np.stack([[x1, x2, x2, x1], [y1, y1, y2, y2]], axis=-1)  # (4, n, 2)
        places = (corners - face.matrix[:, 2]) @ inverse.T * scale
        for polygon in places.transpose(1, 0, 2):
            draw.polygon([tuple(p) for p in polygon.tolist()], outline=(*color, 110))
    if face.points is not None and np.isfinite(face.points).all():
        for x, y in (face.points * scale).tolist():
            draw.ellipse((x - 1.2, y - 1.2, x + 1.2, y + 1.2), fill=(255, 255, 255, 220))


def _draw_bars(draw, left: int, height: int, faces, aus, threshold: float, title: str) -> None:
    from PIL import ImageFont

    shown = [face for face in faces if face.probabilities is not None][:_SHOWN]
    step = min(26.0, (height - 24) / len(aus))
    font = ImageFont.load_default(size=min(13, max(8, int(step) - 2)))
    draw.text((left + 8, 5), title if shown else f"{title}  no face", font=font, fill="white")
    zero, full = left + 44, left + PANEL - 10
    for row, au in enumerate(aus):
        top = 22 + row * step
        draw.text((left + 8, top + step / 2), f"AU{au}", font=font, fill="white", anchor="lm")
        draw.rectangle((zero, top + 2, full, top + step - 3), fill=(48, 48, 48))
        for k, face in enumerate(shown):
            p = float(face.probabilities[row])
            bar = (step - 5) / len(shown)
            color = _color(face) if p >= threshold else tuple(v // 2 for v in _color(face))
            y = top + 2 + k * bar
            draw.rectangle((zero, y, zero + p * (full - zero), y + bar - 1), fill=color)
    mark = zero + threshold * (full - zero)
    draw.line((mark, 22, mark, 22 + step * len(aus) - 3), fill=(200, 200, 200))
