"""Faces in frames: ids that stay, faces that leave, boxes and landmarks of any kind."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aufast.faces import Face, FaceDetector, landmarks_49
from aufast.label import InputError, LabelConfig, finding, label_files
from aufast.label.finding import FORGET, FaceStage, FoundFace, Identities, overlap
from aufast.label.given import GivenFaces, faces_file
from aufast.label.video import Frame
from tests.label.clips import blank, encode, face, moving

SIZE = 176


def find(images: Iterable[np.ndarray], **options) -> list:
    stage = FaceStage(LabelConfig("unused", **{"workers": 1, **options}), SIZE)
    try:
        return list(stage.run(Frame(k, k / 30, image) for k, image in enumerate(images)))
    finally:
        stage.close()


def scaled(side: int) -> np.ndarray:
    """The face's surroundings, 200 x 200 of the photograph, at another size on 240 x 240."""
    picture = np.full((240, 240, 3), 120, np.uint8)
    small = Image.fromarray(face(200, 200)).resize((side, side))
    top = (240 - side) // 2
    picture[top : top + side, top : top + side] = np.asarray(small)
    return picture


@pytest.mark.parametrize("every", [1, 4])
def test_37_two_faces_keep_their_ids_when_their_order_swaps(every: int) -> None:
    """The detector gives the largest first; the left one shrinks while the right one grows."""
    sides = range(195, 239, 4)
    seen = find([np.hstack([scaled(a), scaled(434 - a)]) for a in sides], detect_every=every)
    for frame in seen:
        assert [f.face_id for f in frame.faces] == [0, 1], "both are found in every frame"
    left = [frame.faces[0].box[0] < frame.faces[1].box[0] for frame in seen]
    assert len(set(left)) == 1, "an id stays on its side"
    widths = [[f.box[2] - f.box[0] for f in frame.faces] for frame in (seen[0], seen[-1])]
    assert (widths[0][0] > widths[0][1]) != (widths[1][0] > widths[1][1]), "the order did swap"


@pytest.mark.parametrize("every", [1, 5])
def test_38_a_face_leaving_the_frame(every: int) -> None:
    picture = np.pad(face(), ((0, 0), (0, 320), (0, 0)), mode="edge")
    images = [np.ascontiguousarray(picture[:, step : step + 320]) for step in range(0, 321, 16)]
    seen = find(images, detect_every=every)
    assert len(seen) == len(images), "every frame, with or without a face"
    assert seen[0].faces and not seen[-1].faces, "there at first, gone at last"
    for frame in seen:
        for found in frame.faces:
            assert found.aligned is not None or found.trouble


@pytest.mark.slow
def test_following_agrees_with_detecting() -> None:
    images = moving(12, step=2)
    for detected, followed in zip(find(images), find(images, detect_every=6), strict=True):
        a, b = detected.faces[0], followed.faces[0]
        assert overlap(a.box, b.box) > 0.7
        assert np.abs(landmarks_49(a.points) - landmarks_49(b.points)).mean() < 3
        assert b.face_id == 0 and b.confidence == pytest.approx(a.confidence, abs=0.3)


def test_a_followed_face_that_vanishes_is_not_kept() -> None:
    images = [face(), face(), blank(), blank(), face(), face()]
    assert [len(f.faces) for f in find(images, detect_every=5)] == [1, 1, 0, 0, 0, 1]


