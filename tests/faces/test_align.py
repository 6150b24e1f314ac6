"""Alignment: the recipe by hand, the pixels against scikit-image, and landmarks that no face can have."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import transform

from aufast.faces import Face, FaceDetector, align_face, crop_face, landmarks_49
from aufast.faces.align import AlignedFace

LEFT_EYE, RIGHT_EYE = range(19, 25), range(25, 31)


def face_points(
    left=(80, 100), right=(140, 100), nose=(110, 130), mouth=((90, 170), (130, 170))
) -> np.ndarray:
    """49 points of which only those the alignment reads are anywhere in particular."""
    points = np.full((49, 2), 100.0)
    points[LEFT_EYE], points[RIGHT_EYE], points[13] = left, right, nose
    points[31], points[37] = mouth
    return points


def eye_centers(points: np.ndarray) -> np.ndarray:
    return np.stack([points[LEFT_EYE].mean(axis=0), points[RIGHT_EYE].mean(axis=0)])


def skimage_warp(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """The same matrix through scikit-image, in floating point."""
    similarity = transform.SimilarityTransform(np.vstack([matrix, [0, 0, 1]]))
    return transform.warp(
        image.astype(np.float64),
        similarity.inverse,
        output_shape=(size, size),
        order=1,
        cval=128.0,
        clip=False,
    )


def assert_is_skimage(aligned: AlignedFace, image: np.ndarray, landmarks: np.ndarray) -> None:
    size = aligned.image.shape[0]
    # Ours is rounded to whole grey levels; before that the two were measured to differ by less than 3e-11.
    assert np.abs(aligned.image - skimage_warp(image, aligned.matrix, size)).max() <= 0.5 + 1e-6
    expected = transform.matrix_transform(landmarks, np.vstack([aligned.matrix, [0, 0, 1]]))
    np.testing.assert_allclose(aligned.landmarks, expected, atol=1e-3, rtol=0)


def test_recipe_by_hand() -> None:
    """Eyes, nose and mouth span 60 x 70; a square of 2.9 · 70 = 203 around (110, 135) becomes 200 pixels."""
    aligned = align_face(np.zeros((300, 300, 3), np.uint8), face_points())
    scale = 199 / 203
    np.testing.assert_allclose(
        aligned.matrix, [[scale, 0, 99.5 - scale * 110], [0, scale, 99.5 - scale * 135]], atol=1e-12
    )
    np.testing.assert_allclose(
        eye_centers(aligned.landmarks)[0], 99.5 + scale * np.array([-30, -35]), atol=1e-12
    )


def test_a_wide_face_takes_its_width() -> None:
    points = face_points(left=(50, 100), right=(170, 100))
    scale = align_face(np.zeros((300, 300, 3), np.uint8), points).matrix[0, 0]
    assert scale == pytest.approx(199 / (2.9 * 120))


@pytest.mark.parametrize("degrees", [-170, -90, -30, 10, 45, 90, 180])
def test_a_turned_face_is_turned_back(degrees: float) -> None:
    """The same face, turned about the image's middle, has the same aligned landmarks."""
    image = np.zeros((300, 300, 3), np.uint8)
    angle = np.deg2rad(degrees)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = np.random.default_rng(0).normal(face_points(), 2)
    turned = (points - 150) @ rotation.T + 150
    np.testing.assert_allclose(
        align_face(image, turned).landmarks, align_face(image, points).landmarks, atol=1e-9
    )


def test_the_photographs_eyes_are_level(photograph: np.ndarray, face: Face) -> None:
    before, after = eye_centers(face.landmarks), eye_centers(align_face(photograph, face.landmarks).landmarks)
    assert abs(before[0, 1] - before[1, 1]) > 2  # she holds her head to one side
    assert abs(after[0, 1] - after[1, 1]) <= 0.5
    assert after[1, 0] - after[0, 0] > 50


def test_the_detector_agrees(photograph: np.ndarray, face: Face, detector: FaceDetector) -> None:
    """Found anew on the aligned picture, the eyes are level and where the matrix put them."""
    aligned = align_face(photograph, face.landmarks)
    again = detector.detect_one(aligned.image).landmarks
    left, right = eye_centers(again)
    assert abs(left[1] - right[1]) <= 1
    assert np.abs(eye_centers(again) - eye_centers(aligned.landmarks)).max() <= 2


def test_the_photograph_is_scikit_images_warp(photograph: np.ndarray, face: Face) -> None:
    for size in (200, 176, 57):
        assert_is_skimage(align_face(photograph, face.landmarks, size), photograph, face.landmarks)


