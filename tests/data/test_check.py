"""The report on a data set, and which data set lies in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aufast.cli import main
from aufast.data import check_dataset, detect_dataset, read_dataset
from aufast.data.landmarks import write_landmarks
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
    assert "F001                3  2 0/2 0 0 0 0 0 0 0 0 0 0" in lines, "AU 2 is coded in two of three frames"
    assert "M001                1  0 1 0 0 0 0 0 0 0 0 0 0" in lines
    assert report.missing_tasks == (
        *(f"F001_T{k}" for k in range(3, 9)),
        *(f"M001_T{k}" for k in range(2, 9)),
    )
    assert f"no video that can be read of the tasks {' '.join(report.missing_tasks)}" in lines
    assert lines[-1] == "M001_T1: no image for coded frames 2"


def test_report_says_synthetic(tmp_path: Path) -> None:
    trees.bp4d(tmp_path, VIDEOS)
    (tmp_path / MARKER).write_text("{}")
    report = check_dataset(tmp_path)
    assert report.synthetic and report.text().startswith("synthetic bp4d:")
    assert report.missing_tasks == () and "of the tasks" not in report.text()


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


def test_every_video_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    trees.bp4d(tmp_path, VIDEOS)
    (tmp_path / "2D+3D/M001").rename(tmp_path / "2D+3D/elsewhere")
    file = tmp_path / "AUCoding/AU_OCC/F001_T2.csv"
    file.write_text(file.read_text().replace("\n1,0,", "\n1,5,"))
    report = check_dataset(tmp_path)
    assert (report.videos, report.subjects.keys()) == (1, {"F001"})
    assert report.problems == (
        f"{file}, line 2: AU 1 has the code 5, expected 0 to 1 or 9 (not coded)",
        f"{tmp_path}/2D+3D/M001/T1: no such folder, but M001_T1.csv codes it; its images are missing",
    )
    assert report.text().splitlines()[-3:] == ["2 videos cannot be read:", *report.problems]
    (tmp_path / "2D+3D/F001").rename(tmp_path / "2D+3D/F001-elsewhere")
    with pytest.raises(ValueError, match="F001_T1.csv codes it"):
        check_dataset(tmp_path)


@pytest.mark.parametrize("command", ["check", "prepare"])
def test_commands_take_the_readers_choices(tmp_path: Path, command: str, capsys) -> None:
    trees.disfa(tmp_path / "DISFA", "SN002", 810, aus=(25,))
    trees.save_image(tmp_path / "DISFA/Images/SN002/810.png")  # from 0 or from 1?
    points = np.repeat(trees.POINTS[None], 810, axis=0)
    (tmp_path / "DISFA/Landmarks").mkdir()
    write_landmarks(tmp_path / "DISFA/Landmarks/SN002.csv", np.arange(1, 811), points)
    out = [str(tmp_path / "out"), "--size", "16"] if command == "prepare" else []
    words = ["data", command, str(tmp_path / "DISFA"), *out, "--aus", "25"]
    assert main(words) == 1
    assert "say with first_image" in capsys.readouterr().err
    assert main([*words, "--first-image", "1"]) == 0
    assert " 799 " in capsys.readouterr().out
    if command == "check":
        assert main([*words, "--first-image", "1", "--bad-landmarks", "keep"]) == 0
        assert " 810 " in capsys.readouterr().out
    assert main([*words, "--dataset", "table"]) == 1
    trees.bp4d(tmp_path / "BP4D", VIDEOS)
    assert main(["data", "check", str(tmp_path / "BP4D"), "--camera", "left"]) == 1
    assert "aufast: camera is no option of the reader of bp4d" in capsys.readouterr().err


def test_check_says_with_its_exit_status_that_something_is_wrong(tmp_path: Path, capsys) -> None:
    trees.bp4d(tmp_path, VIDEOS)
    assert main(["data", "check", str(tmp_path)]) == 0
    (tmp_path / "AUCoding/AU_OCC/F001_T2.csv").write_text("")
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "F001_T2.csv: the file is empty" in capsys.readouterr().out