@pytest.mark.slow
def test_threads_change_nothing() -> None:
    images = [np.hstack([scaled(a), scaled(220)]) for a in (200, 210, 220, 230)]
    one, three = (find(images, workers=n) for n in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert [(f.face_id, f.box) for f in a.faces] == [(f.face_id, f.box) for f in b.faces]
        for f, g in zip(a.faces, b.faces, strict=True):
            np.testing.assert_array_equal(f.aligned.image, g.aligned.image)


def test_ids_come_back_after_a_pause_and_not_after_a_long_one() -> None:
    identities = Identities()

    def assign(index: int, *boxes) -> list[int]:
        faces = [FoundFace(box, None, 1.0) for box in boxes]
        identities.assign(index, faces)
        return [found.face_id for found in faces]

    a, b = (0, 0, 100, 100), (200, 0, 300, 100)
    assert assign(0, a, b) == [0, 1]
    assert assign(1, b, a) == [1, 0]
    assert assign(1 + FORGET, a) == [0], "within the pause"
    assert assign(2 + 2 * FORGET, a, b) == [2, 3], "after it"
    assert assign(3 + 2 * FORGET, (10, 0, 110, 100), (0, 0, 90, 100)) == [4, 2], "the nearer one"


@pytest.mark.parametrize(("every", "starts"), [(3, [0, 3, 6]), (2, [0, 2, 3, 5])])
def test_a_tracker_never_sees_two_sizes(every: int, starts: list[int], monkeypatch) -> None:
    """The detector looks at every K-th frame, and anew where the size changes."""
    sides, followed = [80, 80, 80, 81, 81, 81, 81], []

    class Tracker:
        def __init__(self, landmarker, image, faces) -> None:
            self.shape = image.shape

        def follow(self, image):
            assert image.shape == self.shape
            followed.append(int(image[0, 0, 0]))
            return []

    monkeypatch.setattr(finding, "FaceTracker", Tracker)
    images = [np.full((80, side, 3), k, np.uint8) for k, side in enumerate(sides)]
    assert [seen.index for seen in find(images, detect_every=every, workers=2)] == list(range(7))
    assert sorted(followed) == [k for k in range(7) if k not in starts]


@pytest.mark.parametrize("options", [{}, {"overlay": True}], ids=["tables", "pictures"])
@pytest.mark.parametrize("every", [1, 10_000])
def test_no_setting_keeps_more_pixels_than_a_bound(every: int, options: dict, monkeypatch) -> None:
    """However long the tracker follows, the frames that are alive at a time take so much at most."""
    size, alive, most = blank(80, 80).nbytes, [0], [0]
    monkeypatch.setattr(finding, "AHEAD", 10 * size)

    def gone() -> None:
        alive[0] -= 1

    def frames() -> Iterator[Frame]:
        for k in range(300):
            image = np.full((80, 80, 3), 90, np.uint8)
            weakref.finalize(image, gone)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            yield Frame(k, None, image)

    stage = FaceStage(LabelConfig("unused", workers=2, detect_every=every, batch=8, **options), SIZE)
    assert sum(1 for _ in stage.run(frames())) == 300
    stage.close()
    # Those that may wait, one that waits to be taken, one that each thread has done, the reader's, and the
    # tracker's first.
    assert most[0] <= (10 if every > 1 or options else 3) + 1 + 2 + 1 + 1, most


def test_frames_are_read_ahead_only_so_far() -> None:
    count = itertools.count()
    config = LabelConfig("unused", workers=2, batch=4)
    stage = FaceStage(config, SIZE)
    seen = stage.run(Frame(next(count), None, blank(64, 64)) for _ in iter(int, 1))
    next(seen)
    time.sleep(0.5)
    # One given, two batches waiting for the model, workers + 1 pieces and the one that waits to be taken.
    assert next(count) <= 1 + 2 * config.batch + config.workers + 3
    seen.close()
    stage.close()


def test_what_the_reader_raises_is_raised() -> None:
    def frames():
        yield blank()
        raise KeyError("broken reader")

    with pytest.raises(KeyError, match="broken reader"):
        find(frames())


# ---- given faces ---------------------------------------------------------------------------------


@functools.cache
def shared_detector() -> FaceDetector:
    return FaceDetector()


@functools.cache
def detected() -> Face:
    return shared_detector().detect(face())[0]


def points(count: int = 68) -> np.ndarray:
    """The landmarks of `face()`."""
    return detected().landmarks68 if count == 68 else detected().landmarks


def write_faces(path: Path, rows: Iterable[Iterable], columns: int) -> None:
    names = (
        ["x1", "y1", "x2", "y2"] if columns == 4 else [f"{a}{k}" for k in range(columns // 2) for a in "xy"]
    )
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frame", "face_id", *names])
        writer.writerows(rows)


def label_one(tmp_path: Path, model: str, **options) -> tuple[dict, list[dict]]:
    """Label `face()` with the faces of `tmp_path/faces/a.csv`."""
    Image.fromarray(face()).save(tmp_path / "a.png")
    out = tmp_path / "out"
    label_files(
        [str(tmp_path / "a.png")],
        out,
        LabelConfig(model, workers=1, faces=str(tmp_path / "faces"), **options),
    )
    line = json.loads((out / "run.jsonl").read_text())
    table = out / line["sidecar"].replace(".json", ".csv") if line["sidecar"] else Path("/nowhere")
    sidecar = json.loads((out / line["sidecar"]).read_text()) if line["sidecar"] else line
    return sidecar, list(csv.DictReader(table.open())) if table.exists() else []


def swapped() -> np.ndarray:
    p = points(49).copy()
    p[19:25], p[25:31] = points(49)[25:31], points(49)[19:25]
    return p


def together() -> np.ndarray:
    p = points(49).copy()
    p[19:31] = p[19]
    return p


UNUSABLE: dict[str, tuple[Callable[[], Iterable[float]], str]] = {
    "39: a box outside": (lambda: (600, 10, 700, 110), "outside the image"),
    "39: an inverted box": (lambda: (200, 200, 100, 100), "x1 < x2"),
    "39: an empty box": (lambda: (100, 100, 100, 100), "a pixel or more apart"),
    "39: a box 2^30 wide": (lambda: (0, 0, 2**30, 2**30), "outside the image"),
    "40: landmarks at one place": (lambda: np.full(98, 100.0), "both eyes at one place"),
    "41: landmarks in a line": (lambda: np.repeat(np.arange(49.0) + 100, 2), "one line|exchanged"),
    "42: NaN landmarks": (lambda: np.full(98, np.nan), "must be finite"),
    "42: a NaN box": (lambda: (1, 2, np.nan, 4), "must be finite"),
    "43: eyes swapped": (lambda: swapped().ravel(), "mouth above the eyes"),
    "43: no distance between the eyes": (lambda: together().ravel(), "both eyes at one place"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_faces_that_cannot_be_used(case: str, tmp_path: Path, models: dict[str, str]) -> None:
    """A row that says so, a warning that says why, and no number."""
    make, reason = UNUSABLE[case]
    values = list(make())
    (tmp_path / "faces").mkdir()
    write_faces(tmp_path / "faces" / "a.csv", [[1, 5, *values]], len(values))
    sidecar, (row,) = label_one(tmp_path, models["margl"])
    assert sidecar["status"] == "no_face"
    assert re.search(rf"^1 faces are not labelled: .*({reason})", sidecar["warnings"][0])
    assert (row["success"], row["confidence"], row["face_id"]) == ("0", "0", "5")
    assert {v for k, v in row.items() if k.startswith("AU")} == {"0"}


@pytest.mark.slow
def test_given_landmarks_and_boxes_give_the_detectors_table(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "faces").mkdir()
    _, (found,) = label_one_without(tmp_path, models["margl"])
    for values in (points().ravel(), points(49).ravel(), detected().box):
        write_faces(tmp_path / "faces" / "a.csv", [[1, 3, *values]], len(values))
        sidecar, (row,) = label_one(tmp_path, models["margl"])
        assert sidecar["status"] == "ok" and row["face_id"] == "3"
        assert {k: v for k, v in row.items() if k[:2] == "AU"} == {
            k: v for k, v in found.items() if k[:2] == "AU"
        }


def label_one_without(tmp_path: Path, model: str) -> tuple[dict, list[dict]]:
    Image.fromarray(face()).save(tmp_path / "a.png")
    out = tmp_path / "detected"
    label_files([str(tmp_path / "a.png")], out, LabelConfig(model, workers=1))
    sidecar = next(out.glob("a-*.json"))
    return json.loads(sidecar.read_text()), list(csv.DictReader(sidecar.with_suffix(".csv").open()))


@pytest.mark.slow
def test_44_one_based_coordinates(tmp_path: Path, models: dict[str, str]) -> None:
    """Nothing in the numbers tells them apart, so the user says which they are."""
    (tmp_path / "faces").mkdir()
    write_faces(tmp_path / "faces" / "a.csv", [[1, 0, *(points(49).ravel() + 1)]], 98)
    _, one = label_one(tmp_path, models["margl"], one_based=True)
    _, wrong = label_one(tmp_path, models["margl"])
    write_faces(tmp_path / "faces" / "a.csv", [[1, 0, *points(49).ravel()]], 98)
    _, zero = label_one(tmp_path, models["margl"])
    assert one == zero != wrong


def test_45_landmark_schemes_are_not_mixed(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "faces").mkdir()
    rows = [[1, 0, *points(68).ravel()], [2, 0, *points(49).ravel()]]
    write_faces(tmp_path / "faces" / "a.csv", rows, 136)
    sidecar, table = label_one(tmp_path, models["margl"])
    assert sidecar["status"] == "undecodable" and not table
    assert "a.csv, line 3: 100 values, expected 138" in sidecar["sentence"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("frame,x0\n", "line 1: the header must be"),
        ("frame,face_id,x0,y0\n1,0,1,2\n", "line 1: the header must be"),
        ("frame,face_id,x1,y1,x2,y2\n1,0,a,2,3,4\n", "line 2: .*'a'"),
        ("frame,face_id,x1,y1,x2,y2\n0,0,1,2,3,4\n", "line 2: frame 0"),
        ("frame,face_id,x1,y1,x2,y2\n1.5,0,1,2,3,4\n", "whole numbers"),
        ("frame,face_id,x1,y1,x2,y2\n1,0,1,2,3,4\n1,0,1,2,3,4\n", "line 3: face 0 of frame 1 is there twice"),
        ("frame,face_id,x1,y1,x2,y2\n2,0,1,2,3,4\n1,0,1,2,3,4\n", "line 3: frame 1 follows frame 2"),
        ("", "the file is empty"),
    ],
)
def test_files_of_faces_that_do_not_fit(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        GivenFaces(tmp_path / "a.csv")


def test_given_faces_are_given_in_order(tmp_path: Path) -> None:
    write_faces(tmp_path / "a.csv", [[k, f, 1, 2, 3, 4] for k, f in ((2, 0), (2, 5), (7, 1))], 4)
    given = GivenFaces(tmp_path / "a.csv", one_based=True)
    ids = [[found.face_id for found in given.of(index)] for index in range(9)]
    assert ids == [[], [0, 5], [], [], [], [], [1], [], []]
    assert GivenFaces(tmp_path / "a.csv", one_based=True).of(6)[0].box == (0, 1, 2, 3)


def test_given_faces_of_a_video_by_frame(tmp_path: Path, models: dict[str, str]) -> None:
    """Frames without a row have no face, whatever is to be seen in them."""
    video = encode(tmp_path / "v.mp4", moving(6, step=0))
    (tmp_path / "faces").mkdir()
    write_faces(tmp_path / "faces" / "v.csv", [[k, 7, *points(49).ravel()] for k in (2, 3, 5)], 98)
    label_files([str(video)], tmp_path / "out", LabelConfig(models["aar"], faces=str(tmp_path / "faces")))
    (table,) = (tmp_path / "out").glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    assert [(r["success"], r["face_id"]) for r in rows] == [
        ("0", "0"),
        ("1", "7"),
        ("1", "7"),
        ("0", "0"),
        ("1", "7"),
        ("0", "0"),
    ]


def test_files_of_faces_by_folder_and_ending(tmp_path: Path) -> None:
    """The nearest name is taken: folders of the input's count, and its ending does."""
    folder = tmp_path / "faces"
    (folder / "b").mkdir(parents=True)
    video = "/recordings/a/b/clip.mp4"
    assert faces_file(str(folder), video) == folder / "clip.csv", "where there is none"
    for name in ("clip.csv", "clip.mp4.csv", "b/clip.csv", "b/clip.mp4.csv"):
        (folder / name).write_text("")
        assert faces_file(str(folder), video) == folder / name
    assert faces_file(str(folder), "/recordings/a/c/clip.mkv") == folder / "clip.csv"


def test_inputs_of_one_name_do_not_share_their_faces(tmp_path: Path, models: dict[str, str]) -> None:
    """A file of faces belongs to one input; which, cannot be guessed."""
    faces = tmp_path / "faces"
    faces.mkdir()
    for name in ("one", "two"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (faces / name).mkdir()
        Image.fromarray(face()[len(name) - 2 :]).save(tmp_path / "in" / name / "a.png")
    Image.fromarray(face()[1:]).save(tmp_path / "in" / "two" / "a.png")
    write_faces(faces / "a.csv", [[1, 5, *points(49).ravel()]], 98)
    options = LabelConfig(models["aar"], workers=1, faces=str(faces))
    summary = label_files([str(tmp_path / "in")], tmp_path / "out", options)
    assert dict(summary.inputs) == {"undecodable": 2}
    assert re.search(r"one/a.png'.*a.csv' would also be that of '.*two/a.png'", summary.text())
    for k, name in enumerate(("one", "two")):
        write_faces(faces / name / "a.csv", [[1, 7 + k, *points(49).ravel()]], 98)
    assert dict(label_files([str(tmp_path / "in")], tmp_path / "out", options).inputs) == {"ok": 2}
    rows = {}
    for sidecar in (tmp_path / "out").glob("a-*.json"):
        facts = json.loads(sidecar.read_text())
        (row,) = csv.DictReader(sidecar.with_suffix(".csv").open())
        rows[Path(facts["input"]["path"]).parent.name] = row["face_id"]
    assert rows == {"one": "7", "two": "8"}


def test_rows_after_the_last_frame_are_told(tmp_path: Path, models: dict[str, str]) -> None:
    video = encode(tmp_path / "v.mp4", moving(3, step=0))
    (tmp_path / "faces").mkdir()
    told = "the file of faces goes on to frame 9, the input ends with frame 3"
    for last, warnings in ((3, []), (9, [told])):
        write_faces(tmp_path / "faces" / "v.csv", [[k, 0, *points(49).ravel()] for k in (1, last)], 98)
        out = tmp_path / str(last)
        label_files([str(video)], out, LabelConfig(models["aar"], faces=str(tmp_path / "faces")))
        assert json.loads(next(out.glob("v-*.json")).read_text())["warnings"] == warnings


def test_a_file_of_faces_that_cannot_be_read_stops_nothing(
    tmp_path: Path, models: dict[str, str], monkeypatch
) -> None:
    """One input's status, and the others go on."""
    from aufast.label import run

    for name in "ab":
        Image.fromarray(face()).save(tmp_path / f"{name}.png")
    (tmp_path / "faces").mkdir()
    for name in "ab":
        write_faces(tmp_path / "faces" / f"{name}.csv", [[1, 0, *points(49).ravel()]], 98)
    read = run.file_sum

    def file_sum(path: Path) -> str:
        if Path(path).name == "a.csv":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(run, "file_sum", file_sum)
    paths = [str(tmp_path / f"{name}.png") for name in "ab"]
    options = LabelConfig(models["aar"], workers=1, faces=str(tmp_path / "faces"))
    summary = label_files(paths, tmp_path / "out", options)
    assert dict(summary.inputs) == {"undecodable": 1, "ok": 1}
    assert re.search(r"a.png': the file of faces '.*a.csv': Permission denied", summary.text())


def test_a_file_of_faces_that_changes_under_way(tmp_path: Path) -> None:
    rows = [[k, 0, 1, 2, 3, 4] for k in range(1, 2000)]
    write_faces(tmp_path / "a.csv", rows, 4)
    given = GivenFaces(tmp_path / "a.csv")
    assert given.last == 1999 and given.of(0)
    with (tmp_path / "a.csv").open("r+") as file:
        file.seek(20_000)
        file.write("x" * 200)
    with pytest.raises(InputError, match=r"a\.csv, line \d+: ") as caught:
        given.of(1998)
    assert caught.value.status == "partial"


def test_inputs_without_a_file_of_faces_are_named(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "faces").mkdir()
    line, _ = label_one(tmp_path, models["aar"])
    assert line["status"] == "undecodable" and "there is no file of faces" in line["sentence"]


# ---- the detector --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda a: np.repeat(np.repeat(a, 2, 0), 2, 1)[::2, ::2], None),
        (np.asfortranarray, None),
        (lambda a: a[..., ::-1], None),
        (lambda a: a.astype(np.float32), "dtype float32"),
        (lambda a: a.transpose(2, 0, 1), "the channels must come last"),
        (lambda a: np.dstack([a, a[..., :1]]), "must be RGB"),
    ],
    ids=["strided", "Fortran", "BGR", "float", "CHW", "RGBA"],
)
def test_46_arrays_of_every_layout(change, refused: str | None) -> None:
    array = change(face())
    detector = shared_detector()
    if refused:
        with pytest.raises((TypeError, ValueError), match=refused):
            detector.detect(array)
    else:
        assert overlap(detector.detect(array)[0].box, detected().box) > 0.8


@pytest.mark.parametrize("content", [None, b"", b"no model" * 100], ids=["missing", "empty", "text"])
def test_47_a_bad_landmark_model_is_told_before_anything_is_written(
    content: bytes | None, tmp_path: Path, models: dict[str, str]
) -> None:
    file = tmp_path / "landmarks.dat"
    if content is not None:
        file.write_bytes(content)
    Image.fromarray(face()).save(tmp_path / "a.png")
    with pytest.raises((ValueError, FileNotFoundError), match=r"landmark model .*landmarks\.dat"):
        label_files(
            [str(tmp_path / "a.png")], tmp_path / "out", LabelConfig(models["aar"], landmarks=str(file))
        )
    assert not (tmp_path / "out").exists()
