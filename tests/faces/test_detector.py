"""The detector on a real photograph, on arrays and boxes of every kind, and the search for its model file."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from aufast.faces import (
    Face,
    FaceDetector,
    Landmarker,
    detect_faces,
    find_landmark_model,
    landmarks_49,
    largest_face,
)
from aufast.faces import detector as module
from aufast.files import file_sum

pytest.importorskip("dlib", reason="dlib is not installed")


@pytest.fixture(scope="module")
def model() -> Path:
    return find_landmark_model()[0]


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model file anywhere."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "DEBIAN_PATHS", ())
    monkeypatch.delenv("AUFAST_LANDMARKS", raising=False)


def assert_same(faces: list[Face], expected: list[Face]) -> None:
    assert [(face.box, face.confidence) for face in faces] == [
        (face.box, face.confidence) for face in expected
    ]
    for face, other in zip(faces, expected, strict=True):
        np.testing.assert_array_equal(face.landmarks68, other.landmarks68)


# ---- the photograph ------------------------------------------------------------------------------


def test_one_face_where_it_is(detector: FaceDetector, photograph: np.ndarray) -> None:
    (face,) = detector.detect(photograph)
    x1, y1, x2, y2 = face.box
    assert face.confidence > 0 and face.landmarks68.shape == (68, 2) and face.landmarks68.dtype == np.float64
    np.testing.assert_array_equal(face.landmarks, landmarks_49(face.landmarks68))
    # Read off the photograph by eye: pupils, nose tip, mouth corners.
    seen = {
        (36, 42): (204, 101),
        (42, 48): (247, 103),
        (30, 31): (225, 126),
        (48, 49): (204, 140),
        (54, 55): (244, 141),
    }
    for (first, last), position in seen.items():
        assert np.abs(face.landmarks68[first:last].mean(axis=0) - position).max() <= 5
    assert (face.landmarks68[17:] >= (x1, y1 - 10)).all() and (face.landmarks68[17:] < (x2, y2)).all()


def test_detect_faces_is_the_detector(detector: FaceDetector, photograph: np.ndarray) -> None:
    assert_same(detect_faces(photograph), detector.detect(photograph))


def test_upsampling_finds_smaller_faces(detector: FaceDetector, photograph: np.ndarray) -> None:
    small = np.ascontiguousarray(photograph[::2, ::2])  # the face is 44 pixels wide
    assert detector.detect(small) == []
    assert len(FaceDetector(upsample=1).detect(small)) == 1


@pytest.mark.parametrize(
    "view",
    [
        lambda image: np.asfortranarray(image),
        lambda image: np.ascontiguousarray(image[:, ::-1])[:, ::-1],
        lambda image: np.repeat(image, 2, axis=1)[:, ::2],
        lambda image: np.dstack([image, image[..., 0]])[..., :3],
        lambda image: np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0),
        lambda image: np.broadcast_to(image, image.shape),
    ],
    ids=[
        "fortran",
        "negative stride",
        "every other column",
        "RGB of RGBA",
        "channels first in memory",
        "read only",
    ],
)
def test_views_find_what_copies_find(detector: FaceDetector, photograph: np.ndarray, view) -> None:
    assert_same(detector.detect(view(photograph)), detector.detect(photograph))


def test_threshold(detector: FaceDetector, photograph: np.ndarray) -> None:
    """In greyscale dlib's own threshold takes the suit for a face, and a larger one."""
    grey = photograph[..., 1]
    suit, face = FaceDetector(threshold=0).detect(grey)
    assert suit.confidence < 0.1 and face.confidence > 1
    assert_same([face], detector.detect(grey))
    with pytest.raises(ValueError, match="threshold must be a finite number, got nan"):
        FaceDetector(threshold=float("nan"))


def test_greyscale_and_bgr_find_the_face(detector: FaceDetector, photograph: np.ndarray) -> None:
    for image in (photograph[..., 1], photograph[..., ::-1]):
        (face,) = detector.detect(image)
        assert np.abs(np.array(face.box) - (179, 83, 267, 171)).max() <= 10


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (np.zeros((99, 99, 3)), TypeError),
        (np.zeros((99, 99, 3), bool), TypeError),
        (np.zeros((3, 99, 99), np.uint8), ValueError),
        (np.zeros((99, 99, 4), np.uint8), ValueError),
        (np.zeros((0, 99, 3), np.uint8), ValueError),
        ("photo.jpg", TypeError),
    ],
    ids=["float", "bool", "CHW", "RGBA", "empty", "path"],
)
def test_other_arrays_are_refused(detector: FaceDetector, image, error: type[Exception]) -> None:
    with pytest.raises(error, match="^image "):
        detector.detect(image)
    with pytest.raises(error, match="^image "):
        detector.landmarker.landmarks_in_box(image, (0, 0, 9, 9))


# ---- none, several, partly visible ---------------------------------------------------------------


