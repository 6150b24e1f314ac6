"""Boxes or landmarks that the user brings, in place of the detector's."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aufast.data.landmarks import COUNTS
from aufast.data.tables import header, read_lines, refuse

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


def read_faces(path: Path, one_based: bool = False) -> dict[int, list[GivenFace]]:
    """Read a file of faces.

    Its first columns are `frame,face_id`, frames counted from 1 as in the tables that aufast writes; then
    either `x1,y1,x2,y2`, a box whose x2 and y2 are exclusive, or `x0,y0,x1,y1,…` of 49, 66 or 68 points. A
    frame without a row has no face.

    Args:
        path: the CSV.
        one_based: coordinates count the first pixel as 1.

    Returns:
        Faces by frame index from 0.

    Raises:
        ValueError: whatever does not fit, by file and line. An empty or NaN coordinate fits: it is a face
            that cannot be aligned.
    """
    lines = read_lines(path)
    names = header(path, lines[0])
    points = [f"{axis}{k}" for k in range((len(names) - 2) // 2) for axis in "xy"]
    is_box = tuple(names[2:]) == BOX
    if names[:2] != ["frame", "face_id"] or not (
        is_box or (names[2:] == points and len(points) // 2 in COUNTS)
    ):
        counts = ", ".join(map(str, COUNTS))
        refuse(
            path,
            f"the header must be frame,face_id,{','.join(BOX)} or frame,face_id,x0,y0,… of {counts} points",
            1,
        )
    faces: dict[int, list[GivenFace]] = {}
    for number, cells in enumerate(csv.reader(lines[1:]), 2):
        if len(cells) != len(names):
            refuse(
                path,
                f"{len(cells)} values, expected {len(names)}: one file has one kind of landmarks",
                number,
            )
        frame, face_id, *values = _numbers(path, cells, number)
        if not frame.is_integer() or frame < 1 or not face_id.is_integer() or face_id < 0:
            refuse(
                path,
                f"frame {cells[0]} and face_id {cells[1]} must be whole numbers from 1 and from 0",
                number,
            )
        row = faces.setdefault(int(frame) - 1, [])
        if any(face.face_id == face_id for face in row):
            refuse(path, f"face {int(face_id)} of frame {int(frame)} is there twice", number)
        places = np.array(values) - one_based
        row.append(
            GivenFace(int(face_id), tuple(places.tolist()), None)
            if is_box
            else GivenFace(int(face_id), None, places.reshape(-1, 2))
        )
    return faces


def _numbers(path: Path, cells: list[str], line: int) -> list[float]:
    try:
        return [float(cell) if cell.strip() else math.nan for cell in cells]
    except ValueError as error:
        refuse(path, f"{error}", line)
