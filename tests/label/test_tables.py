"""The tables, read back by the rules of the programs that they are written for."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from aufast.faces.landmarks import FROM_68
from aufast.label import LabelConfig
from aufast.label.finding import FoundFace, Seen
from aufast.label.tables import SUFFIXES, open_table, points_68, rows

AUS = (1, 12)
P = {0: (0.25, 0.75), 1: (0.5, 0.499999), 2: None, 3: (1.0, 1e-9)}


def seen(index: int, *faces: tuple, time: float | None = None) -> Seen:
    found = []
    for face_id, p in faces:
        points = np.arange(136.0).reshape(68, 2) + face_id
        face = FoundFace((10, 20, 110, 140), points, 0.875, face_id=face_id)
        face.probabilities = None if p is None else np.array(p, np.float32)
        found.append(face)
    return Seen(index, index / 8 if time is None else time, None, found)


VIDEO = [
    seen(0, (0, (0.25, 0.75)), (1, (0.5, 0.499999))),
    seen(1),
    seen(2, (1, None)),
    Seen(3, None, None, seen(3, (0, (1.0, 1e-9))).faces),
]


def written(tmp_path: Path, format: str, frames=VIDEO, **options) -> Path:
    path = tmp_path / f"table{SUFFIXES[format]}"
    table = open_table(format, path, AUS, LabelConfig("unused", **options), 'a "b", c.mp4')
    for frame in frames:
        table.add(frame)
    table.close()
    return path


def test_openface_to_the_letter(tmp_path: Path) -> None:
    assert written(tmp_path, "openface").read_bytes().decode() == (
        "frame,face_id,timestamp,confidence,success,AU01_c,AU12_c,AU01_p,AU12_p\n"
        "1,0,0,0.875,1,0,1,0.25,0.75\n"
        "1,1,0,0.875,1,1,0,0.5,0.499999\n"
        "2,0,0.125,0,0,0,0,0,0\n"
        "3,1,0.25,0,0,0,0,0,0\n"
        "4,0,,0.875,1,1,0,1,0\n"
    )


def test_openface_by_the_readers_rules(tmp_path: Path) -> None:
    """py-feat strips spaces from the header and takes the columns that hold AU and _r or _c; the R packages
    openFaceR and faceup want five columns first, filter by confidence and success, and take no text."""
    with written(tmp_path, "openface", pseudo_intensity=True).open() as file:
        table = list(csv.DictReader(file))
    names = [name.strip() for name in table[0]]
    assert names == list(table[0]), "nothing to strip"
    assert names[:5] == ["frame", "face_id", "timestamp", "confidence", "success"]
    for kind in ("r", "c"):
        assert [n for n in names if "AU" in n and n.endswith(f"_{kind}")] == [f"AU01_{kind}", f"AU12_{kind}"]
    for row in table:
        assert row["AU12_c"] in "01" and 0 <= float(row["AU12_r"]) <= 5
        assert float(row["AU12_r"]) == pytest.approx(5 * float(row["AU12_p"]), abs=1e-5)
        assert int(row["frame"]) >= 1
    kept = [row for row in table if float(row["confidence"]) >= 0.8 and row["success"] == "1"]
    assert [(row["frame"], row["face_id"]) for row in kept] == [("1", "0"), ("1", "1"), ("4", "0")]
    assert {row["frame"] for row in table} == {"1", "2", "3", "4"}, "at least one row for every frame"


def test_the_threshold_is_reached_by_what_is_equal_to_it() -> None:
    (row,) = rows(seen(0, (0, (0.7, 0.6999))), AUS, LabelConfig("unused", threshold=np.float32(0.7).item()))
    assert row[5:7] == [1, 0]


def test_pyfeat_by_its_readers_rules(tmp_path: Path) -> None:
    """Frames from 0, `x_*` and `y_*` of 68 points, AUs without suffix, NaN where there is no face."""
    with written(tmp_path, "pyfeat").open() as file:
        table = list(csv.DictReader(file))
    assert [row["frame"] for row in table] == ["0", "0", "1", "2", "3"]
    names = list(table[0])
    assert names[1:6] == ["FaceRectX", "FaceRectY", "FaceRectWidth", "FaceRectHeight", "FaceScore"]
    assert [n for n in names if n.startswith("AU")] == ["AU01", "AU12"]
    assert [n for n in names if n.startswith("x_")] == [f"x_{k}" for k in range(68)]
    first, none, unaligned = table[0], table[2], table[3]
    assert [float(first[n]) for n in names[1:6]] == [10, 20, 100, 120, 0.875]
    assert (float(first["x_67"]), float(first["y_0"])) == (134, 1)
    assert all(none[n] == "" for n in names if n not in ("frame", "input"))
    assert unaligned["AU01"] == "" and unaligned["FaceRectX"] == "10", "found, and not labelled"
    assert {row["input"] for row in table} == {'a "b", c.mp4'}


def test_landmarks_of_fewer_points_keep_their_places() -> None:
    all_points = np.random.default_rng(0).normal(size=(68, 2))
    np.testing.assert_array_equal(points_68(all_points), all_points)
    found = points_68(all_points[list(FROM_68)])
    np.testing.assert_array_equal(found[list(FROM_68)], all_points[list(FROM_68)])
    assert np.isnan(found[:17]).all() and np.isnan(found[[60, 64]]).all()
    sixty_six = points_68(np.delete(all_points, [60, 64], axis=0))
    assert np.isnan(sixty_six[[60, 64]]).all() and not np.isnan(sixty_six[:60]).any()
    assert np.isnan(points_68(None)).all()


def segments(tmp_path: Path, present: str, **options) -> list[tuple[int, int]]:
    """Begin and end of AU 12's segments; frames lie 100 ms apart, `#` is present, `x` a lost face."""
    frames = [
        seen(k, *([] if mark == "x" else [(0, (0.0, 0.9 if mark == "#" else 0.1))]), time=k / 10)
        for k, mark in enumerate(present)
    ]
    with written(tmp_path, "elan", frames, **options).open() as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert all(int(row["End"]) - int(row["Begin"]) == int(row["Duration"]) for row in table)
    assert {row["Tier"] for row in table} <= {"AU12"}
    return [(int(row["Begin"]), int(row["End"])) for row in table]