@pytest.mark.parametrize("seed", range(8))
def test_random_images_are_scikit_images_warp(seed: int) -> None:
    """Faces of any size and angle, reaching over the border, enlarged and reduced."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (int(rng.integers(60, 300)), int(rng.integers(60, 300)), 3), dtype=np.uint8)
    angle, scale = rng.uniform(-np.pi, np.pi), 0.2 * 2 ** rng.uniform(0, 3)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = rng.uniform(0, image.shape[1::-1])
    points = (rng.normal(face_points(), 3) - (110, 130)) @ turn.T + middle
    assert_is_skimage(align_face(image, points), image, points)


def test_border_is_grey_128(photograph: np.ndarray) -> None:
    points = face_points() - (110, 130) + (5, 5)  # a face in the upper left corner
    aligned = align_face(photograph, points)
    assert (aligned.image[0] == 128).all() and (aligned.image[:, 0] == 128).all()
    assert_is_skimage(aligned, photograph, points)


def test_an_image_of_one_pixel() -> None:
    image = np.full((1, 1, 3), 200, np.uint8)
    points = face_points(left=(-0.6, 0), right=(0.6, 0), nose=(0, 0), mouth=((-0.5, 1), (0.5, 1)))
    assert_is_skimage(align_face(image, points), image, points)


def test_greyscale_and_views(photograph: np.ndarray, face: Face) -> None:
    grey = align_face(photograph[..., 0], face.landmarks).image
    np.testing.assert_array_equal(grey, np.repeat(grey[..., :1], 3, axis=2))
    expected = align_face(photograph, face.landmarks).image
    np.testing.assert_array_equal(align_face(np.asfortranarray(photograph), face.landmarks).image, expected)
    assert expected.flags.c_contiguous and expected.dtype == np.uint8 and expected.shape == (200, 200, 3)


def test_one_based_landmarks(photograph: np.ndarray, face: Face) -> None:
    aligned = align_face(photograph, landmarks_49(face.landmarks68 + 1, one_based=True))
    np.testing.assert_array_equal(aligned.image, align_face(photograph, face.landmarks).image)


NAN = np.where(np.arange(98).reshape(49, 2) == 51, np.nan, face_points())
LINE = np.outer(np.linspace(10, 200, 49), [1.0, 0.5])
DEGENERATE = {
    "nan": (NAN, "must be finite"),
    "infinite": (np.where(np.isnan(NAN), np.inf, NAN), "must be finite"),
    "identical": (np.full((49, 2), 100.0), "both eyes at one place, 0 pixels apart"),
    "eyes coincide": (face_points(left=(110, 100), right=(110, 100)), "both eyes at one place"),
    "fractions": (face_points() / 300, "both eyes at one place, 0.2 pixels apart; is their unit pixels"),
    "collinear": (LINE, "all lie on one line"),
    "mouth on the eye line": (face_points(nose=(100, 100), mouth=((90, 100), (130, 100))), "one line"),
    "eyes exchanged": (face_points(left=(140, 100), right=(80, 100)), "mouth above the eyes: left and right"),
    "y upward": (face_points() * [1, -1] + [0, 300], "mouth above the eyes"),
    "outside": (face_points() + 1000, "outside the image of 300 x 280 pixels"),
    "one far away": (face_points(nose=(110, 1e9)), "outside the image"),
    "one at 1e300": (face_points(mouth=((90, 170), (1e300, 170))), "outside the image"),
    "68 points": (np.ones((68, 2)), "landmarks_49 converts 68 and 66 points"),
    "two faces": (np.stack([face_points(), face_points()]), r"one face, shape \(49, 2\), got \(2, 49, 2\)"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("points", "message"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_landmarks(points: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_face(np.zeros((280, 300, 3), np.uint8), points)


def test_a_face_upside_down_is_a_face() -> None:
    """Both eyes exchanged *and* the mouth above them is a head on its head."""
    points = 220 - face_points()
    aligned = align_face(np.zeros((300, 300, 3), np.uint8), points).landmarks
    assert (
        aligned[31, 1] > eye_centers(aligned)[0, 1]
        and eye_centers(aligned)[0, 0] < eye_centers(aligned)[1, 0]
    )


def test_bad_images_and_sizes() -> None:
    with pytest.raises(TypeError, match="image must be uint8"):
        align_face(np.zeros((300, 300, 3)), face_points())
    with pytest.raises(ValueError, match="channels must come last"):
        align_face(np.zeros((3, 300, 300), np.uint8), face_points())
    with pytest.raises(ValueError, match="size must be at least 2 pixels, got 1"):
        align_face(np.zeros((300, 300, 3), np.uint8), face_points(), size=1)


@pytest.mark.parametrize(("size", "start"), [(176, 12), (192, 4), (200, 0), (199, 0), (1, 99)])
def test_crop(photograph: np.ndarray, face: Face, size: int, start: int) -> None:
    aligned = align_face(photograph, face.landmarks)
    crop = crop_face(aligned, size)
    np.testing.assert_array_equal(crop.image, aligned.image[start : start + size, start : start + size])
    np.testing.assert_array_equal(crop.landmarks, aligned.landmarks - start)
    expected = transform.matrix_transform(face.landmarks, np.vstack([crop.matrix, [0, 0, 1]]))
    np.testing.assert_allclose(crop.landmarks, expected, atol=1e-9)
    assert crop.image.flags.c_contiguous


@pytest.mark.parametrize("size", [0, -1, 201])
def test_crop_of_another_size(photograph: np.ndarray, face: Face, size: int) -> None:
    with pytest.raises(ValueError, match=rf"size must be from 1 to 200, the aligned face's own, got {size}"):
        crop_face(align_face(photograph, face.landmarks), size)
