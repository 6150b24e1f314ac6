"""Landmark schemes and the mirror map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aufast.faces import MIRROR_49, landmarks_49, mirror_landmarks

# Published 1-based mirror map of the 49-point scheme.
MIRROR_1_BASED = """10 9 8 7 6 5 4 3 2 1  11 12 13 14  19 18 17 16 15  29 28 27 26 31 30  23 22 21 20 25 24
    38 37 36 35 34 33 32  43 42 41 40 39  46 45 44  49 48 47"""


def points(count: int, *batch: int, dtype=np.float64) -> np.ndarray:
    """Point i is (i, 100 + i), so that a result names the points it was made of."""
    index = np.arange(count, dtype=dtype)
    return np.broadcast_to(np.stack([index, 100 + index], axis=-1), (*batch, count, 2)).copy()


def test_68_points_lose_jaw_and_inner_mouth_corners() -> None:
    kept = landmarks_49(points(68))[:, 0].astype(int).tolist()
    assert kept == [i for i in range(68) if i > 16 and i not in (60, 64)]


def test_66_points_lose_jaw() -> None:
    assert landmarks_49(points(66))[:, 0].tolist() == list(range(17, 66))


def test_49_points_stay() -> None:
    np.testing.assert_array_equal(landmarks_49(points(49)), points(49))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_integers_become_float64(dtype) -> None:
    assert landmarks_49(points(68, dtype=dtype)).dtype == np.float64


def test_float32_stays_and_the_input_is_not_shared() -> None:
    given = points(49, dtype=np.float32)
    result = landmarks_49(given)
    result[:] = -1
    assert result.dtype == np.float32
    np.testing.assert_array_equal(given, points(49, dtype=np.float32))


@pytest.mark.parametrize("count", [68, 66, 49])
def test_batches_and_torch(count: int) -> None:
    given = points(count, 3, 5)
    result = landmarks_49(torch.from_numpy(given))
    assert isinstance(result, torch.Tensor) and result.shape == (3, 5, 49, 2)
    np.testing.assert_array_equal(result.numpy(), landmarks_49(given))


def test_one_based_lists() -> None:
    np.testing.assert_array_equal(landmarks_49(points(66) + 1, one_based=True), landmarks_49(points(66)))


def test_a_missing_point_stays_missing() -> None:
    given = points(49)
    given[7] = np.nan
    assert np.isnan(landmarks_49(given)).sum() == 2


@pytest.mark.parametrize("count", [0, 5, 48, 50, 51, 67, 98])
def test_other_numbers_of_points(count: int) -> None:
    with pytest.raises(ValueError, match=rf"68, 66 or 49 points, got {count} "):
        landmarks_49(points(count))


def test_a_flat_row_of_98_numbers() -> None:
    with pytest.raises(ValueError, match=r"shape \(\.\.\., n, 2\).*got \(98,\)"):
        landmarks_49(np.zeros(98))


def test_rows_of_49_and_68_points_mixed() -> None:
    with pytest.raises(ValueError, match="same number of points"):
        landmarks_49([points(49), points(68)])


@pytest.mark.parametrize(
    "bad", [None, [["a", "b"]] * 49, np.zeros((49, 2), complex)], ids=["None", "text", "complex"]
)
def test_not_numbers(bad) -> None:
    with pytest.raises(TypeError, match="landmarks must be numbers, got dtype"):
        landmarks_49(bad)


def test_mirror_map_is_the_published_one() -> None:
    assert [i + 1 for i in MIRROR_49] == [int(i) for i in MIRROR_1_BASED.split()]


def test_mirror_map_is_an_involution() -> None:
    assert sorted(MIRROR_49) == list(range(49))
    assert [MIRROR_49[MIRROR_49[i]] for i in range(49)] == list(range(49))


def test_midline_points_map_to_themselves() -> None:
    # Nose bridge and tip, the middle of the nostrils, and the middles of the four lip edges.
    assert [i for i in range(49) if MIRROR_49[i] == i] == [10, 11, 12, 13, 16, 34, 40, 44, 47]


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_mirroring_twice_gives_the_points_back(kind) -> None:
    given = kind(np.random.default_rng(0).uniform(0, 176, (4, 49, 2)))
    before = np.asarray(given).copy()
    once = mirror_landmarks(given, 176)
    assert type(once) is type(given)
    np.testing.assert_allclose(np.asarray(mirror_landmarks(once, 176)), before, atol=1e-12)
    np.testing.assert_array_equal(np.asarray(given), before)  # the input is left alone


def test_mirrored_points_lie_on_the_mirrored_image() -> None:
    """A pixel marked at each landmark of an image is found at the mirrored landmark of the mirrored image."""
    positions = np.random.default_rng(1).permutation(30 * 20)[:49]
    landmarks = np.stack(np.divmod(positions, 20), axis=-1)  # x below 30, y below 20
    image = np.full((20, 30), -1)
    image[landmarks[:, 1], landmarks[:, 0]] = np.arange(49)
    x, y = mirror_landmarks(landmarks, 30).astype(int).T
    np.testing.assert_array_equal(image[:, ::-1][y, x], MIRROR_49)


def test_the_photographs_landmarks_keep_left_and_right(face) -> None:
    mirrored = mirror_landmarks(face.landmarks, 512)
    for points_49 in (face.landmarks, mirrored):
        for left, right in [
            (0, 9),
            (4, 5),
            (14, 18),
            (19, 28),
            (22, 25),
            (24, 29),
            (31, 37),
            (41, 39),
            (43, 45),
        ]:
            assert points_49[left, 0] < points_49[right, 0]


def test_mirror_bad_input() -> None:
    with pytest.raises(ValueError, match=r"49 points.*got \(68, 2\).*landmarks_49 converts"):
        mirror_landmarks(points(68), 176)
    with pytest.raises(ValueError, match="width must be at least 1 pixel, got 0"):
        mirror_landmarks(points(49), 0)
