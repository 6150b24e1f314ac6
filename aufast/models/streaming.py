"""AAR on a video that is still running: frames in, predictions out, the graph-GRU's state carried along."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aufast.models.layers import check_pictures

if TYPE_CHECKING:
    from types import TracebackType

    from aufast.models.aar import AAR, AAROutput


class AARStream:
    """One video, or several side by side, from the first frame to the last: see `AAR.stream`.

    A stream belongs to its videos: the next ones get a stream of their own, or this one after `reset`. Used
    as a context manager it is closed at the end and takes no frame after that.

    Args:
        model: in evaluation mode.
        chunk: frames that go through the network together; more in one call are taken in pieces.

    Attributes:
        frames: how many frames of the video have been seen.
        state: of the graph-GRU after them; None before the first, and for variants without one.
    """

    def __init__(self, model: AAR, chunk: int = 16):
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"{model.name}: chunk must be an integer of at least 1, got {chunk!r}")
        if model.name == "aa-gsp-tavg":
            raise ValueError(
                "aa-gsp-tavg: its predictions are averages over the whole clip, which a stream cannot know; "
                "stream 'aa-gsp', or run the whole clip"
            )
        self.model, self.chunk = model, chunk
        self.closed = False
        self.reset()

    def reset(self) -> None:
        """Forget the video: the next frame is the first of another."""
        self.frames = 0
        self.state: tuple[Tensor, ...] | None = None
        self._videos: int | None = None

    def close(self) -> None:
        """End the stream; it takes no more frames."""
        self.reset()
        self.closed = True

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> AAROutput:
        """Recognise action units in the next frames.

        Args:
            frames: (3, l, l) one frame, (T, 3, l, l) the next T of one video, or (B, T, 3, l, l) of B videos.

        Returns:
            What the model returns for these frames as part of the whole video, each tensor with the leading
            axes of `frames`: none, (T,) or (B, T). `state` is the one after the last of them.

        Raises:
            RuntimeError: the stream is closed, or the model is in training mode.
            TypeError, ValueError: frames of wrong rank, size, dtype or device, or of another number of videos
                than before.
        """
        if self.closed:
            raise RuntimeError(f"{self.model.name}: this stream is closed; a new video needs a new one")
        if self.model.training:
            raise RuntimeError(f"{self.model.name}: a stream needs the model in evaluation mode")
        axes = frames.dim() - 3 if isinstance(frames, Tensor) else 0
        clips = frames[(None,) * (2 - axes)] if axes in (0, 1) and isinstance(frames, Tensor) else frames
        check_pictures(self.model, "frames", clips, "B, T")
        if self._videos not in (None, len(clips)):
            raise ValueError(
                f"{self.model.name}: this stream is of {self._videos} videos, got frames of {len(clips)}; "
                "reset it, or make a new one"
            )
        self._videos = len(clips)
        found = []
        for piece in clips.split(self.chunk, dim=1):
            found.append(self.model(piece, self.state))
            self.state = found[-1].state
        self.frames += clips.shape[1]
        return self._joined(found, axes)

    def _joined(self, found: list[AAROutput], axes: int) -> AAROutput:
        joined = {}
        for name in found[0]._fields:
            values = [getattr(one, name) for one in found]
            if name == "state" or values[0] is None:
                joined[name] = values[-1]
                continue
            whole = torch.cat(values, dim=1)  # (B, T, …)
            joined[name] = whole[(0,) * (2 - axes)]
        return type(found[0])(**joined)

    def __enter__(self) -> AARStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
