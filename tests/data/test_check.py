"""The report on a data set, and which data set lies in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from aufast.data import check_dataset, detect_dataset, read_dataset
from aufast.data.records import MARKER
from tests.data import trees

VIDEOS = {"F001_T1": {1: {1: 1, 2: 9}, 2: {1: 1}}, "F001_T2": {1: {}}, "M001_T1": {1: {2: 1}, 2: {2: 1}}}


def test_report(tmp_path: Path) -> None:
    trees.bp4d(tmp_path, VIDEOS)
    (tmp_path / "Landmarks/F001_T2.csv").unlink()
    (tmp_path / "2D+3D/M001/T1/0002.jpg").unlink()
    report = check_dataset(tmp_path)
    assert (report.dataset, report.videos, report.synthetic) == ("bp4d", 3, False)
    assert report.without_landmarks == ("F001_T2",)
    assert len(report.missing) == 39 and "F002" in report.missing
    assert report.total.frames == 4
    assert report.total.coded[:2] == (4, 3) and report.total.positive[:2] == (2, 1)
    assert report.subjects["M001"].positive[:2] == (0, 1)
    text = report.text()
    lines = text.splitlines()
    assert lines[0] == "bp4d: 2 subjects, 3 videos, 4 labelled frames with a picture"
    assert "   1         4         2    50.0     21.1" in lines
    assert "   2         3         1    33.3     17.1" in lines
    assert lines[-1] == "M001_T1: no image for coded frames 2"


def test_report_says_synthetic(tmp_path: Path) -> None:
    trees.bp4d(tmp_path, VIDEOS)
    (tmp_path / MARKER).write_text("{}")
    report = check_dataset(tmp_path)
    assert report.synthetic and report.text().startswith("synthetic bp4d:")


def test_detects_each_layout(tmp_path: Path) -> None:
    trees.bp4d(tmp_path / "a", {"F001_T1": {1: {}}})
    trees.disfa(tmp_path / "b", "SN003", 2)
    trees.affwild2(tmp_path / "c", "Train_Set", "x", [",".join("0" * 12)], images=(1,))
    assert [detect_dataset(tmp_path / name) for name in "abc"] == ["bp4d", "disfa", "affwild2"]
    assert read_dataset(tmp_path / "b", aus=(25,))[0].aus == (25,)
    with pytest.raises(ValueError, match="is no data set that is known"):
        detect_dataset(tmp_path)
    trees.disfa(tmp_path / "a", "SN003", 2)
    with pytest.raises(ValueError, match="looks like bp4d and disfa"):
        detect_dataset(tmp_path / "a")
    with pytest.raises(ValueError, match="dataset must be one of"):
        read_dataset(tmp_path / "a", "ck+")
