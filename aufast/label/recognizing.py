"""The model's part: aligned faces in, probabilities out, in batches or as streams."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from aufast.faces import au_centers
from aufast.label.config import InputError
from aufast.label.finding import FORGET, FoundFace, Seen
from aufast.models import AAR, MARGL, optimize_for_inference, to_input
from aufast.models.streaming import AARStream

NOT_FINITE = "the model gives numbers that are not finite"


class Recognizer:
    """Runs a model over the faces of frames that come in order.

    MARGL sees the faces of many frames as one batch; AAR sees each face as a stream, whose state is carried
    from call to call, so that a video gives the numbers of one long clip. A stream begins anew where its face
    was gone for more than `FORGET` frames, and after a frame whose numbers are not finite.

    Args:
        model: in evaluation mode.
        batch: faces a call; halved for good when memory runs out.
        device: "auto", "cpu" or "cuda".
        dtype: "float32" or "bfloat16", of feature maps; a model that was saved optimized keeps its own.
        keep_regions: also keep what overlays show.

    Attributes:
        seconds: spent here.

    Raises:
        ValueError: the model averages over whole clips, or the device is not there.
    """

    def __init__(
        self,
        model: MARGL | AAR,
        batch: int,
        device: str = "auto",
        dtype: str = "float32",
        keep_regions: bool = False,
    ):
        if model.name == "aa-gsp-tavg":
            raise ValueError(
                "aa-gsp-tavg averages over a whole clip, so it has no label for a frame; use aa-gsp"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, but PyTorch sees no CUDA device")
        if model.inference_dtype is None:
            model = optimize_for_inference(model.float().to(device), getattr(torch, dtype))
        self.model = model.to(device)
        self.device = device
        self.batch = batch
        self.seconds = 0.0
        self._keep_regions = keep_regions
        self._streams: dict[int, tuple[int, AARStream]] = {}  # face_id: last frame, stream

    def reset(self) -> None:
        """Forget every face: another input begins."""
        self._streams.clear()
        self.seconds = 0.0

    @torch.inference_mode()
    def predict(self, frames: Sequence[Seen]) -> None:
        """Set `probabilities` of every aligned face of these frames.

        Raises:
            InputError: "oom", when memory does not suffice for a single face.
        """
        start = time.perf_counter()
        faces = [(seen.index, face) for seen in frames for face in seen.faces if face.aligned is not None]
        if isinstance(self.model, MARGL):
            self._in_pieces(faces, self._images)
        else:
            streams: dict[int, list[tuple[int, FoundFace]]] = {}
            for index, face in faces:
                streams.setdefault(face.face_id, []).append((index, face))
            for stream in streams.values():
                for shot in _unbroken(stream):
                    self._in_pieces(shot, self._clip)
            now = frames[-1].index if frames else 0
            self._streams = {k: v for k, v in self._streams.items() if now - v[0] <= FORGET}
        self.seconds += time.perf_counter() - start

    def _in_pieces(self, faces: list[tuple[int, FoundFace]], run) -> None:
        """Have `run` take a batch at a time; it returns how many it is done with."""
        done = 0
        while done < len(faces):
            try:
                done += run(faces[done : done + self.batch])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch == 1:
                    raise InputError("oom", "the model has too little memory for a single face") from error
                self.batch //= 2

    def _images(self, faces: list[tuple[int, FoundFace]]) -> int:
        model = self.model
        pixels = np.stack([face.aligned.image for _, face in faces])  # (B, S, S, 3)
        points = np.stack([face.aligned.landmarks for _, face in faces])  # (B, 49, 2)
        centers = torch.from_numpy(au_centers(points, model.config.aus, "margl")).float()  # (B, 2, m, 2)
        found = model(self._input(pixels), centers.to(self.device))
        probabilities = found.probabilities.cpu().numpy()  # (B, m)
        for k, (_, face) in enumerate(faces):
            _keep(face, probabilities[k])
            if self._keep_regions and found.rois:
                # Level pixels to image pixels, whose first has its middle at 0.
                scales = [model.config.image_size / size for size in model.level_sizes]
                boxes = [rois[k].cpu().numpy() * s - 0.5 for rois, s in zip(found.rois, scales, strict=True)]
                face.rois = np.concatenate(boxes)  # (L·2m, 4)
        return len(faces)

    def _clip(self, faces: list[tuple[int, FoundFace]]) -> int:
        """Up to the first frame whose numbers are not finite: what comes after needs another state."""
        (first, face), (last, _) = faces[0], faces[-1]
        name = face.face_id
        pixels = np.stack([face.aligned.image for _, face in faces])  # (T, S, S, 3)
        before, stream = self._streams.get(name, (-math.inf, None))
        if stream is None or first - before > FORGET:
            stream = self.model.stream(chunk=self.batch)
        found = stream(self._input(pixels))
        probabilities = found.probabilities.cpu().numpy()  # (T, m)
        bad = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
        if len(bad):
            faces = faces[: bad[0] + 1]
            self._streams.pop(name, None)
        else:
            self._streams[name] = (last, stream)
        for k, (_, face) in enumerate(faces):
            _keep(face, probabilities[k])
            if self._keep_regions and found.attention is not None:
                face.attention = found.attention[k].amax(0).cpu().numpy()  # (s, s): over all AUs
        return len(faces)

    def _input(self, pixels: np.ndarray) -> torch.Tensor:
        return to_input(torch.from_numpy(pixels).to(self.device), self.model.config)


def _keep(face: FoundFace, probabilities: np.ndarray) -> None:
    if np.isfinite(probabilities).all():
        face.probabilities = probabilities
    else:
        face.trouble = NOT_FINITE


def _unbroken(faces: list[tuple[int, FoundFace]]) -> Iterator[list[tuple[int, FoundFace]]]:
    """One face's frames, cut where it was gone for so long that its stream begins anew."""
    start = 0
    for k in range(1, len(faces) + 1):
        if k == len(faces) or faces[k][0] - faces[k - 1][0] > FORGET:
            yield faces[start:k]
            start = k


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; PyTorch has no class of its own for it on CPUs."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
