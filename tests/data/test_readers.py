"""The readers on trees in the data sets' own layouts: what is read, what becomes a mask, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from aufast.aus import AU_SETS
from aufast.data import disfa, read_affwild2, read_bp4d, read_disfa
from aufast.data.disfa import BAD_LANDMARKS, FRAMES
from aufast.data.landmarks import load_landmarks, write_landmarks
from aufast.data.protocols import FOLDS
from aufast.faces import landmarks_49
from tests.data import trees

ROWS = {7: {1: 1, 12: 1}, 8: {1: 9}, 10: {24: 1}}


def refused(reader, *arguments, match: str, **options) -> None:
    with pytest.raises(ValueError, match=match):
        reader(*arguments, **options)


# ---- BP4D ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [3, 4, 5])
@pytest.mark.parametrize(
    ("images", "codes"),
    [("2D+3D", "AUCoding/AU_OCC"), ("BP4D-training", "AUCoding"), (".", "AUCoding/AU_OCC")],
    ids=["release", "fera15", "root"],
)
def test_bp4d_forms(tmp_path: Path, images: str, codes: str, digits: int) -> None:
    trees.bp4d(tmp_path, {"F001_T1": ROWS, "M002_T8": {1: {}}}, images=images, codes=codes, digits=digits)
    first, second = read_bp4d(tmp_path)
    assert (first.subject, first.name, second.subject, second.name) == ("F001", "F001_T1", "M002", "M002_T8")
    assert first.numbers.tolist() == [7, 8, 10] and first.labels.dtype == np.int8
    assert [path.name for path in first.images] == [f"{n:0{digits}d}.jpg" for n in (7, 8, 10)]
    aus = AU_SETS["bp4d"]
    expected = np.zeros((3, 12), int)
    expected[0, aus.index(1)] = expected[0, aus.index(12)] = expected[2, aus.index(24)] = 1
    np.testing.assert_array_equal(first.labels, expected)
    assert np.argwhere(~first.mask).tolist() == [[1, aus.index(1)]]  # the 9, and it is no label
    np.testing.assert_allclose(
        first.landmarks(first.numbers), np.repeat(trees.POINTS[None], 3, 0), atol=0.006
    )
    assert not first.synthetic and first.notes == ()


def test_bp4d_takes_the_aus_asked_for_in_their_order(tmp_path: Path) -> None:
    trees.bp4d(tmp_path, {"F001_T1": ROWS})
    (video,) = read_bp4d(tmp_path, aus=(24, 1))
    assert video.labels.tolist() == [[0, 1], [0, 0], [1, 0]] and video.mask.tolist()[1] == [True, False]


def test_bp4d_coded_frames_without_image_are_left_out_and_noted(tmp_path: Path) -> None:
    trees.bp4d(tmp_path, {"F001_T1": ROWS})
    (tmp_path / "2D+3D/F001/T1/0008.jpg").unlink()
    trees.save_image(tmp_path / "2D+3D/F001/T1/0099.jpg")  # BP4D codes a part of each video: no note
    (tmp_path / "2D+3D/F001/T1/Thumbs.db").write_text("")
    (tmp_path / "2D+3D/F001/T1/._0007.jpg").write_text("")  # what macOS leaves beside a file
    (tmp_path / "AUCoding/AU_OCC/._F001_T1.csv").write_text("")
    (video,) = read_bp4d(tmp_path)
    assert video.numbers.tolist() == [7, 10]
    assert video.notes == ("F001_T1: no image for coded frames 8",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8,5,,", "'' is not a whole number"),
        ("8,0.5,0,0", "'0.5' is not a whole number"),
        ("8,nan,0,0", "'nan' is not a whole number"),
        ("8,2,0,0", r"AU 1 has the code 2, expected 0 to 1 or 9 \(not coded\)"),
        ("8,-1,0,0", "AU 1 has the code -1"),
        ("7,0,0,0", "frame 7 follows frame 7"),
        ("8,0", "2 values, expected 100"),
        ("8" + ",0" * 100, "101 values, expected 100"),
        ("", "the line is blank"),
    ],
)
def test_bp4d_refuses_a_row(tmp_path: Path, text: str, message: str) -> None:
    trees.bp4d(tmp_path, {"F001_T1": ROWS})
    file = tmp_path / "AUCoding/AU_OCC/F001_T1.csv"
    lines = file.read_text().splitlines()
    cells = lines[2].split(",")
    replaced = text.split(",")
    lines[2] = text if not 3 <= len(replaced) <= 100 else ",".join(replaced + cells[len(replaced) :])
    file.write_text("\n".join(lines))
    refused(read_bp4d, tmp_path, match=f"{re.escape(str(file))}, line 3: {message}")


def test_bp4d_refuses_what_is_missing(tmp_path: Path) -> None:
    refused(read_bp4d, tmp_path / "nowhere", match="no such folder")
    refused(read_bp4d, tmp_path, match="no folder AUCoding")
    trees.bp4d(tmp_path, {"F001_T1": ROWS})
    refused(read_bp4d, tmp_path, (1, 3), match="aus must be different AUs")
    file = tmp_path / "AUCoding/AU_OCC/F001_T1.csv"
    text = file.read_text()
    file.write_text(text.replace("0,1,2,", "0,1,200,", 1))
    refused(read_bp4d, tmp_path, match=r"line 1: no column '2' \(AU 2\)")
    file.write_text(text)
    trees.save_image(tmp_path / "2D+3D/F001/T1/010.jpg")
    refused(read_bp4d, tmp_path, match="0010.jpg and 010.jpg are both frame 10")
    (tmp_path / "2D+3D/F001/T1/010.jpg").rename(tmp_path / "2D+3D/F001/T1/frame10.jpg")
    refused(read_bp4d, tmp_path, match="frame10.jpg: an image must be named by its frame number")
    (tmp_path / "2D+3D/F001").rename(tmp_path / "2D+3D/F009")
    (tmp_path / "2D+3D/F001.zip").write_text("")
    refused(read_bp4d, tmp_path, match="F001_T1.csv codes it; unpack .*F001.zip")


def test_bp4d_tracked_points(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed; it reads BP4D's MATLAB 7.3 landmarks")
    trees.bp4d(tmp_path, {"F001_T1": ROWS}, landmarks=False)
    trees.save_image(tmp_path / "2D+3D/F001/T1/0009.jpg")  # an image without codes has an entry too
    path = tmp_path / "2DFeatures/F001_T1.mat"

    def write(entries: int) -> None:
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            references = file.create_dataset("fit/pred", (entries, 1), dtype=h5py.ref_dtype)
            for k in range(entries):
                data = file.create_dataset(f"#refs#/{k}", data=(trees.POINTS + 1 + k).T)
                if k == 1:  # frame 8 was not tracked
                    del file[f"#refs#/{k}"]
                    data = file.create_dataset(f"#refs#/{k}", data=np.zeros(2, np.uint64))
                    data.attrs["MATLAB_empty"] = 1
                references[k, 0] = data.ref

    write(4)
    (video,) = read_bp4d(tmp_path)
    points = video.landmarks(video.numbers)  # frames 7, 8, 10 are entries 0, 1, 3
    np.testing.assert_array_equal(points[0], trees.POINTS)
    assert np.isnan(points[1]).all()
    np.testing.assert_array_equal(points[2], trees.POINTS + 3)
    write(3)
    refused(video.landmarks, video.numbers, match="3 entries for a folder of 4 images")
    path.write_bytes(b"MATLAB 7.3 MAT-file" + bytes(600))
    refused(video.landmarks, video.numbers, match="not a file of tracked points")


# ---- DISFA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_disfa_image_bases(tmp_path: Path, first: int) -> None:
    trees.disfa(tmp_path, "SN003", 12, {1: {3: 1, 4: 2, 5: 5}}, first=first)
    (video,) = read_disfa(tmp_path)
    assert video.numbers.tolist() == list(range(1, 13))
    assert [path.name for path in video.images[:3]] == [f"{first + k}.png" for k in range(3)]
    assert video.labels[:, 0].nonzero()[0].tolist() == [3, 4]  # intensity 2 and 5, not 1
    assert video.mask.all() and video.notes == ()


def test_disfa_leaves_out_frames_with_bad_landmarks(tmp_path: Path) -> None:
    trees.disfa(tmp_path, "SN002", 830, {25: {810: 3, 830: 3}}, aus=(25,), folder=".")
    (video,) = read_disfa(tmp_path, aus=(25,))
    assert set(range(1, 831)) - set(video.numbers.tolist()) == set(range(800, 827))
    assert video.labels.sum() == 1 and "27 frames" in video.notes[0]
    (kept,) = read_disfa(tmp_path, aus=(25,), bad_landmarks="keep")
    assert len(kept) == 830 and kept.labels.sum() == 2


def test_disfa_bad_frames_are_as_many_as_published_lists_leave_out() -> None:
    left_out = sum(last - first + 1 for ranges in BAD_LANDMARKS.values() for first, last in ranges)
    subjects = [subject for part in FOLDS["disfa"] for subject in part]
    assert set(BAD_LANDMARKS) <= set(subjects) and len(subjects) * FRAMES - left_out == 126_144


def test_disfa_missing_and_extra_images(tmp_path: Path) -> None:
    trees.disfa(tmp_path, "SN003", 6)
    (tmp_path / "Images/SN003/2.png").unlink()
    (video,) = read_disfa(tmp_path)
    assert video.numbers.tolist() == [1, 2, 4, 5, 6]
    assert video.notes == ("SN003: no image for labelled frames 3",)
    trees.save_image(tmp_path / "Images/SN003/6.png")
    refused(read_disfa, tmp_path, match="images 0 to 6 for 6 labelled frames; say with first_image")
    (video,) = read_disfa(tmp_path, first_image=0)
    assert video.notes[0] == "SN003: images without a label, frames 7"
    (video,) = read_disfa(tmp_path, first_image=1)
    assert video.images[0].name == "1.png" and video.images[-1].name == "6.png"
    refused(read_disfa, tmp_path, first_image=2, match="first_image must be one of")


@pytest.mark.parametrize("first", [0, 1])
def test_disfa_knows_the_video_that_is_a_frame_short(tmp_path: Path, first: int, monkeypatch) -> None:
    monkeypatch.setattr(disfa, "FRAMES", 12)
    monkeypatch.setitem(disfa.BAD_LANDMARKS, "SN010", ((12, 12),))
    for subject in ("SN003", "SN010"):
        trees.disfa(tmp_path, subject, 12, first=first)
        (tmp_path / f"Images/{subject}/{first + 11}.png").unlink()
    problems: list[str] = []
    (video,) = read_disfa(tmp_path, problems=problems) if first else read_disfa(tmp_path)[1:]
    assert video.subject == "SN010" and video.numbers.tolist() == list(range(1, 12))
    assert [path.name for path in video.images] == [f"{first + k}.png" for k in range(11)]
    if first:  # in any other video the missing image may be the first one
        assert "SN003: images 1 to 11 for 12 labelled frames; say with first_image" in problems[0]


def test_disfa_refuses_label_files_that_disagree(tmp_path: Path) -> None:
    trees.disfa(tmp_path, "SN003", 6)
    file = tmp_path / "ActionUnit_Labels/SN003/SN003_au4.txt"
    text = file.read_text()
    file.write_text(text.replace("6,0\n", ""))
    refused(read_disfa, tmp_path, match="SN003_au4.txt: its 5 frames are not the 6 frames of SN003_au1.txt")
    for row in ("5", "5,0,0"):
        file.write_text(text.replace("5,0", row))
        message = f"SN003_au4.txt, line 5: {row.count(',') + 1} values, expected 2"
        refused(read_disfa, tmp_path, match=message)
    file.write_text(text.replace("5,0", "5,6"))
    refused(read_disfa, tmp_path, match="SN003_au4.txt, line 5: AU 4 has the code 6, expected 0 to 5$")
    file.unlink()
    refused(read_disfa, tmp_path, match="SN003_au4.txt: cannot be read: No such file")


def test_disfa_landmarks_of_both_kinds_of_names(tmp_path: Path) -> None:
    points = np.arange(132.0).reshape(66, 2)
    for subject, name, first in (("SN003", "SN003_{:04d}_lm.mat", 0), ("SN004", "l{:05d}_lm.mat", 1)):
        trees.disfa(tmp_path, subject, 3)
        folder = tmp_path / "Landmark_Points" / subject / "tmp_frame_lm"
        folder.mkdir(parents=True)
        for k in range(3):
            scipy.io.savemat(folder / name.format(first + k), {"pts": points + k}, do_compression=k == 1)
        if first:
            scipy.io.savemat(
                folder / name.format(0), {"pts": points - 9}
            )  # the extra file some subjects have
    for video in read_disfa(tmp_path):
        assert {path.parent.parent.name for path in video.landmark_files} == {video.subject}
        assert len(video.landmark_files) == (3 if video.subject == "SN003" else 4)
        loaded = video.landmarks(np.array([2, 3, 40]))
        np.testing.assert_array_equal(loaded[:2], landmarks_49(np.stack([points, points + 1])))
        assert np.isnan(loaded[2]).all()
    (folder / "other_lm.mat").write_text("")
    refused(video.landmarks, np.array([1]), match="a landmark file of SN004 is named")


def test_disfa_cameras(tmp_path: Path) -> None:
    trees.disfa(tmp_path, "SN003", 3)
    for path in (tmp_path / "Images/SN003").iterdir():
        path.unlink()
    (tmp_path / "Images/SN003").rmdir()
    refused(read_disfa, tmp_path, match="no images and no video of SN003")
    (tmp_path / "Video_RightCamera").mkdir()
    (tmp_path / "Video_RightCamera/RightVideoSN003_Comp.avi").write_text("")
    (video,) = read_disfa(tmp_path)
    assert video.movie.name == "RightVideoSN003_Comp.avi" and video.positions.tolist() == [0, 1, 2]
    (tmp_path / "Videos_LeftCamera").mkdir()
    (tmp_path / "Videos_LeftCamera/LeftVideoSN003_comp.avi").write_text("")
    refused(read_disfa, tmp_path, match="both cameras; choose one with camera")
    (video,) = read_disfa(tmp_path, camera="left")
    assert video.movie.name == "LeftVideoSN003_comp.avi"


# ---- Aff-Wild2 -----------------------------------------------------------------------------------

ZEROS = ",".join("0" * 12)


def test_affwild2(tmp_path: Path) -> None:
    rows = [ZEROS, ",".join(["1"] * 12), ",".join(["-1"] * 12), "1" + ZEROS[1:]]
    trees.affwild2(tmp_path, "Train_Set", "30-30-1920x1080_left", rows, images=(1, 3, 4, 5))
    trees.affwild2(tmp_path, "Validation_Set", "8-30", [ZEROS], images=(1,))
    train, validation = read_affwild2(tmp_path)
    assert (train.name, train.group, validation.group) == ("30-30-1920x1080_left", "train", "validation")
    assert train.numbers.tolist() == [1, 3, 4]  # no image 2: no face was found there
    assert train.labels.sum(1).tolist() == [0, 0, 1] and train.mask.all(1).tolist() == [True, False, True]
    assert not train.mask[1].any() and train.images[1].name == "00003.jpg"
    assert train.notes == (
        "30-30-1920x1080_left: images without a label, frames 5",
        "30-30-1920x1080_left: 1 of 4 labelled frames have no image",
    )


def test_affwild2_reads_columns_by_name(tmp_path: Path) -> None:
    names = ",".join(f"AU{au}" for au in reversed(AU_SETS["affwild2"]))
    trees.affwild2(tmp_path, "Train_Set", "a", ["1" + ZEROS[1:]], images=(1,), header=names)
    (video,) = read_affwild2(tmp_path)
    assert video.labels[0].nonzero()[0].tolist() == [11]  # AU26 came first


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ZEROS + ",0", "line 3: 13 values, expected 12"),
        ("0,0", "line 3: 2 values, expected 12"),
        ("9" + ZEROS[1:], r"line 3: AU 1 has the code 9, expected 0 to 1 or -1 \(not coded\)"),
        ("", "line 3: the line is blank"),
    ],
)
def test_affwild2_refuses_a_row(tmp_path: Path, row: str, message: str) -> None:
    trees.affwild2(tmp_path, "Train_Set", "a", [ZEROS, row, ZEROS], images=(1,))
    refused(read_affwild2, tmp_path, match=message)


def test_affwild2_refuses_what_is_missing(tmp_path: Path) -> None:
    refused(read_affwild2, tmp_path, match="no folder AU_Detection_Challenge")
    trees.affwild2(tmp_path, "Train_Set", "a", [ZEROS], images=(4,))
    refused(read_affwild2, tmp_path, match="none of its 1 images has a label")
    trees.affwild2(tmp_path, "Train_Set", "a", [ZEROS], images=(1,), header="AU1,AU2")
    refused(read_affwild2, tmp_path, match="line 1: no column AU4")
    trees.affwild2(tmp_path, "Train_Set", "a", [ZEROS], images=())
    trees.affwild2(tmp_path, "Validation_Set", "a", [ZEROS], images=())
    refused(read_affwild2, tmp_path, match="the video is also in Train_Set")


# ---- landmark files ------------------------------------------------------------------------------


def test_landmark_csv_of_each_scheme(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    for count in (49, 66, 68):
        points = np.random.default_rng(count).uniform(0, 100, (3, count, 2)).round(2)
        points[1] = np.nan
        write_landmarks(path, np.array([3, 5, 6]), points)
        loaded = load_landmarks(path, np.array([6, 5, 4, 3]))
        np.testing.assert_array_equal(loaded[[0, 3]], landmarks_49(points[[2, 0]]))
        assert np.isnan(loaded[[1, 2]]).all()  # left empty, and left out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("x0", "x1", "line 1: column 'x1' is there twice"),
        ("x0", "u0", "line 1: the header must be frame"),
        ("\n5,1.00", "\n5,one", "line 3: could not convert string to float: 'one'"),
        ("\n5,1.00", "\n5", "line 3: 98 values, expected 99"),
        ("\n5,", "\n5.5,", "line 3: the frame number '5.5' is not a whole number"),
        ("\n5,", "\n3,", "line 3: frame 3 follows frame 3"),
    ],
)
def test_landmark_csv_refuses(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "points.csv"
    write_landmarks(path, np.array([3, 5]), np.ones((2, 49, 2)))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    refused(load_landmarks, path, np.array([3]), match=f"points.csv, {message}")
