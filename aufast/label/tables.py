"""AU tables in the layouts that other programs read.

Every writer takes frames in order and writes as they come, so that memory does not grow with the video.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aufast.faces.landmarks import FROM_68
from aufast.label.config import LabelConfig
from aufast.label.finding import FoundFace, Seen

SUFFIXES = {"openface": ".csv", "pyfeat": ".pyfeat.csv", "elan": ".elan.tsv", "parquet": ".parquet"}
_POINTS = {68: range(68), 66: (*range(17), *FROM_68), 49: FROM_68}


class Sink(Protocol):
    """Whatever takes labelled frames in order."""

    def add(self, seen: Seen) -> None:
        """Take the next frame."""

    def close(self) -> None:
        """Write what is left."""


def open_table(format: str, path: Path, aus: Sequence[int], config: LabelConfig, name: str) -> Sink:
    """A writer of one of `FORMATS`.

    Args:
        format: its name.
        path: the file to write.
        aus: the model's AUs; others have no column.
        config: threshold and the like.
        name: of the input, for the formats that have a column for it.

    Raises:
        ImportError: parquet without pyarrow.
    """
    if format == "pyfeat":
        return PyFeatTable(path, aus, name)
    if format == "elan":
        return ElanTable(path, aus, config)
    return (OpenFaceTable if format == "openface" else ParquetTable)(path, aus, config)


# ---- one row a face --------------------------------------------------------------------------------


def columns(aus: Sequence[int], config: LabelConfig) -> list[str]:
    """The columns of the tables in OpenFace's layout."""
    kinds = ("r", "c", "p") if config.pseudo_intensity else ("c", "p")
    names = [f"AU{au:02d}_{kind}" for kind in kinds for au in aus]
    return ["frame", "face_id", "timestamp", "confidence", "success", *names]


def rows(seen: Seen, aus: Sequence[int], config: LabelConfig) -> list[list[Any]]:
    """A frame's rows in that order: one a face, or one that says that there is none."""
    return [_row(seen, face, len(aus), config) for face in seen.faces or [None]]


def _row(seen: Seen, face: FoundFace | None, m: int, config: LabelConfig) -> list[Any]:
    found = face is not None and face.probabilities is not None
    p = [round(float(v), 6) for v in face.probabilities] if found else [0.0] * m
    present = [int(v >= config.threshold) for v in face.probabilities] if found else [0] * m
    intensity = [round(5 * v, 6) for v in p] if config.pseudo_intensity else []
    face_id, confidence = (
        (0, 0.0) if face is None else (face.face_id, round(face.confidence, 4) if found else 0.0)
    )
    return [seen.index + 1, face_id, seen.time, confidence, int(found), *intensity, *present, *p]


class _Text:
    """A text file of lines, UTF-8, `\\n`, whatever the locale."""

    def __init__(self, path: Path, header: Sequence[str], separator: str = ","):
        self._separator = separator
        # A file name, in a column of py-feat's table, may hold bytes that are not text.
        self._file = open(path, "w", encoding="utf-8", errors="backslashreplace", newline="")
        self._line(header)

    def _line(self, cells: Sequence[Any]) -> None:
        self._file.write(self._separator.join(map(_cell, cells)) + "\n")

    def close(self) -> None:
        """Write what is left and close the file."""
        self._file.close()


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return str(value)


class OpenFaceTable(_Text):
    """OpenFace 2's columns: frames from 1, seconds, presence `_c`, and probabilities as `_p`."""

    def __init__(self, path: Path, aus: Sequence[int], config: LabelConfig):
        super().__init__(path, columns(aus, config))
        self._aus, self._config = aus, config

    def add(self, seen: Seen) -> None:
        """Write a frame's rows."""
        for row in rows(seen, self._aus, self._config):
            self._line(row)


class ParquetTable:
    """OpenFace's columns as Parquet, in groups of rows. Needs pyarrow (extra `parquet`)."""

    GROUP = 4096

    def __init__(self, path: Path, aus: Sequence[int], config: LabelConfig):
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError("the format parquet needs pyarrow: pip install 'aufast[parquet]'") from error
        self._arrow, self._aus, self._config = arrow, aus, config
        kinds = {"frame": arrow.int64(), "face_id": arrow.int64(), "timestamp": arrow.float64()}
        kinds |= {"confidence": arrow.float64(), "success": arrow.int8()}
        self._schema = arrow.schema(
            [
                (name, kinds.get(name, arrow.int8() if name.endswith("_c") else arrow.float64()))
                for name in columns(aus, config)
            ]
        )
        self._writer = parquet.ParquetWriter(path, self._schema)
        self._rows: list[list[Any]] = []

    def add(self, seen: Seen) -> None:
        """Take a frame's rows."""
        self._rows += rows(seen, self._aus, self._config)
        if len(self._rows) >= self.GROUP:
            self._flush()

    def _flush(self) -> None:
        cells = zip(*self._rows, strict=True)
        arrays = [self._arrow.array(v, kind.type) for v, kind in zip(cells, self._schema, strict=True)]
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        """Write what is left and the footer."""
        if self._rows:
            self._flush()
        self._writer.close()


