"""Faces and their landmarks with dlib: the HOG detector and the 68-point shape predictor."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from aufast.faces.images import check_image
from aufast.faces.landmarks import landmarks_49
from aufast.files import file_sum

FILE_NAME = "shape_predictor_68_face_landmarks.dat"
# The file of dlib.net, of the package face-recognition-models 0.3.0 and of Debian's libdlib-data 19.24.
SHA256 = "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f"
DEBIAN_PATHS = (Path("/usr/share/dlib") / FILE_NAME,)
ENVIRONMENT = "AUFAST_LANDMARKS"
LICENCE_NOTE = (
    "aufast: the 68-point landmark model was trained on the 300-W data, whose licence excludes "
    "commercial use; ask Imperial College London before using it in a product."
)
MIN_VISIBLE = 0.25  # the part of a given box that has to lie inside the image

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Face:
    """A face found in an image.

    Attributes:
        box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; may reach beyond the image.
        landmarks68: float64 (68, 2), (x, y) in pixels.
        confidence: the detector's score, a distance from its decision boundary: positive and no probability.
        landmarks: float64 (49, 2), the same points in the 49-point scheme.
    """

    box: tuple[int, int, int, int]
    landmarks68: np.ndarray
    confidence: float
    landmarks: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "landmarks", landmarks_49(self.landmarks68))


class Landmarker:
    """dlib's 68-point predictor. Not to be shared between threads: give each its own.

    Args:
        path: the model file; without it, the environment variable AUFAST_LANDMARKS, then the package
            face-recognition-models, then Debian's libdlib-data. Another file than the known one is used, with
            a warning, only when it is named by `path` or AUFAST_LANDMARKS. The known file excludes commercial
            use (it was trained on the 300-W data), which is said on standard error once per process.

    Raises:
        ImportError: dlib is not installed.
        FileNotFoundError: there is no model file.
        ValueError: the file is damaged or is not a 68-point model.
    """

    def __init__(self, path: str | os.PathLike | None = None) -> None:
        dlib = _import_dlib()
        file, is_named = find_landmark_model(path)
        known = file_sum(file) == SHA256
        if not (known or is_named):
            raise ValueError(
                f"landmark model {str(file)!r} is damaged: its SHA-256 is not that of the known file"
            )
        try:
            self._predictor = dlib.shape_predictor(str(file))
            probe = self._predictor(np.zeros((64, 64), np.uint8), dlib.rectangle(0, 0, 63, 63))
        except (RuntimeError, UnicodeEncodeError) as error:
            raise ValueError(
                f"landmark model {str(file)!r} cannot be read by dlib, it is damaged or another kind of file"
            ) from error
        if probe.num_parts != 68:
            raise ValueError(f"landmark model {str(file)!r} gives {probe.num_parts} points, 68 are needed")
        if known:
            _print_licence_note()
        else:
            logger.warning(
                "landmark model %r is not the known file; its points have not been checked", str(file)
            )

    def landmarks_in_box(self, image: np.ndarray, box: Sequence[float]) -> np.ndarray:
        """The 68 landmarks of the face in a box.

        The predictor is made for the boxes of dlib's HOG detector, about brows to chin; it is less exact in
        others.

        Args:
            image: uint8 (H, W, 3) RGB, or (H, W) greyscale.
            box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; a quarter of it or more lies in the image.

        Returns:
            float64 (68, 2), (x, y) in pixels.

        Raises:
            TypeError: the image is not a uint8 array.
            ValueError: another image shape; a box that is not four finite numbers, is empty or inverted, or
                lies outside the image for more than three quarters.
        """
        image = check_image(image)
        return self._predict(image, _check_box(box, image.shape[:2]))

    def _predict(self, image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        import dlib

        x1, y1, x2, y2 = box
        points = self._predictor(image, dlib.rectangle(x1, y1, x2 - 1, y2 - 1)).parts()
        return np.array([(point.x, point.y) for point in points], np.float64)  # (68, 2)


class FaceDetector:
    """dlib's frontal face detector with landmarks. Not to be shared between threads: give each its own.

    Args:
        upsample: times the image is doubled before the search. The detector sees faces from about 80 pixels
            on, with one doubling from 40, at four times the cost.
        landmarks_path: the landmark model, found as in `Landmarker`.
        threshold: the lowest score that counts as a face. dlib's own is 0, where textures pass that can be
            larger than the face beside them.

    Raises:
        ImportError, FileNotFoundError: as `Landmarker`.
        ValueError: as `Landmarker`, an `upsample` that is not 0, 1, 2, ..., or a `threshold` not finite.
    """

    def __init__(
        self,
        upsample: int = 0,
        landmarks_path: str | os.PathLike | None = None,
        threshold: float = 0.2,
    ) -> None:
        if upsample < 0 or not float(upsample).is_integer():
            raise ValueError(f"upsample must be 0 or a positive whole number, got {upsample}")
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold}")
        self.upsample = int(upsample)
        self.threshold = float(threshold)
        self.landmarker = Landmarker(landmarks_path)
        self._detector = _import_dlib().get_frontal_face_detector()

    def detect(self, image: np.ndarray) -> list[Face]:
        """Find the faces of an image, the largest first.

        Args:
            image: uint8 (H, W, 3) RGB, or (H, W) greyscale. BGR cannot be told from RGB and gives slightly
                other boxes.

        Returns:
            The faces; none is an empty list.

        Raises:
            TypeError: the image is not a uint8 array.
            ValueError: another shape.
        """
        image = check_image(image)
        rectangles, scores, _ = self._detector.run(image, self.upsample, self.threshold)
        faces = []
        for rectangle, score in zip(rectangles, scores, strict=True):
            box = (rectangle.left(), rectangle.top(), rectangle.right() + 1, rectangle.bottom() + 1)
            faces.append(Face(box, self.landmarker._predict(image, box), score))
        return sorted(faces, key=lambda face: (-_area(face.box), face.box))  # by place where sizes are equal

    def detect_one(self, image: np.ndarray, name: str = "image") -> Face:
        """The largest face of an image; how many there are is logged when there are several.

        Args:
            image: as for `detect`.
            name: what to call the image in the message, such as its path.

        Raises:
            TypeError, ValueError: as `detect`.
            ValueError: there is no face in the image.
        """
        return largest_face(self.detect(image), name)


def detect_faces(image: np.ndarray) -> list[Face]:
    """Find the faces of one `image`, the largest first; for many images keep a `FaceDetector`."""
    return FaceDetector().detect(image)


def largest_face(faces: Sequence[Face], name: str = "image") -> Face:
    """The largest of the `faces` found in the image called `name`; see `FaceDetector.detect_one`."""
    if not faces:
        raise ValueError(f"there is no face in {name}")
    if len(faces) > 1:
        logger.warning("%s has %d faces; the largest is used", name, len(faces))
    return max(faces, key=lambda face: _area(face.box))


def find_landmark_model(path: str | os.PathLike | None = None) -> tuple[Path, bool]:
    """The 68-point model's file, and whether the user named it (by `path` or AUFAST_LANDMARKS)."""
    named = path if path is not None else os.environ.get(ENVIRONMENT)
    if named:
        if not os.path.isfile(named):
            origin = "" if path is not None else f" (from {ENVIRONMENT})"
            raise FileNotFoundError(f"there is no landmark model file {os.fsdecode(named)!r}{origin}")
        return Path(os.fsdecode(named)), True
    # The package is located and not imported: importing it fails where setuptools has no pkg_resources.
    package = importlib.util.find_spec("face_recognition_models")
    folders = package.submodule_search_locations or () if package else ()
    for file in (*(Path(folder, "models", FILE_NAME) for folder in folders), *DEBIAN_PATHS):
        if file.is_file():
            return file, False
    raise FileNotFoundError(
        f"no landmark model: give the path of {FILE_NAME}, or set {ENVIRONMENT} to it, or install it with "
        "'pip install face-recognition-models' or, on Debian and Ubuntu, 'apt install libdlib-data'"
    )


