"""A data set described by a JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from aufast.data import read_table
from tests.data import trees

SPEC = {
    "name": "gft",
    "table": "frames.csv",
    "columns": {"image": "path", "subject": "person", "video": "clip", "frame": "no", "group": "split"},
    "labels": {"12": "smile", "1": "AU01"},
    "missing": [9],
}
TABLE = """path,person,clip,no,split,AU01,smile
img/a2.jpg,001A,001A,2,train,1,9
img/a1.jpg,001A,001A,1,train,0,1
"img/b,1.jpg",001B,001B,1,test,,0
"""


def make(root: Path, rows: str = TABLE, **changes) -> Path:
    (root / "frames.csv").write_text(rows)
    path = root / "gft.json"
    path.write_text(json.dumps({**SPEC, **changes}))
    return path


def test_reads_a_table(tmp_path: Path) -> None:
    first, second = read_table(make(tmp_path))
    assert (first.dataset, first.subject, first.group, first.aus) == ("gft", "001A", "train", (12, 1))
    assert first.numbers.tolist() == [1, 2]  # in order of time, whatever the order of the rows
    assert first.images == (tmp_path / "img/a1.jpg", tmp_path / "img/a2.jpg")
    assert first.labels.tolist() == [[1, 0], [0, 1]] and first.mask.tolist() == [[True, True], [False, True]]
    assert second.images == (tmp_path / "img/b,1.jpg",) and second.mask.tolist() == [[True, False]]
    assert first.landmarks is None
    assert read_table(make(tmp_path), aus=(1,))[0].labels.tolist() == [[0], [1]]


def test_intensities(tmp_path: Path) -> None:
    table = TABLE.replace(",0,1\n", ",2,1\n")
    path = make(tmp_path, table, highest=5, positive_from=2)
    assert read_table(path)[0].labels.tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("where", ["same", "other"])
@pytest.mark.parametrize("first", [0, 1])
def test_landmarks(tmp_path: Path, where: str, first: int) -> None:
    names = [f"{axis}_{k}" for k in range(first, first + 49) for axis in "xy"]
    rows = {"img/a1.jpg": trees.POINTS, "img/a2.jpg": trees.POINTS + 5}
    landmarks = {"x": "x_{}", "y": "y_{}", "count": 49, "first": first, "one_based": True}
    if where == "same":
        lines = TABLE.splitlines()
        cells = {1: rows["img/a2.jpg"], 2: rows["img/a1.jpg"]}
        lines[0] += "," + ",".join(names)
        for k in (1, 2, 3):
            lines[k] += "," + (",".join(map(str, cells[k].ravel())) if k in cells else "," * 97)
        path = make(tmp_path, "\n".join(lines), landmarks=landmarks)
    else:
        lines = ["path," + ",".join(names)]
        lines += [f"{image}," + ",".join(map(str, points.ravel())) for image, points in rows.items()]
        (tmp_path / "points.csv").write_text("\n".join(lines))
        path = make(tmp_path, landmarks={**landmarks, "table": "points.csv"})
    one, two = read_table(path)
    np.testing.assert_allclose(one.landmarks(one.numbers), [trees.POINTS - 1, trees.POINTS + 4])
    assert np.isnan(two.landmarks(two.numbers)).all()
    (table,) = one.landmark_files
    table.write_text(table.read_text().replace(str(trees.POINTS[0, 0]), "1"))  # corrected, while this runs
    os.utime(table, ns=(0, 0))
    assert one.landmarks(one.numbers)[1, 0, 0] == 4 + trees.POINTS[0, 0]
    assert one.landmarks(one.numbers)[0, 0, 0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nam": 1}, "unknown key 'nam'"),
        ({"labels": {}}, "'labels' is missing"),
        ({"labels": {"AU1": "AU01"}}, "labels must be keyed by AU numbers"),
        ({"labels": {"3": "AU01"}}, "aus must be different AUs"),
        ({"labels": {"1": "AU1"}}, "frames.csv, line 1: no column 'AU1'"),
        ({"columns": {"image": "path"}}, "columns does not name the column of 'subject'"),
        ({"columns": {**SPEC["columns"], "who": "x"}}, "columns has the unknown key 'who'"),
        ({"table": "../frames.csv"}, "must be relative, without '..'"),
        ({"table": "other.csv"}, "other.csv: cannot be read: No such file"),
        ({"landmarks": {"x": "x{}"}}, "landmarks must have x, y and count"),
        ({"landmarks": {"x": "x{}", "y": "y{}", "count": 5}}, "49, 66 or 68 points, got 5"),
        ({"landmarks": {"x": "x{}", "y": "y{}", "count": 49}}, "no column 'x0'"),
        ({"missing": ["9"]}, r"missing must be a list of codes, whole numbers, got \['9'\]"),
        ({"missing": 9}, "missing must be a list of codes"),
        ({"highest": "5"}, "highest must be a whole number, got '5'"),
        ({"positive_from": 0.5}, "positive_from must be a whole number"),
        ({"landmarks": {"x": "x", "y": "y{}", "count": 49}}, "x must name columns with {} for the point"),
        ({"landmarks": {"x": "x{}", "y": "y{}", "count": 49, "first": "a"}}, "first must be a whole number"),
        ({"missing": [], "highest": 9}, "line 4: AU 1 is '', expected a whole number"),
    ],
)
def test_refuses_a_description(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(make(tmp_path, **changes))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2,train,1,9", "2,train,1,7", "line 2: AU 12 has the code 7"),
        ("2,train,1,9", "2,train,1.5,9", "line 2: AU 1 is '1.5'"),
        ("2,train,1,9", "2,train,1", "line 2: 6 values, expected 7"),
        ("2,train", "two,train", "line 2: no is 'two', expected a whole number"),
        ("a2.jpg,001A,001A,2", "a2.jpg,001A,001A,1", "line [23]: frame 1 of 001A is there twice"),
        ("a2.jpg,001A", "a2.jpg,001C", "line [23]: video 001A has more than one subject: 001A, 001C"),
        ("2,train", "2,test", "video 001A has more than one group"),
        ("img/a2.jpg", "/etc/passwd", "must be relative"),
        ("img/a2.jpg", "img/../../a.jpg", "must be relative"),
        ("001B,001B", "001B,../b", "the video name '../b' cannot be a file name"),
    ],
)
def test_refuses_a_row(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE
    with pytest.raises(ValueError, match=message):
        read_table(make(tmp_path, TABLE.replace(old, new)))


def test_refuses_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (("[1]", "must hold an object"), ("{", "cannot be read as JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_table(path)
