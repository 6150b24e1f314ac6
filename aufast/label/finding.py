"""Faces in frames: found, followed, aligned and given ids, on threads and in order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from aufast.faces import (
    AlignedFace,
    Face,
    FaceDetector,
    FaceTracker,
    Landmarker,
    align_face,
    crop_face,
    landmarks_49,
)
from aufast.label.config import LabelConfig
from aufast.label.given import GivenFace, GivenFaces
from aufast.label.video import Frame

SAME_FACE = 0.3  # the overlap, intersection over union, from which two boxes are one face
FORGET = 30  # frames after which a face that comes back is a new one
AHEAD = (
    256 << 20
)  # bytes of pixels that may wait where threads follow faces side by side or pictures are kept
LONG = 100  # frames of a stretch that are read ahead at most


@dataclass(eq=False)
class FoundFace:
    """A face in a frame, and what the model says of it.

    Attributes:
        box: x1, y1, x2, y2 in the frame's pixels, x2 and y2 exclusive.
        points: float64 (68 | 66 | 49, 2) landmarks; None where the given box has none.
        confidence: in [0, 1].
        aligned: cut to the model's size; None where that cannot be done.
        trouble: why it cannot.
        face_id: stable from frame to frame.
        probabilities: (m,), set by the model.
        rois: MARGL's boxes (n, 4) in aligned pixels, for overlays.
        attention: AAR's map (s, s), the largest of all AUs, for overlays.
    """

    box: tuple[int, int, int, int]
    points: np.ndarray | None
    confidence: float
    aligned: AlignedFace | None = None
    trouble: str = ""
    face_id: int = 0
    probabilities: np.ndarray | None = None
    rois: np.ndarray | None = None
    attention: np.ndarray | None = None


@dataclass(eq=False)
class Seen:
    """A frame whose faces are found; `image` is kept only where a picture is asked for."""

    index: int
    time: float | None
    image: np.ndarray | None
    faces: list[FoundFace] = field(default_factory=list)


class Identities:
    """Gives faces ids that stay with them, by how much their boxes overlap from frame to frame."""

    def __init__(self) -> None:
        self._tracks: dict[int, tuple[int, tuple[int, int, int, int]]] = {}  # id: last frame, last box
        self._next = 0

    def assign(self, index: int, faces: Sequence[FoundFace]) -> None:
        """Set `face_id` of the faces of frame `index`, frames coming in order."""
        for name in [name for name, (last, _) in self._tracks.items() if index - last > FORGET]:
            del self._tracks[name]
        pairs = sorted(
            (-overlap(face.box, box), name, k)
            for k, face in enumerate(faces)
            for name, (_, box) in self._tracks.items()
            if overlap(face.box, box) >= SAME_FACE
        )
        ids: dict[int, int] = {}
        for _, name, k in pairs:
            if k not in ids and name not in ids.values():
                ids[k] = name
        for k, face in enumerate(faces):
            if k not in ids:
                ids[k] = self._next
                self._next += 1
            face.face_id = ids[k]
            self._tracks[face.face_id] = (index, face.box)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


class FaceStage:
    """Finds the faces of frames on threads, ahead of its reader by a bounded number of frames.

    Args:
        config: of the run.
        size: side of an aligned face that the model takes.

    Attributes:
        seconds: spent finding and aligning, summed over the threads.

    Raises:
        ImportError, FileNotFoundError, ValueError: there is no detector, as `FaceDetector`.
    """

    def __init__(self, config: LabelConfig, size: int):
        self._config, self._size = config, size
        self._own = threading.local()
        # The first thread's, so that a missing model is told before any work. Given faces may need none.
        self._spare = [] if config.faces else [self._detector()]
        self._pool = ThreadPoolExecutor(config.workers, thread_name_prefix="faces")
        self._keep_images = config.overlay or config.report
        self.seconds = 0.0
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, frames: Iterable[Frame], given: GivenFaces | None = None) -> Iterator[Seen]:
        """The frames with their faces, in order.

        Args:
            frames: read on a thread of its own; what it raises is raised here.
            given: faces in place of the detector's.
        """
        config = self._config
        length = 1 if given is not None else config.detect_every
        room = _Room(config.workers + 1, AHEAD if length > 1 or self._keep_images else 0)
        ahead = max(2 * config.batch, config.workers * min(length, LONG))
        ready: queue.Queue[Future | BaseException | None] = queue.Queue(ahead)

        def put(item: Future | BaseException | None) -> None:
            while not room.closed:
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def feed() -> None:
            stretch = _Stretch((0, 0, 0), 0)  # as long as it can be
            try:
                for frame in frames:
                    known = None if given is None else given.of(frame.index)
                    if not room.take(frame.image.nbytes):
                        return
                    if not stretch.fits(frame.image):
                        stretch.end()
                        stretch = _Stretch(frame.image.shape, length)
                        self._pool.submit(self._work, stretch, room)
                    put(stretch.add(frame, known))
                put(None)
            except BaseException as error:  # the reader's own thread raises it again
                put(error)
            finally:
                stretch.end()

        feeder = threading.Thread(target=feed, name="frames", daemon=True)
        feeder.start()
        identities = Identities()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                seen = item.result()
                if seen.image is not None:
                    room.give(seen.image.nbytes)
                if given is None:
                    identities.assign(seen.index, seen.faces)
                seen.faces.sort(key=lambda face: face.face_id)
                yield seen
        finally:
            room.close()
            feeder.join()

    def _work(self, stretch: _Stretch, room: _Room) -> None:
        """Detect in a stretch's first frame and follow in the others, or take given faces, frame by frame."""
        last: tuple[np.ndarray, list[Face | None]] | None = None  # the first frame, until a second one comes
        tracker: FaceTracker | None = None
        while (item := stretch.frames.get()) is not None:
            frame, known, future = item
            start = time.perf_counter()
            try:
                if known is not None:
                    seen = self._take(frame, known)
                elif last is None and tracker is None:
                    faces: list[Face | None] = list(self._own_detector().detect(frame.image))
                    last = frame.image, faces
                    seen = self._align(frame, faces)
                else:
                    if tracker is None:
                        tracker = FaceTracker(self._own_detector().landmarker, *last)
                        last = None
                    seen = self._align(frame, tracker.follow(frame.image))
                future.set_result(seen)
            except BaseException as error:  # told where the frame is asked for
                future.set_exception(error)
            if not self._keep_images:
                room.give(frame.image.nbytes)
            with self._lock:
                self.seconds += time.perf_counter() - start

    def _own_detector(self) -> FaceDetector:
        """This thread's."""
        if not hasattr(self._own, "detector"):
            with self._lock:
                spare = self._spare.pop() if self._spare else None
            self._own.detector = spare or self._detector()
        return self._own.detector

    def _detector(self) -> FaceDetector:
        config = self._config
        return FaceDetector(config.upsample, config.landmarks, config.face_threshold)

    def _align(self, frame: Frame, faces: Sequence[Face | None]) -> Seen:
        # The score is the margin of dlib's support vector machine; from 1 on a face is beyond the margin.
        found = [
            FoundFace(face.box, face.landmarks68, min(face.confidence, 1.0))
            for face in faces
            if face is not None
        ]
        return self._cut(frame, found)

    def _take(self, frame: Frame, given: Sequence[GivenFace]) -> Seen:
        """The user's faces; landmarks are predicted in boxes that come without."""
        found = []
        for face in given:
            new = FoundFace((0, 0, 0, 0), face.points, 1.0, face_id=face.face_id)
            try:
                if face.points is None:
                    if not hasattr(self._own, "landmarker"):
                        self._own.landmarker = Landmarker(self._config.landmarks)
                    new.points = self._own.landmarker.landmarks_in_box(frame.image, face.box)
                    new.box = tuple(round(v) for v in face.box)
                elif np.isfinite(face.points).all():
                    low, high = face.points.min(axis=0), face.points.max(axis=0)
                    new.box = tuple(int(v) for v in (*np.floor(low), *np.ceil(high) + 1))
            except ValueError as error:
                new.trouble = str(error)
            found.append(new)
        return self._cut(frame, found)

    def _cut(self, frame: Frame, found: list[FoundFace]) -> Seen:
        for face in found:
            if face.trouble:
                continue
            try:
                whole = align_face(frame.image, landmarks_49(face.points), max(200, self._size))
                face.aligned = crop_face(whole, self._size)
            except ValueError as error:
                face.trouble = str(error)
        return Seen(frame.index, frame.time, frame.image if self._keep_images else None, found)