def _import_dlib():
    try:
        import dlib
    except ImportError as error:
        raise ImportError("finding faces needs dlib: pip install 'aufast[faces]'") from error
    return dlib


@cache
def _print_licence_note() -> None:
    """Once per process."""
    sys.stderr.write(LICENCE_NOTE + "\n")


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def is_visible(box: Sequence[float], image_shape: tuple[int, int]) -> bool:
    """Whether a quarter of a box or more lies in an image of shape (H, W)."""
    height, width = image_shape
    seen = (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))
    return seen[0] < seen[2] and seen[1] < seen[3] and _area(seen) >= MIN_VISIBLE * _area(box)


def _check_box(box: Sequence[float], image_shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """A user's box in whole pixels. dlib takes any box and returns numbers without meaning."""
    try:
        x1, y1, x2, y2 = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"box must be four numbers x1, y1, x2, y2, got {box!r}") from error
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError(f"box must be finite, got {box!r}")
    if x2 - x1 < 1 or y2 - y1 < 1:
        raise ValueError(f"box must have x1 < x2 and y1 < y2, a pixel or more apart, got {box!r}")
    if not is_visible((x1, y1, x2, y2), image_shape):
        height, width = image_shape
        raise ValueError(f"box {box!r} lies outside the image of {width} x {height} pixels, or mostly so")
    return round(x1), round(y1), round(x2), round(y2)
