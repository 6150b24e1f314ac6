"""Faces: finding them, their landmarks, AU centres, and alignment."""

from aufast.faces.align import AlignedFace, align_face, crop_face
from aufast.faces.centers import attention_targets, au_centers
from aufast.faces.detector import (
    Face,
    FaceDetector,
    Landmarker,
    detect_faces,
    find_landmark_model,
    largest_face,
)
from aufast.faces.images import load_image, read_image
from aufast.faces.landmarks import MIRROR_49, landmarks_49, mirror_landmarks
from aufast.faces.tracker import FaceTracker

__all__ = [
    "MIRROR_49",
    "AlignedFace",
    "Face",
    "FaceDetector",
    "FaceTracker",
    "Landmarker",
    "align_face",
    "attention_targets",
    "au_centers",
    "crop_face",
    "detect_faces",
    "find_landmark_model",
    "landmarks_49",
    "largest_face",
    "load_image",
    "mirror_landmarks",
    "read_image",
]
