"""AU centres against the published table in dlib's numbering, and the attention maps against a slow loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aufast.aus import AU_NAMES, AU_SETS
from aufast.faces import attention_targets, au_centers, landmarks_49, mirror_landmarks

# AU: the two points by dlib's 68-point index, and the shift down in units of |x39 - x42|. It is another
# numbering than that of the library's own table, so a slip in either shows.
DLIB_TABLE = {
    1: (21, 22, -1 / 2),
    2: (18, 25, -1 / 3),
    4: (19, 24, 1 / 3),
    6: (41, 46, 1),
    7: (38, 43, 0),
    9: (32, 34, -1 / 2),
    10: (61, 63, 0),
    12: (48, 54, 0),
    14: (48, 54, 0),
    15: (48, 54, 0),
    17: (58, 56, 1 / 2),
    23: (51, 57, 0),
    24: (51, 57, 0),
    25: (51, 57, 0),
    26: (58, 56, 1 / 2),
}
DLIB_HALVES = DLIB_TABLE | dict.fromkeys((23, 24, 25), (50, 52, 0))
ALL_AUS = tuple(AU_NAMES)


def by_hand(points_68: np.ndarray, table: dict, aus: tuple[int, ...]) -> np.ndarray:
    s = abs(points_68[39, 0] - points_68[42, 0])
    return np.array([[points_68[table[au][k]] + [0, table[au][2] * s] for au in aus] for k in range(2)])


@pytest.fixture
def random_68() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 200, (68, 2))


@pytest.mark.parametrize("aus", [*AU_SETS.values(), ALL_AUS], ids=[*AU_SETS, "all"])
@pytest.mark.parametrize(("scheme", "table"), [("attention", DLIB_TABLE), ("margl", DLIB_HALVES)])
def test_table(random_68: np.ndarray, aus: tuple[int, ...], scheme: str, table: dict) -> None:
    centers = au_centers(landmarks_49(random_68), aus, scheme)
    assert centers.shape == (2, len(aus), 2)
    np.testing.assert_allclose(centers, by_hand(random_68, table, aus), atol=1e-12)


def test_the_order_asked_for_is_kept(random_68: np.ndarray) -> None:
    points = landmarks_49(random_68)
    np.testing.assert_array_equal(au_centers(points, [26, 1, 26]), au_centers(points, [1, 26])[:, [1, 0, 1]])
    assert au_centers(points, []).shape == (2, 0, 2)


@pytest.mark.parametrize("scheme", ["margl", "attention"])
def test_batches_and_torch(scheme: str) -> None:
    points = np.random.default_rng(1).uniform(0, 200, (3, 4, 49, 2))
    centers = au_centers(points, ALL_AUS, scheme)
    assert centers.shape == (3, 4, 2, 15, 2)
    np.testing.assert_array_equal(centers[2, 1], au_centers(points[2, 1], ALL_AUS, scheme))
    tensor = torch.tensor(points, requires_grad=True)
    result = au_centers(tensor, ALL_AUS, scheme)
    np.testing.assert_array_equal(result.detach().numpy(), centers)
    result.sum().backward()
    assert torch.isfinite(tensor.grad).all()


def test_float32_stays_and_integers_become_float64() -> None:
    points = np.arange(98).reshape(49, 2)
    assert au_centers(points, [1]).dtype == np.float64
    assert au_centers(points.astype(np.float32), [1]).dtype == np.float32
    assert au_centers(torch.from_numpy(points), [1]).dtype == torch.float64


def test_margl_centres_lie_in_their_halves(face) -> None:
    left, right = au_centers(face.landmarks, ALL_AUS)
    middle = face.landmarks[[10, 11, 12, 13, 16], 0].mean()  # the nose
    assert (left[:, 0] < middle).all() and (right[:, 0] > middle).all()


def test_mirrored_face_has_the_other_halfs_centres() -> None:
    points = np.random.default_rng(2).uniform(0, 176, (49, 2))
    left, right = au_centers(points, ALL_AUS)
    mirrored = np.stack([right, left])
    mirrored[..., 0] = 175 - mirrored[..., 0]
    np.testing.assert_allclose(au_centers(mirror_landmarks(points, 176), ALL_AUS), mirrored, atol=1e-10)


def test_centres_of_the_photograph_are_on_the_parts_their_names_say(face) -> None:
    centers = dict(zip(ALL_AUS, au_centers(face.landmarks, ALL_AUS).mean(axis=0)[:, 1], strict=True))  # y
    points = face.landmarks[:, 1]
    brows, eyes, nose_tip, lip_top, lip_bottom = (
        points[:10],
        points[19:31],
        points[13],
        points[34],
        points[40],
    )
    assert centers[1] < brows.min() and centers[2] < brows.max()  # forehead, above the brows
    assert brows.min() < centers[4] < eyes.max()
    assert eyes.max() < centers[6] < lip_bottom  # cheeks
    assert eyes.min() <= centers[7] <= eyes.max()
    assert eyes.max() < centers[9] < nose_tip  # nose
    for au in (10, 12, 14, 15, 23, 24, 25):
        assert nose_tip < centers[au] < lip_bottom
    assert lip_top - 2 <= centers[23] <= lip_top + 2
    assert centers[17] > lip_bottom and centers[26] > lip_bottom  # chin


def test_unknown_aus_are_named() -> None:
    with pytest.raises(ValueError, match=r"AU 5, 28 has no centre; known are 1, 2, 4, 6, 7, 9, 10, 12"):
        au_centers(np.zeros((49, 2)), [1, 5, 28])


def test_bad_input() -> None:
    points = np.ones((49, 2))
    with pytest.raises(ValueError, match="scheme must be one of 'attention', 'margl', got 'jaa'"):
        au_centers(points, [1], "jaa")
    with pytest.raises(ValueError, match=r"49 points.*got \(68, 2\)"):
        au_centers(np.ones((68, 2)), [1])
    for bad in (np.nan, np.inf, -np.inf):
        points[48, 1] = bad
        for kind in (np.array, torch.tensor):
            with pytest.raises(ValueError, match="landmarks must be finite"):
                au_centers(kind(points), [1])


def slow_targets(centers: np.ndarray, size: int, image_size: int, delta: float) -> np.ndarray:
    maps = np.zeros((centers.shape[1], size, size))
    for j in range(centers.shape[1]):
        for b in range(size):
            for a in range(size):
                for x, y in centers[:, j]:
                    a0 = (x + 0.5) * size / image_size - 0.5
                    b0 = (y + 0.5) * size / image_size - 0.5
                    value = math.exp(-((a - a0) ** 2 + (b - b0) ** 2) / (2 * delta**2))
                    maps[j, b, a] = max(maps[j, b, a], value)
    return maps


@pytest.mark.parametrize(
    ("size", "image_size", "delta"), [(44, 176, 3.0), (11, 176, 1.0), (16, 16, 2.5)], ids=str
)
def test_attention_targets_against_a_loop(size: int, image_size: int, delta: float) -> None:
    centers = np.random.default_rng(3).uniform(-10, image_size + 10, (2, 3, 2))
    targets = attention_targets(centers, size, image_size, delta)
    assert targets.shape == (3, size, size) and targets.dtype == torch.float32
    np.testing.assert_allclose(targets.numpy(), slow_targets(centers, size, image_size, delta), atol=2e-6)


def test_attention_is_one_at_a_centre_and_falls_by_delta() -> None:
    # Cell (row 10, column 20) covers pixels 40-43 down and 80-83 across.
    centers = np.array([[[81.5, 41.5]], [[81.5, 41.5]]])
    (target,) = attention_targets(centers)
    assert target[10, 20] == 1 and target.max() == 1 and target.min() >= 0
    assert target[10, 23].item() == pytest.approx(math.exp(-0.5))
    assert target[13, 20].item() == pytest.approx(math.exp(-0.5))


def test_attention_of_a_mirrored_face_is_the_mirrored_attention() -> None:
    points = np.random.default_rng(4).uniform(0, 176, (49, 2))
    targets = attention_targets(au_centers(points, ALL_AUS, "attention"))
    mirrored = attention_targets(au_centers(mirror_landmarks(points, 176), ALL_AUS, "attention"))
    torch.testing.assert_close(mirrored, targets.flip(-1), atol=1e-5, rtol=0)


def test_attention_batches_and_torch() -> None:
    centers = (
        torch.rand(2, 5, 2, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 176
    )
    targets = attention_targets(centers)
    assert targets.shape == (2, 5, 12, 44, 44)
    torch.testing.assert_close(targets[1, 3], attention_targets(centers[1, 3].numpy()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"centers": np.zeros((3, 12, 2))}, r"shape \(\.\.\., 2, m, 2\), got \(3, 12, 2\)"),
        ({"centers": np.zeros((12, 2))}, r"got \(12, 2\)"),
        ({"centers": np.full((2, 12, 2), np.nan)}, "centers must be finite"),
        ({"delta": 0.0}, "must be positive"),
        ({"delta": float("nan")}, "must be positive"),
        ({"size": 0}, "must be positive"),
        ({"image_size": -1}, "must be positive"),
    ],
    ids=["three centres", "no pair", "nan", "delta 0", "delta nan", "size 0", "image_size -1"],
)
def test_attention_bad_input(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_targets(**({"centers": np.zeros((2, 12, 2))} | changed))
