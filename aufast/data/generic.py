"""Any other data set: one CSV row a frame, its columns named in a small JSON file.

    {
      "name": "gft",
      "table": "frames.csv",
      "columns": {"image": "path", "subject": "subject", "video": "clip", "frame": "frame", "group": "split"},
      "labels": {"1": "AU01", "2": "AU02"},
      "missing": [9],
      "highest": 1,
      "positive_from": 1,
      "landmarks": {"x": "x_{}", "y": "y_{}", "count": 49, "first": 0, "one_based": false, "table": "p.csv"}
    }

Paths are relative to the JSON file. `group`, `missing`, `highest`, `positive_from` and `landmarks` may be
left out, and in `landmarks` all but `x`, `y` and `count`. Landmarks of another table are joined on the image
column.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from aufast.data.landmarks import COUNTS, by_number
from aufast.data.records import Video, check_aus, is_synthetic, read_each
from aufast.data.tables import header, occurrences, read_lines, refuse
from aufast.faces import landmarks_49

_KEYS = {"name", "table", "columns", "labels", "missing", "highest", "positive_from", "landmarks"}
_COLUMNS = ("image", "subject", "video", "frame")
_LANDMARKS = {"x", "y", "count", "first", "one_based", "table"}

Row = tuple[int, dict[str, str]]  # line in the file, cells by column


def read_table(
    path: str | os.PathLike[str],
    aus: tuple[int, ...] | None = None,
    *,
    problems: list[str] | None = None,
) -> list[Video]:
    """Read a data set described by a JSON file (see the module's docstring).

    Args:
        path: the JSON file.
        aus: the AUs wanted, out of those mapped; None takes all of them in their order.
        problems: collects the sentences of videos that cannot be read, which are then left out; None raises.

    Returns:
        A record a video, in the order of the table.

    Raises:
        ValueError: a key, column, file or value does not fit; it is named.
    """
    path = Path(path)
    spec = _read_spec(path)
    mapped = check_aus(tuple(int(au) for au in spec["labels"]))
    aus = mapped if aus is None else check_aus(aus)
    if unmapped := [au for au in aus if au not in mapped]:
        refuse(path, f"labels does not map AU {unmapped[0]}")
    columns = spec["columns"]
    wanted = [*columns.values(), *(spec["labels"][str(au)] for au in aus)]
    table = path.parent / _inside(path, spec["table"])
    points, loader, pointed = spec.get("landmarks"), None, None
    if points is not None:
        points = {"first": 0, "one_based": False, "table": spec["table"], **points}
        pointed = path.parent / _inside(path, points["table"])
        loader = partial(_load_points, pointed, columns["image"], points)
        require_columns(pointed, [columns["image"], *_point_columns(points)])
    videos: dict[str, list[Row]] = {}
    for line, row in _rows(table, wanted):
        videos.setdefault(row[columns["video"]], []).append((line, row))
    return read_each(
        lambda item: _video(path, table, spec, *item, aus, loader, pointed), list(videos.items()), problems
    )


def _read_spec(path: Path) -> dict[str, Any]:
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        refuse(path, f"cannot be read as JSON: {getattr(error, 'strerror', None) or error}")
    if not isinstance(spec, dict) or (unknown := set(spec) - _KEYS):
        refuse(
            path, f"unknown key {sorted(unknown)[0]!r}" if isinstance(spec, dict) else "must hold an object"
        )
    for key, kind in (("name", str), ("table", str), ("columns", dict), ("labels", dict)):
        if not isinstance(spec.get(key), kind) or not spec[key]:
            refuse(path, f"{key!r} is missing or not a {kind.__name__}")
    if missing := [name for name in _COLUMNS if name not in spec["columns"]]:
        refuse(path, f"columns does not name the column of {missing[0]!r}")
    if unknown := set(spec["columns"]) - {*_COLUMNS, "group"}:
        refuse(path, f"columns has the unknown key {sorted(unknown)[0]!r}")
    if not all(au.isascii() and au.isdigit() for au in spec["labels"]):
        refuse(path, f"labels must be keyed by AU numbers, got {', '.join(spec['labels'])}")
    missing = spec.get("missing", [])
    if not isinstance(missing, list) or not all(map(_whole, missing)):
        refuse(path, f"missing must be a list of codes, whole numbers, got {missing!r}")
    for key in ("highest", "positive_from"):
        if key in spec and not _whole(spec[key]):
            refuse(path, f"{key} must be a whole number, got {spec[key]!r}")
    if spec.get("landmarks") is not None:
        _check_points(path, spec["landmarks"])
    return spec


def _check_points(path: Path, points: object) -> None:
    if not isinstance(points, dict) or not {"x", "y", "count"} <= set(points) <= _LANDMARKS:
        refuse(path, "landmarks must have x, y and count, and may have first, one_based and table")
    if points["count"] not in COUNTS:
        refuse(path, f"landmarks must count 49, 66 or 68 points, got {points['count']!r}")
    if not _whole(points.get("first", 0)) or not isinstance(points.get("one_based", False), bool):
        refuse(path, "landmarks: first must be a whole number, and one_based true or false")
    for axis in "xy":
        if not isinstance(points[axis], str) or points[axis].count("{}") != 1:
            refuse(path, f"landmarks: {axis} must name columns with {{}} for the point, got {points[axis]!r}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _inside(source: Path, name: str) -> str:
    """A relative path that stays inside the data set's folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not name or "\0" in name:
        refuse(source, f"the path {name!r} must be relative, without '..'")
    return name


def require_columns(path: Path, wanted: list[str]) -> list[str]:
    """The header of a CSV, with every wanted column in it."""
    names = header(path, read_lines(path)[0])
    for name in wanted:
        if name not in names:
            refuse(path, f"no column {name!r}", 1)
    return names


def _rows(path: Path, wanted: list[str]) -> list[Row]:
    """The rows of a CSV, reduced to the wanted columns."""
    lines = read_lines(path)
    names = require_columns(path, wanted)
    places = {name: names.index(name) for name in wanted}
    rows = []
    for number, cells in enumerate(csv.reader(lines[1:]), 2):
        if len(cells) != len(names):
            refuse(path, f"{len(cells)} values, expected {len(names)}", number)
        rows.append((number, {name: cells[place].strip() for name, place in places.items()}))
    return rows


def _integer(path: Path, line: int, column: str, cell: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", cell):
        refuse(path, f"{column} is {cell!r}, expected a whole number", line)
    return int(cell)


def _video(
    path: Path,
    table: Path,
    spec: Mapping[str, Any],
    name: str,
    rows: list[Row],
    aus: tuple[int, ...],
    loader: Any,
    pointed: Path | None,
) -> Video:
    columns = spec["columns"]
    if not re.fullmatch(r"[\w.+ -]+", name) or name.startswith("."):
        refuse(table, f"the video name {name!r} cannot be a file name", rows[0][0])
    rows = sorted(rows, key=lambda row: _integer(table, row[0], columns["frame"], row[1][columns["frame"]]))
    numbers = np.array([int(row[columns["frame"]]) for _, row in rows], np.int64)
    if (twice := np.flatnonzero(np.diff(numbers) == 0)).size:
        refuse(table, f"frame {numbers[twice[0]]} of {name} is there twice", rows[twice[0] + 1][0])
    for key in ("subject", "group"):
        values = {row[columns[key]] for _, row in rows} if key in columns else {""}
        if len(values) != 1:
            refuse(table, f"video {name} has more than one {key}: {', '.join(sorted(values))}", rows[0][0])
    missing = spec.get("missing", [])
    empty = min(missing) if missing else None  # an empty cell is a missing label where there is such a code
    codes = []
    for line, row in rows:
        cells = [row[spec["labels"][str(au)]] for au in aus]
        codes.append([
            empty if cell == "" and empty is not None else _integer(table, line, f"AU {au}", cell)
            for au, cell in zip(aus, cells, strict=True)
        ])  # fmt: skip
    options = {key: spec[key] for key in ("highest", "positive_from") if key in spec}
    labels, mask = [], []
    for (line, _), row in zip(rows, codes, strict=True):  # row by row: sorted rows keep their own lines
        label, coded = occurrences(table, np.array([row]), aus, line, missing=missing, **options)
        labels.append(label[0])
        mask.append(coded[0])
    images = [_inside(table, row[columns["image"]]) for _, row in rows]
    return Video(
        dataset=spec["name"],
        subject=rows[0][1][columns["subject"]],
        name=name,
        aus=aus,
        numbers=numbers,
        labels=np.array(labels),
        mask=np.array(mask),
        images=tuple(path.parent / image for image in images),
        landmarks=None
        if loader is None
        else partial(loader, dict(zip(images, numbers.tolist(), strict=True))),
        landmark_files=() if pointed is None else (pointed,),
        group=rows[0][1][columns["group"]] if "group" in columns else "",
        synthetic=is_synthetic(path.parent),
    )


def _point_columns(points: Mapping[str, Any]) -> list[str]:
    indices = range(points["first"], points["first"] + points["count"])
    return [points[axis].replace("{}", str(k)) for k in indices for axis in "xy"]


def _load_points(
    table: Path, key: str, points: Mapping[str, Any], images: Mapping[str, int], numbers: np.ndarray
) -> np.ndarray:
    """Landmarks of a video's frames from a table; `images` gives each image's frame number."""
    changed = table.stat().st_mtime_ns
    found, values = _read_points(table, changed, key, tuple(_point_columns(points)))
    rows = [row for row, image in enumerate(found) if image in images]
    array = values[rows].reshape(len(rows), points["count"], 2)
    frames = np.array([images[found[row]] for row in rows], np.int64)
    return by_number(landmarks_49(array, one_based=points["one_based"]), frames, numbers)


@lru_cache(maxsize=1)  # a table holds many videos, and each of them asks
def _read_points(
    table: Path, changed: int, key: str, columns: tuple[str, ...]
) -> tuple[list[str], np.ndarray]:
    """Images and coordinates, float32 (rows, columns), of a table of landmarks as it was `changed` last."""
    rows = _rows(table, [key, *columns])
    values = np.empty((len(rows), len(columns)), np.float32)
    for k, (line, row) in enumerate(rows):
        try:
            values[k] = [float(row[name]) if row[name] else np.nan for name in columns]
        except ValueError as error:
            refuse(table, str(error), line)
    return [row[key] for _, row in rows], values
