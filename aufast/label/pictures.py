"""Overlays as a picture or a video."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from aufast.label.config import LabelConfig
from aufast.label.finding import FoundFace, Seen
from aufast.plot.overlay import FaceView, draw_overlay

# Ticks a second of the overlay video: 24, 25, 30 and 60 frames a second fall on ticks, others lie half a tick
# off at most, and MPEG-4 has no clock above 65,535.
_CLOCK = 60_000
_CODECS = ("libx264", "mpeg4")


def overlay(seen: Seen, aus: Sequence[int], config: LabelConfig) -> np.ndarray:
    """A labelled frame's overlay, uint8 (H, W, 3)."""
    when = "" if seen.time is None else f"{seen.time:.2f} s"
    return draw_overlay(seen.image, [view(face) for face in seen.faces], aus, config.threshold, when)


def view(face: FoundFace) -> FaceView:
    """What there is to draw of a face."""
    aligned = face.aligned
    return FaceView(
        face.face_id,
        face.box,
        face.points,
        face.probabilities,
        face.rois,
        face.attention,
        None if aligned is None else aligned.matrix,
        0 if aligned is None else len(aligned.image),
    )


class OverlayPicture:
    """The overlay of an image, as PNG."""

    def __init__(self, path: Path, aus: Sequence[int], config: LabelConfig):
        self._path, self._aus, self._config = path, aus, config

    def add(self, seen: Seen) -> None:
        """Draw and write it."""
        from PIL import Image

        Image.fromarray(overlay(seen, self._aus, self._config)).save(self._path, "PNG")

    def close(self) -> None:
        """Nothing is left to write."""


class OverlayVideo:
    """The overlays of a video, as MP4 with the input's time stamps."""

    def __init__(self, path: Path, aus: Sequence[int], config: LabelConfig):
        import av

        self._aus, self._config = aus, config
        self._container = av.open(str(path), "w", format="mp4")
        codec = next(name for name in _CODECS if name in av.codecs_available)
        # In the order of showing: else an MP4's readers drop the last frame, whose end is unknown.
        self._stream = self._container.add_stream(codec, rate=Fraction(_CLOCK), options={"bf": "0"})
        self._stream.codec_context.time_base = Fraction(1, _CLOCK)
        self._stream.pix_fmt = "yuv420p"
        self._last = -1

    def add(self, seen: Seen) -> None:
        """Encode a frame."""
        import av

        picture = overlay(seen, self._aus, self._config)
        stream = self._stream
        if self._last < 0:
            stream.height, stream.width = picture.shape[:2]
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        if picture.shape[:2] != (stream.height, stream.width):  # the video changes its size
            frame = frame.reformat(width=stream.width, height=stream.height)
        # Without a time stamp a frame is shown for a moment, so that the overlay can be watched.
        moment = 0 if self._last < 0 else self._last + _CLOCK // 25
        wanted = moment if seen.time is None else round(seen.time * _CLOCK)
        # An encoder refuses time that does not go on.
        frame.pts = self._last = max(wanted, self._last + 1, 0)
        frame.time_base = Fraction(1, _CLOCK)
        self._container.mux(stream.encode(frame))

    def close(self) -> None:
        """Flush the encoder and write the file's index."""
        if self._last >= 0:
            self._container.mux(self._stream.encode(None))
        self._container.close()