class PyFeatTable(_Text):
    """py-feat's columns: frames from 0, box, score, 68 landmarks, probabilities; empty cells for no face."""

    def __init__(self, path: Path, aus: Sequence[int], name: str):
        box = ("FaceRectX", "FaceRectY", "FaceRectWidth", "FaceRectHeight", "FaceScore")
        points = [f"{axis}_{k}" for axis in "xy" for k in range(68)]
        super().__init__(path, ["frame", *box, *points, *(f"AU{au:02d}" for au in aus), "face_id", "input"])
        self._m, self._input = len(aus), '"' + name.replace('"', '""') + '"'

    def add(self, seen: Seen) -> None:
        """Write a frame's rows."""
        for face in seen.faces:
            x1, y1, x2, y2 = face.box
            p = face.probabilities if face.probabilities is not None else np.full(self._m, np.nan)
            box = (x1, y1, x2 - x1, y2 - y1, float(face.confidence))
            points = points_68(face.points).T.ravel()  # x first, then y
            cells = [*box, *map(float, points), *map(float, p), face.face_id]
            self._line([seen.index, *cells, self._input])
        if not seen.faces:
            self._line([seen.index, *[None] * (5 + 136 + self._m + 1), self._input])


def points_68(points: np.ndarray | None) -> np.ndarray:
    """Landmarks (49 | 66 | 68, 2) in the 68-point scheme, NaN where they have none."""
    out = np.full((68, 2), np.nan)
    if points is not None:
        out[list(_POINTS[len(points)])] = points
    return out


# ---- one row a segment -----------------------------------------------------------------------------


class ElanTable(_Text):
    """Segments for ELAN's import of text: tier; begin, end and duration in milliseconds; mean probability.

    A segment lasts from its first frame to the frame after its last. Frames without a time stamp take part in
    no segment.
    """

    def __init__(self, path: Path, aus: Sequence[int], config: LabelConfig):
        super().__init__(path, ("Tier", "Begin", "End", "Duration", "Annotation"), "\t")
        self._aus, self._config = aus, config
        self._open: dict[tuple[int, int], _Segment] = {}  # by face and AU
        self._last: tuple[float, float] | None = None  # time and duration of the frame before

    def add(self, seen: Seen) -> None:
        """Begin, continue and end segments."""
        if seen.time is None or (self._last is not None and seen.time <= self._last[0]):
            return
        before, self._last = self._last, (seen.time, 0.0)
        if before is not None:
            self._last = (seen.time, seen.time - before[0])
        # Every open segment that was present in the frame before lasts until this one.
        for segment in self._open.values():
            if before is not None and segment.seen == before[0]:
                segment.end = seen.time
        for face in seen.faces:
            if face.probabilities is None:
                continue
            for au, p in zip(self._aus, face.probabilities, strict=True):
                if p >= self._config.threshold:
                    self._present((face.face_id, au), seen.time, float(p))
        for key in [k for k, s in self._open.items() if seen.time - s.end > self._config.max_gap]:
            if self._open[key].seen != seen.time:
                self._write(key, self._open.pop(key))

    def _present(self, key: tuple[int, int], now: float, p: float) -> None:
        segment = self._open.get(key)
        if segment is not None and now - segment.end > self._config.max_gap:
            self._write(key, self._open.pop(key))
            segment = None
        if segment is None:
            segment = self._open[key] = _Segment(now)
        segment.seen = segment.end = now
        segment.total += p
        segment.count += 1

    def _write(self, key: tuple[int, int], segment: _Segment) -> None:
        if segment.end - segment.begin < self._config.min_duration:
            return
        face, au = key
        begin, end = round(1000 * segment.begin), round(1000 * segment.end)
        tier = f"AU{au:02d}" if face == 0 else f"AU{au:02d} face {face}"
        self._line([tier, begin, end, end - begin, f"{segment.total / segment.count:.3f}"])

    def close(self) -> None:
        """End the segments that reach the last frame: it lasts as long as the one before."""
        for key, segment in self._open.items():
            if self._last is not None and segment.seen == self._last[0]:
                segment.end = segment.seen + self._last[1]
            self._write(key, segment)
        self._open.clear()
        super().close()


class _Segment:
    def __init__(self, begin: float):
        self.begin = self.end = self.seen = begin
        self.total, self.count = 0.0, 0