class _Stretch:
    """Frames of one size in a row, for one thread: a tracker cannot follow from one size to another.

    Args:
        shape: of the frames.
        length: how many there are at most.
    """

    def __init__(self, shape: tuple[int, ...], length: int):
        self._shape, self._left = shape, length
        self.frames: queue.SimpleQueue[tuple[Frame, list[GivenFace] | None, Future] | None]
        self.frames = queue.SimpleQueue()

    def fits(self, image: np.ndarray) -> bool:
        """Whether a frame can be the next."""
        return self._left > 0 and image.shape == self._shape

    def add(self, frame: Frame, known: list[GivenFace] | None) -> Future:
        """Hand a frame over; what is found in it comes later."""
        future: Future[Seen] = Future()
        self._left -= 1
        self.frames.put((frame, known, future))
        return future

    def end(self) -> None:
        """Let the thread go."""
        self.frames.put(None)


class _Room:
    """How many pixels may wait: those of a few frames, and of more while they take little.

    Args:
        frames: that may wait in any case.
        size: bytes that more of them may take.
    """

    def __init__(self, frames: int, size: int):
        self._frames, self._size = frames, size
        self._count = self._bytes = 0
        self._changed = threading.Condition()
        self.closed = False

    def take(self, size: int) -> bool:
        """Wait until a frame of `size` bytes has room; False where nobody waits for it any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.closed or self._count < self._frames or self._bytes + size <= self._size
            )
            self._count += 1
            self._bytes += size
            return not self.closed

    def give(self, size: int) -> None:
        """A frame is done with."""
        with self._changed:
            self._count -= 1
            self._bytes -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
