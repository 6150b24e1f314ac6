"""Following found faces from frame to frame, at a tenth of the detector's cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aufast.faces.detector import Face, Landmarker, is_visible
from aufast.faces.images import check_image

# Peak-to-sidelobe ratio under which a correlation filter has lost its object: Bolme et al., Visual object
# tracking using adaptive correlation filters, CVPR 2010.
LOST = 7.0


class FaceTracker:
    """dlib's correlation trackers, one a face. Not to be shared between threads.

    Args:
        landmarker: predicts the landmarks in the followed boxes.
        image: uint8 (H, W, 3) RGB that the faces were found in.
        faces: to follow.
    """

    def __init__(self, landmarker: Landmarker, image: np.ndarray, faces: Sequence[Face]):
        import dlib

        self._landmarker = landmarker
        self._faces: list[Face | None] = list(faces)
        self._trackers = [dlib.correlation_tracker() for _ in faces]
        image = check_image(image)
        for tracker, face in zip(self._trackers, faces, strict=True):
            x1, y1, x2, y2 = face.box
            tracker.start_track(image, dlib.rectangle(x1, y1, x2 - 1, y2 - 1))

    def follow(self, image: np.ndarray) -> list[Face | None]:
        """The faces in the next frame, in their first order; None for one that is lost, from then on.

        Args:
            image: uint8 (H, W, 3) RGB, of the first one's size.
        """
        image = check_image(image)
        for index, (tracker, face) in enumerate(zip(self._trackers, self._faces, strict=True)):
            if face is None:
                continue
            ratio, place = tracker.update(image), tracker.get_position()
            box = tuple(round(v) for v in (place.left(), place.top(), place.right() + 1, place.bottom() + 1))
            if ratio < LOST or not is_visible(box, image.shape[:2]):
                self._faces[index] = None
                continue
            points = self._landmarker.landmarks_in_box(image, box)
            self._faces[index] = Face(box, points, face.confidence)
        return list(self._faces)
