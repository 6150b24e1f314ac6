"""The photograph and the detector that the face tests share."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data

from aufast.faces import Face, FaceDetector


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """uint8 (512, 512, 3): a file inside the scikit-image package, one frontal face."""
    return data.astronaut()


@pytest.fixture(scope="session")
def detector() -> FaceDetector:
    pytest.importorskip("dlib", reason="dlib is not installed")
    return FaceDetector()


@pytest.fixture(scope="session")
def face(detector: FaceDetector, photograph: np.ndarray) -> Face:
    return detector.detect_one(photograph, "photograph")