@pytest.mark.parametrize(
    ("present", "options", "expected"),
    [
        ("..##..", {}, [(200, 400)]),
        ("##", {}, [(0, 200)]),
        ("#.#", {}, [(0, 100), (200, 300)]),
        ("#.#", {"max_gap": 0.1}, [(0, 300)]),
        ("#..#", {"max_gap": 0.1}, [(0, 100), (300, 400)]),
        ("#xx#", {"max_gap": 0.25}, [(0, 400)]),
        ("#.###.", {"min_duration": 0.2}, [(200, 500)]),
        ("......", {}, []),
        ("", {}, []),
    ],
)
def test_elan_segments(tmp_path: Path, present: str, options: dict, expected: list) -> None:
    assert segments(tmp_path, present, **options) == expected


def test_elan_tiers_of_several_faces_and_their_mean(tmp_path: Path) -> None:
    frames = [seen(k, (0, (0.1, 0.6 + k / 10)), (3, (0.9, 0.1)), time=k / 2) for k in range(2)]
    assert written(tmp_path, "elan", frames).read_text() == (
        "Tier\tBegin\tEnd\tDuration\tAnnotation\n"
        "AU12\t0\t1000\t1000\t0.650\n"
        "AU01 face 3\t0\t1000\t1000\t0.900\n"
    )


def test_parquet_holds_the_openface_table(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    many = [seen(k, (0, (k / 5000, 0.5))) for k in range(5000)]  # more than a group of rows
    for frames in (VIDEO, many):
        found = parquet.read_table(written(tmp_path, "parquet", frames)).to_pydict()
        expected = [row for frame in frames for row in rows(frame, AUS, LabelConfig("unused"))]
        assert [list(row) for row in zip(*found.values(), strict=True)] == expected


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format must be one of openface, pyfeat, elan, parquet, got 'xls'"):
        LabelConfig("unused", formats=("xls",))
