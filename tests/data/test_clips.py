"""Crops, mirrors and stretches of frames: pixels and landmarks move together, a clip moves as one."""

from __future__ import annotations

import numpy as np
import pytest

from aufast.data.clips import (
    AAR_CROPPING,
    MARGL_CROPPING,
    Cropping,
    runs,
    training_start,
    training_windows,
)
from aufast.faces import MIRROR_49


def marked(points: np.ndarray) -> np.ndarray:
    """A 200 x 200 image whose channels are its own x, y and a blot at every landmark."""
    y, x = np.indices((200, 200))
    image = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    for column, row in points.astype(int):
        image[row, column, 2] = 255
    return image


@pytest.fixture
def face() -> tuple[np.ndarray, np.ndarray]:
    points = np.random.default_rng(0).integers(40, 160, (49, 2)).astype(float)
    return marked(points), points


def test_the_test_crop_is_the_centre(face: tuple) -> None:
    for cropping, size, margin in ((AAR_CROPPING, 176, 12), (MARGL_CROPPING, 192, 4)):
        image, points = cropping(*face)
        np.testing.assert_array_equal(image, face[0][margin : margin + size, margin : margin + size])
        np.testing.assert_array_equal(points, face[1] - margin)
        assert image.is_contiguous() and points.dtype.is_floating_point


@pytest.mark.parametrize("seed", range(8))
def test_training_crop_moves_pixels_and_landmarks_together(face: tuple, seed: int) -> None:
    image, points = AAR_CROPPING(*face, np.random.default_rng(seed))
    image, points = image.numpy(), points.numpy().astype(int)
    assert image.shape == (176, 176, 3)
    assert (image[points[:, 1], points[:, 0], 2] == 255).all()  # every landmark on its blot
    # What lies under a point is the same landmark, or its mirror partner's.
    own, partner = face[1], face[1][list(MIRROR_49)]
    under = image[points[:, 1], points[:, 0], :2]
    mirrored = image[0, 0, 0] > image[0, -1, 0]
    np.testing.assert_array_equal(under, partner if mirrored else own)


def test_both_sides_and_all_places_occur(face: tuple) -> None:
    corners = [
        AAR_CROPPING(*face, np.random.default_rng(seed))[0][0, [0, -1], :2].tolist() for seed in range(300)
    ]
    mirrored = [a[0] > b[0] for a, b in corners]
    assert 100 < sum(mirrored) < 200
    lefts = {min(a[0], b[0]) for a, b in corners}
    assert lefts == set(range(25)) and {a[1] for a, _ in corners} == set(range(25))
    assert not any(
        Cropping(176, 176, 176, mirror=False)(*face, np.random.default_rng(seed))[0][0, 0, 0] > 24
        for seed in range(20)
    )


def test_a_clip_is_cut_as_one(face: tuple) -> None:
    image, points = face
    clip = np.repeat(image[None], 6, 0)
    for cropping in (AAR_CROPPING, MARGL_CROPPING):
        images, moved = cropping(clip, np.repeat(points[None], 6, 0), np.random.default_rng(3))
        alone, point = cropping(image, points, np.random.default_rng(3))
        assert images.shape == (6, cropping.size, cropping.size, 3)
        for k in range(6):
            np.testing.assert_array_equal(images[k], alone)
            np.testing.assert_array_equal(moved[k], point)


def test_resizing_moves_landmarks_with_the_pixels() -> None:
    y, x = np.indices((200, 200))
    ramp = np.stack([x, y, x], -1).astype(np.uint8)  # bilinear keeps a ramp a ramp
    points = np.random.default_rng(1).uniform(30, 170, (49, 2))
    for size in (64, 192):
        for seed in range(20):
            image, moved = Cropping(size, 184, 200, mirror=False)(ramp, points, np.random.default_rng(seed))
            for axis, line in ((0, image[size // 2, :, 0]), (1, image[:, size // 2, 1])):
                read = np.interp(moved[:, axis], np.arange(size), line)  # the ramp's value under each point
                inside = (moved[:, axis] > 0) & (moved[:, axis] < size - 1)
                assert np.abs(read - points[:, axis])[inside].max() < 0.51  # rounded to whole grey levels
    sides = set()
    for seed in range(40):
        image, _ = Cropping(192, 184, 200, mirror=False)(ramp, points, np.random.default_rng(seed))
        sides.add(int(image[0, -1, 0]) - int(image[0, 0, 0]))
    assert min(sides) <= 186 and max(sides) >= 197


def test_refuses_sides() -> None:
    with pytest.raises(ValueError, match="smallest <= largest"):
        Cropping(192, 200, 184)
    with pytest.raises(ValueError, match="a crop of 176 pixels does not fit a face of 100"):
        AAR_CROPPING(np.zeros((100, 100, 3), np.uint8), np.zeros((49, 2)))


def test_runs() -> None:
    numbers = np.array([1, 2, 3, 5, 6, 20, 21])
    assert runs(numbers, 0) == [(0, 3), (3, 5), (5, 7)]
    assert runs(numbers, 1) == [(0, 5), (5, 7)]
    assert runs(numbers, 13) == [(0, 7)]
    assert runs(numbers[:0], 0) == []
    with pytest.raises(ValueError, match="max_gap must be at least 0"):
        runs(numbers, -1)


@pytest.mark.parametrize("length", [1, 47, 48, 49, 95, 96, 500])
def test_training_windows_stay_inside_and_reach_every_frame(length: int) -> None:
    seen = set()
    for offset in np.linspace(0, 1, 200, endpoint=False):
        for k in range(training_windows(length, 48)):
            start = training_start(length, 48, k, offset)
            assert start >= 0 and (start + 48 <= length or (length < 48 and start == 0))
            seen.update(range(start, min(start + 48, length)))
    assert seen == set(range(length))
