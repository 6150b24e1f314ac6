"""Boxes or landmarks that the user brings, in place of the detector's."""

from __future__ import annotations

import contextlib
import csv
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aufast.data.landmarks import COUNTS
from aufast.data.tables import refuse
from aufast.label.config import InputError, Status

BOX = ("x1", "y1", "x2", "y2")


@dataclass(frozen=True, eq=False)
class GivenFace:
    """A face of a file.

    Attributes:
        face_id: as in the file.
        box: x1, y1, x2, y2, or None.
        points: float64 (49 | 66 | 68, 2), or None.
    """

    face_id: int
    box: tuple[float, ...] | None
    points: np.ndarray | None


class GivenFaces:
    """The faces of a file, frame by frame, in memory that does not grow with the file.

    The file's first columns are `frame,face_id`, frames counted from 1 as in the tables that aufast writes
    and in order; then either `x1,y1,x2,y2`, a box whose x2 and y2 are exclusive, or `x0,y0,x1,y1,…` of 49, 66
    or 68 points. A frame without a row has no face.

    Args:
        path: the CSV; it is checked as a whole before its first face is given.
        one_based: coordinates count the first pixel as 1.

    Attributes:
        last: the last frame that has a row, counted from 1; 0 where none has.

    Raises:
        InputError: the file cannot be read, or something in it does not fit, by file and line. An empty or
            NaN coordinate fits: it is a face that cannot be aligned.
    """

    def __init__(self, path: Path, one_based: bool = False):
        self._path, self._shift = path, int(one_based)
        self.last = 0
        with _readable(path, "undecodable"):
            for index, _ in self._frames():
                self.last = index + 1
            self._rest = self._frames()
            self._next = next(self._rest, None)

    def of(self, index: int) -> list[GivenFace]:
        """The faces of frame `index`, from 0; frames are asked for in order.

        Raises:
            InputError: the file was changed since it was checked.
        """
        with _readable(self._path, "partial"):
            while self._next is not None and self._next[0] < index:
                self._next = next(self._rest, None)
        return self._next[1] if self._next is not None and self._next[0] == index else []

    def _frames(self) -> Iterator[tuple[int, list[GivenFace]]]:
        """Frame indices with their faces."""
        path, frame, faces = self._path, 0, []
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            try:
                names = self._header(next(lines, None))
                for number, cells in enumerate(lines, 2):
                    if len(cells) != len(names):
                        what = f"{len(cells)} values, expected {len(names)}: a file has one kind of landmarks"
                        refuse(path, what, number)
                    values = _numbers(path, cells, number)
                    face = self._face(cells, values, number, is_box=names[2:] == list(BOX))
                    if values[0] < frame:
                        refuse(path, f"frame {values[0]:g} follows frame {frame}", number)
                    if values[0] > frame:
                        if faces:
                            yield frame - 1, faces
                        frame, faces = int(values[0]), []
                    if any(other.face_id == face.face_id for other in faces):
                        refuse(path, f"face {face.face_id} of frame {frame} is there twice", number)
                    faces.append(face)
            except (UnicodeDecodeError, csv.Error) as error:
                refuse(path, f"cannot be read as text: {error}")
        if faces:
            yield frame - 1, faces

    def _header(self, cells: list[str] | None) -> list[str]:
        if cells is None:
            refuse(self._path, "the file is empty")
        names = [cell.strip() for cell in cells]
        count = (len(names) - 2) // 2
        points = [f"{axis}{k}" for k in range(count) for axis in "xy"]
        fits = names[2:] == list(BOX) or (names[2:] == points and count in COUNTS)
        if names[:2] != ["frame", "face_id"] or not fits:
            counts = ", ".join(map(str, COUNTS))
            expected = f"frame,face_id,{','.join(BOX)} or frame,face_id,x0,y0,… of {counts} points"
            refuse(self._path, f"the header must be {expected}", 1)
        return names

    def _face(self, cells: list[str], values: list[float], line: int, is_box: bool) -> GivenFace:
        frame, face_id = values[:2]
        if not (frame.is_integer() and frame >= 1 and face_id.is_integer() and face_id >= 0):
            numbers = f"frame {cells[0]} and face_id {cells[1]}"
            refuse(self._path, f"{numbers} must be whole numbers from 1 and from 0", line)
        places = np.array(values[2:]) - self._shift
        if is_box:
            return GivenFace(int(face_id), tuple(places.tolist()), None)
        return GivenFace(int(face_id), None, places.reshape(-1, 2))


@contextlib.contextmanager
def _readable(path: Path, status: Status) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(status, f"the file of faces {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(status, str(error)) from error


def faces_file(folder: str, path: str | os.PathLike) -> Path:
    """Where the boxes or landmarks of an input are looked for.

    For `recordings/a/clip.mp4` that is `a/clip.mp4.csv` or `a/clip.csv` in the folder, with as many of the
    input's own folders as there are, and at last `clip.mp4.csv` or `clip.csv`.
    """
    whole = Path(os.path.abspath(path))
    parts = whole.parent.parts[1:]
    for k in range(len(parts) + 1):
        for name in (whole.name, whole.stem):
            file = Path(folder, *parts[k:], name + ".csv")
            if os.path.isfile(file):
                return file
    return Path(folder, whole.stem + ".csv")


def shared_faces(folder: str, paths: Iterable[str]) -> dict[str, str]:
    """Inputs that would take their faces from one file, each with another one that would."""
    by_stem: dict[str, list[str]] = {}
    for path in paths:
        by_stem.setdefault(Path(path).stem, []).append(path)
    shared = {}
    for group in by_stem.values():
        by_file: dict[Path, list[str]] = {}
        for path in group if len(group) > 1 else ():
            by_file.setdefault(faces_file(folder, path), []).append(path)
        for same in by_file.values():
            shared |= {path: same[0] if path != same[0] else same[1] for path in same if len(same) > 1}
    return shared


def has_boxes(path: Path) -> bool:
    """Whether a file of faces holds boxes, in which landmarks are still to be found."""
    with _readable(path, "undecodable"), open(path, encoding="utf-8-sig", errors="replace") as file:
        return [cell.strip() for cell in file.readline().split(",")][2:] == list(BOX)


def _numbers(path: Path, cells: list[str], line: int) -> list[float]:
    try:
        return [float(cell) if cell.strip() else math.nan for cell in cells]
    except ValueError as error:
        refuse(path, f"{error}", line)
