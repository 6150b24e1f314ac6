"""Landmarks from a CSV: `frame,x0,y0,x1,y1,…`, 49, 66 or 68 points, pixels from 0, empty cells for none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aufast.data.tables import header, increasing, read_lines, refuse
from aufast.faces import landmarks_49

COUNTS = (49, 66, 68)


def load_landmarks(path: Path, numbers: np.ndarray) -> np.ndarray:
    """Landmarks of these frames.

    Args:
        path: a CSV written by `write_landmarks`, or alike.
        numbers: frame numbers (k,).

    Returns:
        float64 (k, 49, 2), NaN for frames that the file leaves out or leaves empty.

    Raises:
        ValueError: a column or value that does not fit; file and line are named.
    """
    lines = read_lines(path)
    names = header(path, lines[0])
    count = (len(names) - 1) // 2
    if count not in COUNTS or names != column_names(count):
        refuse(path, "the header must be frame,x0,y0,x1,y1,… for 49, 66 or 68 points", 1)
    rows = np.empty((len(lines) - 1, len(names)))
    for number, line in enumerate(lines[1:], 2):
        cells = line.split(",")
        if len(cells) != len(names):
            refuse(path, f"{len(cells)} values, expected {len(names)}", number)
        try:
            rows[number - 2] = [float(cell) if cell.strip() else np.nan for cell in cells]
        except ValueError as error:
            refuse(path, f"{error}", number)
    found = rows[:, 0]
    if not (np.isfinite(found) & (found == np.floor(found))).all():
        row = int(np.flatnonzero(~(np.isfinite(found) & (found == np.floor(found))))[0])
        refuse(path, f"the frame number {lines[row + 1].split(',')[0]!r} is not a whole number", row + 2)
    found = increasing(path, found.astype(np.int64), 2)
    return by_number(landmarks_49(rows[:, 1:].reshape(-1, count, 2)), found, numbers)


def write_landmarks(path: Path, numbers: np.ndarray, points: np.ndarray) -> None:
    """Write landmarks (n, 49 | 66 | 68, 2) of the frames `numbers` (n,), to a hundredth of a pixel."""
    lines = [",".join(column_names(points.shape[1]))]
    for number, row in zip(numbers, points.reshape(len(points), -1), strict=True):
        lines.append(f"{number}," + ",".join("" if np.isnan(v) else f"{v:.2f}" for v in row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def column_names(count: int) -> list[str]:
    """The header of a file of `count` points."""
    return ["frame", *(f"{axis}{k}" for k in range(count) for axis in "xy")]


def by_number(points: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rows of `points` (n, 49, 2), which belong to the numbers `found` (n,), for the numbers `wanted` (k,).

    Returns:
        float64 (k, 49, 2), NaN where a number was not found.
    """
    rows = {int(number): row for row, number in enumerate(found)}
    out = np.full((len(wanted), 49, 2), np.nan)
    for k, number in enumerate(wanted):
        if (row := rows.get(int(number))) is not None:
            out[k] = points[row]
    return out
