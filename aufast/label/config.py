"""What a labelling run is asked to do, and the states an input can end in."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal, get_args

FORMATS = ("openface", "pyfeat", "elan", "parquet")

Status = Literal["ok", "partial", "no_face", "undecodable", "too_large", "timeout", "oom"]
STATUSES: tuple[str, ...] = get_args(Status)
FINE = ("ok", "no_face")  # nothing was lost
AGAIN = ("timeout", "oom")  # may end otherwise on another machine or day, so they are tried again

LIMITS = ("timeout", "stall", "memory", "max_pixels")
# These change how fast an input is labelled and when it is given up, but not one number of its table.
_NO_NUMBERS = ("model", "batch", "workers", "device", *LIMITS, "landmarks", "faces")


@dataclass(frozen=True)
class LabelConfig:
    """What a labelling run is asked to do.

    Args:
        model: a folder saved by `save_pretrained`.
        threshold: an AU is present where its probability is at least this.
        formats: of the tables, among `FORMATS`.
        pseudo_intensity: also write `AUnn_r`, five times the probability. It is no intensity.
        detect_every: the detector looks at every K-th frame; a correlation tracker follows the faces between.
        upsample: times the image is doubled before the search, as in `FaceDetector`.
        face_threshold: lowest detector score that counts as a face.
        landmarks: file of dlib's 68-point model; None looks where `Landmarker` looks.
        faces: folder of `STEM.csv` files with boxes or landmarks of each input, in place of the detector.
        one_based: coordinates in those files count the first pixel as 1.
        min_duration: shortest segment of the ELAN table, in seconds.
        max_gap: longest pause that a segment bridges, in seconds.
        overlay: also write a picture or video with landmarks, regions or attention, and AU bars.
        report: also write one HTML page.
        batch: faces a call of the model.
        workers: detection threads; each has a detector of its own.
        device: "auto", "cpu" or "cuda".
        dtype: "float32" or "bfloat16", of feature maps; a model that was saved optimized keeps its own.
        timeout: seconds an input may take; 0 is no limit.
        stall: seconds the decoder may take for one frame.
        memory: bytes the decoder may take.
        max_pixels: larger frames and images are refused.
    """

    model: str
    threshold: float = 0.5
    formats: tuple[str, ...] = ("openface",)
    pseudo_intensity: bool = False
    detect_every: int = 1
    upsample: int = 0
    face_threshold: float = 0.2
    landmarks: str | None = None
    faces: str | None = None
    one_based: bool = False
    min_duration: float = 0.0
    max_gap: float = 0.0
    overlay: bool = False
    report: bool = False
    batch: int = 16
    workers: int = 2
    device: str = "auto"
    dtype: str = "float32"
    timeout: float = 0.0
    stall: float = 300.0
    memory: int = 4 << 30
    max_pixels: int = 80_000_000

    def __post_init__(self) -> None:
        for name, least in (("detect_every", 1), ("upsample", 0), ("batch", 1), ("workers", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, least in (
            ("min_duration", 0),
            ("max_gap", 0),
            ("timeout", 0),
            ("memory", 1),
            ("max_pixels", 1),
        ):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least} and finite, got {getattr(self, name)!r}")
        if not 0 < self.stall < math.inf:  # a decoder that hangs would hang the run
            raise ValueError(f"stall must be above 0 and finite, got {self.stall!r}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold!r}")
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats must name each table once, got {self.formats!r}")
        for name in self.formats:
            if name not in FORMATS:
                raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")

    def fingerprint(self) -> str:
        """SHA-256 of every setting that the tables depend on; models and face files are hashed by content."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, object]:
        """Those settings."""
        return {key: value for key, value in asdict(self).items() if key not in _NO_NUMBERS}


class InputError(ValueError):
    """An input that cannot be labelled: its status and one sentence.

    Args:
        status: what the input ends in.
        sentence: why, without the input's name.
    """

    def __init__(self, status: Status, sentence: str):
        super().__init__(sentence)
        self.status: Status = status