@pytest.mark.parametrize("shape", [(79, 79), (1, 1), (1, 500), (10, 30_000), (300, 300)], ids=str)
def test_no_face(detector: FaceDetector, shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for image in (noise, np.zeros_like(noise)):
        assert detector.detect(image) == []
        with pytest.raises(ValueError, match="^there is no face in holiday.jpg$"):
            detector.detect_one(image, "holiday.jpg")


def test_the_largest_comes_first(detector: FaceDetector, photograph: np.ndarray, caplog) -> None:
    head = photograph[40:240, 120:320]
    large = head.repeat(2, axis=0).repeat(2, axis=1)  # 400 x 400
    small = np.pad(head, ((0, 200), (0, 0), (0, 0)), mode="edge")  # 400 x 200
    for image in (np.hstack([small, large]), np.hstack([large, small])):
        faces = detector.detect(image)
        widths = [face.box[2] - face.box[0] for face in faces]
        assert len(faces) == 2 and widths[0] > 1.5 * widths[1]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert detector.detect_one(image, "pair.png").box == faces[0].box
        assert caplog.messages == ["pair.png has 2 faces; the largest is used"]
        assert largest_face(faces[::-1]) is faces[0]


def test_equal_faces_keep_an_order(detector: FaceDetector, photograph: np.ndarray) -> None:
    faces = detector.detect(np.hstack([photograph, photograph]))
    assert len(faces) == 2
    sizes = [face.box[2] - face.box[0] for face in faces]
    assert sizes[0] > sizes[1] or faces[0].box < faces[1].box


def test_a_face_leaving_the_frame(detector: FaceDetector, photograph: np.ndarray) -> None:
    found = 0
    for cut in range(180, 270, 10):
        for image in (photograph[:, cut:], photograph[:, :cut], photograph[cut - 90 :]):
            for face in detector.detect(image):
                x1, y1, x2, y2 = face.box
                assert x1 < image.shape[1] and y1 < image.shape[0] and x2 > 0 and y2 > 0
                assert np.isfinite(face.landmarks).all()
                found += 1
    assert found > 0, "the detector still sees the face in some of the cuts"


def test_a_box_partly_outside(detector: FaceDetector, photograph: np.ndarray, face: Face) -> None:
    cut = 200  # leaves three quarters of the face
    x1, y1, x2, y2 = face.box
    points = detector.landmarker.landmarks_in_box(photograph[:, cut:], (x1 - cut, y1, x2 - cut, y2))
    visible = face.landmarks68[:, 0] > cut + 30
    assert np.abs(points[visible] + (cut, 0) - face.landmarks68[visible]).mean() < 8


def test_the_detectors_box_gives_its_landmarks(
    detector: FaceDetector, photograph: np.ndarray, face: Face
) -> None:
    for box in (
        face.box,
        list(face.box),
        np.array(face.box, np.float32),
        [value + 0.3 for value in face.box],
    ):
        np.testing.assert_array_equal(detector.landmarker.landmarks_in_box(photograph, box), face.landmarks68)


BOXES = {
    "outside": ((600, 10, 700, 110), "lies outside the image of 512 x 512 pixels"),
    "above": ((10, -200, 110, -100), "outside the image"),
    "mostly outside": ((-90, 10, 10, 110), "outside the image"),
    "touching": ((512, 0, 612, 100), "outside the image"),
    "inverted": ((267, 171, 179, 83), "x1 < x2 and y1 < y2"),
    "inverted in y": ((179, 171, 267, 83), "x1 < x2 and y1 < y2"),
    "empty": ((100, 100, 100, 100), "a pixel or more apart"),
    "thin": ((100, 100, 100.5, 200), "a pixel or more apart"),
    "huge": ((0, 0, 2**30, 2**30), "outside the image"),
    "huge all round": ((-(2**30), -(2**30), 2**30, 2**30), "outside the image"),
    "beyond float": ((0, 0, 10**400, 10), "four numbers"),
    "nan": ((0, 0, float("nan"), 9), "must be finite"),
    "infinite": ((0, 0, float("inf"), 9), "must be finite"),
    "three numbers": ((0, 0, 9), "four numbers x1, y1, x2, y2"),
    "text": ("face", "four numbers"),
    "None": (None, "four numbers"),
}


@pytest.mark.parametrize(("box", "message"), BOXES.values(), ids=BOXES)
def test_bad_boxes(detector: FaceDetector, photograph: np.ndarray, box, message: str) -> None:
    with pytest.raises(ValueError, match=f"^box .*{message}"):
        detector.landmarker.landmarks_in_box(photograph, box)


@pytest.mark.parametrize("upsample", [-1, 0.5, float("nan"), float("inf")])
def test_bad_upsample(upsample: float) -> None:
    with pytest.raises(ValueError, match="upsample must be 0 or a positive whole number, got"):
        FaceDetector(upsample=upsample)


def test_two_threads_each_with_its_own(detector: FaceDetector, photograph: np.ndarray) -> None:
    expected = detector.detect(photograph)
    with ThreadPoolExecutor(2) as pool:
        results = list(
            pool.map(lambda own: [own.detect(photograph) for _ in range(5)], [detector, FaceDetector()])
        )
    for faces in results[0] + results[1]:
        assert_same(faces, expected)


# ---- the model file ------------------------------------------------------------------------------


def test_the_package_is_found_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUFAST_LANDMARKS", raising=False)
    path, is_named = find_landmark_model()
    assert path.name == "shape_predictor_68_face_landmarks.dat" and not is_named
    assert "face_recognition_models" not in sys.modules
    assert file_sum(path) == module.SHA256


def test_path_then_environment_then_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("argument", "variable"):
        (tmp_path / name).touch()
    monkeypatch.setenv("AUFAST_LANDMARKS", str(tmp_path / "variable"))
    assert find_landmark_model(tmp_path / "argument") == (tmp_path / "argument", True)
    assert find_landmark_model(os.fsencode(tmp_path / "argument")) == (tmp_path / "argument", True)
    assert find_landmark_model() == (tmp_path / "variable", True)
    monkeypatch.setenv("AUFAST_LANDMARKS", "")
    assert find_landmark_model()[1] is False


def test_debians_file_is_found(nothing_installed, tmp_path: Path, monkeypatch, model_bytes_link) -> None:
    monkeypatch.setattr(module, "DEBIAN_PATHS", (tmp_path / "absent.dat", model_bytes_link))
    assert find_landmark_model() == (model_bytes_link, False)
    Landmarker()


@pytest.fixture
def model_bytes_link(tmp_path: Path, model: Path) -> Path:
    (tmp_path / model.name).symlink_to(model)
    return tmp_path / model.name


def test_nothing_found_says_every_way(nothing_installed) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        FaceDetector()
    for way in (
        "give the path",
        "AUFAST_LANDMARKS",
        "pip install face-recognition-models",
        "apt install libdlib-data",
    ):
        assert way in str(caught.value)


def test_a_named_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no landmark model file '/no/such\.dat'$"):
        FaceDetector(landmarks_path="/no/such.dat")
    with pytest.raises(FileNotFoundError, match="no landmark model file"):
        FaceDetector(landmarks_path=tmp_path)  # a folder
    monkeypatch.setenv("AUFAST_LANDMARKS", "/no/such.dat")
    with pytest.raises(FileNotFoundError, match=r"'/no/such\.dat' \(from AUFAST_LANDMARKS\)"):
        FaceDetector()


@pytest.mark.parametrize("kept", [0, 1, 100, 1_000_000, 50_000_000, 99_693_936])
def test_a_truncated_model(tmp_path: Path, model: Path, kept: int) -> None:
    with open(model, "rb") as file:
        (tmp_path / "cut.dat").write_bytes(file.read(kept))
    with pytest.raises(
        ValueError, match=r"landmark model '.*cut\.dat' cannot be read by dlib, it is damaged"
    ):
        Landmarker(tmp_path / "cut.dat")


def test_a_model_that_is_text_or_noise(tmp_path: Path) -> None:
    (tmp_path / "page.dat").write_text("<!DOCTYPE html><title>404</title>" * 100)
    (tmp_path / "noise.dat").write_bytes(np.random.default_rng(0).bytes(100_000))
    for name in ("page.dat", "noise.dat"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read by dlib"):
            Landmarker(tmp_path / name)


def test_a_model_of_five_points(model: Path) -> None:
    five = model.with_name("shape_predictor_5_face_landmarks.dat")
    if not five.is_file():
        pytest.skip(
            "the model was not found in face-recognition-models, which has the 5-point file beside it"
        )
    with pytest.raises(ValueError, match="gives 5 points, 68 are needed"):
        Landmarker(five)


def test_a_changed_model(
    nothing_installed, tmp_path: Path, monkeypatch, model: Path, caplog, photograph
) -> None:
    """One flipped bit: refused where it was installed, used with a warning where the user names it."""
    changed = tmp_path / "changed.dat"
    shutil.copyfile(model, changed)
    with open(changed, "r+b") as file:
        file.seek(60_000_000)
        (byte,) = file.read(1)
        file.seek(60_000_000)
        file.write(bytes([byte ^ 1]))
    monkeypatch.setattr(module, "DEBIAN_PATHS", (changed,))
    with pytest.raises(
        ValueError, match=r"changed\.dat' is damaged: its SHA-256 is not that of the known file"
    ):
        Landmarker()
    with caplog.at_level(logging.WARNING):
        points = Landmarker(changed).landmarks_in_box(photograph, (179, 83, 267, 171))
    (message,) = caplog.messages
    assert message.startswith(f"landmark model {str(changed)!r} is not the known file")
    assert points.shape == (68, 2)


def test_the_licence_is_printed_once(capfd: pytest.CaptureFixture) -> None:
    module._print_licence_note.cache_clear()
    Landmarker()
    Landmarker()
    out, err = capfd.readouterr()
    assert out == "" and err.count("excludes commercial use") == 1 and err.count("\n") == 1


def test_without_dlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(ImportError, match=r"needs dlib: pip install 'aufast\[faces\]'"):
        FaceDetector()


def test_importing_faces_is_light() -> None:
    code = (
        "import sys, aufast.faces; print({'dlib', 'PIL', 'skimage', 'av', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
