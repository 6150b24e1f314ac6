"""Small videos made from a real photograph, and damage to them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from skimage import data

HEIGHT, WIDTH = 240, 320
RATE = 30


def face(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (height, width, 3): the photograph's face, in the middle."""
    top, left = 140 - height // 2, 220 - width // 2
    return np.ascontiguousarray(data.astronaut()[top : top + height, left : left + width])


def blank(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame without a face."""
    return np.full((height, width, 3), 90, np.uint8)


def moving(count: int, step: int = 1) -> list[np.ndarray]:
    """The face going to the right."""
    picture = face()
    return [np.ascontiguousarray(np.roll(picture, step * k, axis=1)) for k in range(count)]


def encode(
    path: Path,
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    colorspace: int | None = None,
    format: str | None = None,
) -> Path:
    """Write a video.

    Args:
        path: where, its ending choosing the container.
        frames: uint8 (H, W, 3) each.
        codec, pixel_format, options: of the encoder.
        times: presentation times in milliseconds; None spaces frames evenly.
        colorspace: FFmpeg's number of the matrix that the colours are stored by, 1 for BT.709.
        format: of the container, where the ending does not say.
    """
    import av

    clock = 15_360
    with av.open(str(path), "w", format=format) as container:
        stream = None
        for k, image in enumerate(frames):
            if stream is None:
                stream = container.add_stream(codec, rate=RATE, options=options or {})
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = pixel_format
                if colorspace is not None:
                    stream.codec_context.colorspace = colorspace
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, clock)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if colorspace is not None:
                frame = frame.reformat(format=pixel_format, dst_colorspace=colorspace)
            if times is not None:
                frame.pts, frame.time_base = round(times[k] * clock / 1000), Fraction(1, clock)
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode(None))
    return path


def remux(path: Path, target: Path, shift: float = 0.0, without: Sequence[int] = (), **options: str) -> Path:
    """Copy a video's packets into another file; its frames are to be stored in the order of showing.

    Args:
        path: the video.
        target: the file to write.
        shift: seconds that are added to its time stamps. What comes to lie before zero is cut out by an edit
            list, where the target is an MP4.
        without: packets that are left out, from 0.
        options: of the container.
    """
    import av

    with av.open(str(path)) as source, av.open(str(target), "w", options=options) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for k, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if k not in without:
                packet.pts = packet.dts = packet.pts + round(shift / packet.time_base)
                packet.stream = copy
                container.mux(packet)
    return target


def turn_mp4(path: Path) -> Path:
    """Have an MP4 say that it is shown a quarter to the right, as a telephone's does."""
    content = bytearray(path.read_bytes())
    matrix = content.find(b"tkhd") + 4 + 4 + 20 + 16  # past the box's name, version, times and layers
    assert struct.unpack_from(">9i", content, matrix)[0] == 1 << 16
    struct.pack_into(">9i", content, matrix, 0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def damage(path: Path, start: float, stop: float) -> Path:
    """Overwrite a part of a file with noise."""
    content = bytearray(path.read_bytes())
    a, b = int(start * len(content)), int(stop * len(content))
    content[a:b] = np.random.default_rng(0).bytes(b - a)
    path.write_bytes(content)
    return path
