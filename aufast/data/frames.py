"""The pictures of a record, one after another, from image files or a video file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aufast.data.records import Video
from aufast.faces import load_image

# FFmpeg also opens playlists, which name other files and addresses: only films, and only from this disk.
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv"
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": VIDEO_FORMATS}


def iterate_frames(video: Video) -> Iterator[np.ndarray | ValueError]:
    """Each frame of a `video` in order.

    Yields:
        uint8 (H, W, 3) RGB, or the error that names the frame that could not be read; a video file that ends
        early gives errors for the frames it lacks.

    Raises:
        ImportError: a video file, and PyAV is not installed.
        ValueError: a video file that cannot be opened.
    """
    if video.images is not None:
        for path in video.images:
            try:
                yield load_image(path)
            except ValueError as error:
                yield error
        return
    wanted = iter(video.positions.tolist())
    position = next(wanted, None)
    for k, image in enumerate(_decode(video.movie)):
        if k == position:
            yield image
            position = next(wanted, None)
        if position is None:
            return
    while position is not None:
        yield ValueError(f"{video.movie}: ends before frame {position + 1}")
        position = next(wanted, None)


def told_frames(path: Path) -> int | None:
    """How many frames a video file says it holds; None where it does not say, or PyAV is not installed."""
    try:
        import av
    except ImportError:
        return None
    try:
        with av.open(str(path.absolute()), options=_OPTIONS) as container:
            return container.streams.video[0].frames or None
    except (av.FFmpegError, IndexError, OSError, ValueError):
        return None  # what cannot be opened is said when its frames are read


def _decode(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video file up to its end or to the first one that is damaged."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: reading videos needs PyAV: pip install 'aufast[video]'") from error
    try:
        container = av.open(str(path.absolute()), options=_OPTIONS)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be opened as a video: {error}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{path}: holds no video")
        try:
            for frame in container.decode(container.streams.video[0]):
                yield frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, OSError, ValueError):  # what is missing is named by the caller
            return
