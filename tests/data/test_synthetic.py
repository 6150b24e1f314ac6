"""Synthetic faces: AUs are seen where they belong, rates and onsets are as asked for, trees are read."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from aufast.aus import AU_NAMES, AU_SETS, OCCURRENCE_RATES
from aufast.data import FOLDS, check_dataset, read_bp4d, read_disfa, synthetic
from aufast.data.canvas import Canvas, Placement
from aufast.data.synthetic import Recipe, draw_video, hidden_aus, subject_names, synthesize
from aufast.data.synthetic_face import NEUTRAL, View, draw_identity, face_landmarks, render
from aufast.data.synthetic_motion import draw_motion, mixing, rates_of
from aufast.faces import MIRROR_49, align_face, load_image

AUS = list(AU_NAMES)
VIEW = View(Placement(0.8, 0.0, 100, 104))
GREY = np.full((200, 200, 3), 150, np.float32)


@pytest.fixture(scope="module")
def identity():
    return draw_identity(np.random.default_rng(0))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(subjects=3, videos=1, frames=40, seed=4)
    return synthesize(tmp_path_factory.mktemp("synthetic") / "bp4d", recipe)


# ---- the rasteriser ------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_disk_and_band_cover_their_area(angle: float) -> None:
    canvas = Canvas(100, Placement(1.5, angle, 50, 50))
    _, cover = canvas.disk(np.zeros(2), 10)
    assert cover.sum() == pytest.approx(np.pi * 15**2, rel=0.01)
    upper = np.array([(-12.0, -4.0), (0.0, -8.0), (12.0, -4.0)])
    _, cover = canvas.between(upper, -upper[::1] * (-1, 1))
    assert cover.sum() == pytest.approx(1.5**2 * 24 * 12, rel=0.03)
    assert cover.min() >= 0 and cover.max() <= 1


def test_drawing_outside_the_picture_changes_nothing() -> None:
    canvas = Canvas(50, Placement(1, 0, 500, 500))
    canvas.spot(np.zeros(2), (5, 5), 1.0)
    canvas.fold(np.array([(0.0, 0.0), (9.0, 0.0)]), 2, 1.0)
    canvas.line(np.array([(0.0, 0.0), (9.0, 0.0)]), 2, (255, 0, 0))
    canvas.blend(*canvas.disk(np.zeros(2), 5), (255, 0, 0))
    assert not canvas.shade.any() and not canvas.pixels.any()


def test_a_line_has_its_width_and_length() -> None:
    canvas = Canvas(60, Placement(1, 0.3, 30, 30))
    canvas.line(np.array([(-20.0, 0.0), (0.0, 0.0), (20.0, 0.0)]), 3, (1, 1, 1))
    assert canvas.pixels[0].sum() == pytest.approx(3 * 40 + np.pi * 1.5**2, rel=0.03)


# ---- the face ------------------------------------------------------------------------------------


def test_the_neutral_face_is_its_own_mirror_image() -> None:
    np.testing.assert_array_equal(NEUTRAL, NEUTRAL[list(MIRROR_49)] * (-1, 1))


# Where each AU must show, as a box of the face's frame: left, top, right, bottom.
REGIONS = {
    **dict.fromkeys((1, 2, 4), (-75, -95, 75, -30)),
    **dict.fromkeys((6, 7), (-75, -55, 75, 25)),
    9: (-35, -60, 35, 40),
    **dict.fromkeys((10, 12, 14, 15, 17, 23, 24, 25), (-70, -10, 70, 95)),
    26: (-85, -10, 85, 115),  # the jaw's outline too
}


@pytest.mark.parametrize("au", AUS)
def test_each_au_shows_where_it_belongs(identity, au: int) -> None:
    neutral, _ = render(identity, {}, VIEW, GREY)
    picture, _ = render(identity, {au: 1.0}, VIEW, GREY)
    difference = np.abs(picture - neutral).mean(axis=-1)
    left, top, right, bottom = REGIONS[au]
    x1, y1 = VIEW.placement.to_image(np.array([left, top])).astype(int)
    x2, y2 = VIEW.placement.to_image(np.array([right, bottom])).astype(int)
    inside = difference[y1:y2, x1:x2].sum()
    assert (difference > 12).sum() > 60  # a person sees it: that many pixels, by that many grey levels
    assert inside > 0.95 * difference.sum()


def test_every_pair_of_aus_looks_different(identity) -> None:
    pictures = [render(identity, {au: 1.0}, VIEW, GREY)[0] for au in AUS]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert (np.abs(first - second).mean(axis=-1) > 12).sum() > 60


def test_strength_is_gradual(identity) -> None:
    neutral, _ = render(identity, {}, VIEW, GREY)
    for au in AUS:
        changes = [
            np.abs(render(identity, {au: s}, VIEW, GREY)[0] - neutral).sum() for s in (0.25, 0.5, 0.75, 1.0)
        ]
        assert np.all(np.diff(changes) > 0)


def test_landmarks_move_as_the_coding_manual_says(identity) -> None:
    neutral = face_landmarks(identity, {})

    def moved(au: int) -> np.ndarray:
        return face_landmarks(identity, {au: 1.0}) - neutral

    up, down = -1, 1
    for au, point, axis, sign in [
        (1, 4, 1, up), (2, 1, 1, up), (4, 4, 1, down), (4, 4, 0, 1), (7, 24, 1, up), (9, 14, 1, up),
        (10, 34, 1, up), (12, 31, 1, up), (12, 31, 0, -1), (15, 31, 1, down), (17, 40, 1, up), (23, 31, 0, 1),
        (25, 47, 1, down), (26, 40, 1, down),
    ]:  # fmt: skip
        assert sign * moved(au)[point, axis] > 1, (au, point)
    lips = [face_landmarks(identity, {au: 1.0})[[34, 40], 1] for au in (24,)]
    assert np.ptp(lips[0]) < 0.6 * np.ptp(neutral[[34, 40], 1])
    # Pressed lips stay shut whatever else would part them.
    shut = face_landmarks(identity, {24: 1.0, 25: 1.0, 26: 1.0})
    assert shut[47, 1] - shut[44, 1] < 1


def test_any_mixture_keeps_lips_and_lids_in_order() -> None:
    generator = np.random.default_rng(3)
    for seed in range(200):
        person = draw_identity(np.random.default_rng(seed % 20))
        strengths = dict(zip(AUS, generator.uniform(0, 1, 15) * generator.integers(0, 2, 15), strict=True))
        points = face_landmarks(person, strengths, blink=float(generator.uniform(0, 1)))
        assert (points[[48, 47, 46], 1] >= points[[43, 44, 45], 1]).all()
        assert (points[[40], 1] > points[[47], 1]).all() and (points[[34], 1] < points[[44], 1]).all()
        assert (points[[24, 23, 30, 29], 1] >= points[[20, 21, 26, 27], 1]).all()


def test_landmarks_lie_on_the_drawn_features(identity) -> None:
    """The mouth's corners and the eyes are where the picture changes when only they do."""
    view = View(Placement(0.8, 0.1, 98, 103), yaw=0.08, pitch=-0.05)
    shut, _ = render(identity, {}, View(view.placement, view.yaw, view.pitch, blink=1.0), GREY)
    wide, points = render(identity, {}, view, GREY)
    changed = np.argwhere(np.abs(shut - wide).mean(axis=-1) > 30)[:, ::-1]  # x, y
    for eye in (slice(19, 25), slice(25, 31)):
        center = points[eye].mean(axis=0)
        near = changed[np.hypot(*(changed - center).T) < 15]
        assert np.hypot(*(near.mean(axis=0) - center)) < 2.5


def test_a_blink_is_no_au(identity) -> None:
    open_, shut = (face_landmarks(identity, {}, blink) for blink in (0.0, 1.0))
    assert (shut[[20, 21, 26, 27], 1] > open_[[20, 21, 26, 27], 1] + 4).all()
    np.testing.assert_array_equal(np.delete(shut, [20, 21, 26, 27], 0), np.delete(open_, [20, 21, 26, 27], 0))


# ---- motion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["bp4d", "disfa"])
def test_rates_are_the_published_ones(dataset: str) -> None:
    generator = np.random.default_rng(0)
    rates = rates_of(dataset)
    occurs = np.concatenate([
        draw_motion(generator, 60, rates, generator.normal(size=15)).occurs for _ in range(1500)
    ])  # fmt: skip
    for au, percent in OCCURRENCE_RATES[dataset].items():
        assert 100 * occurs[:, AUS.index(au)].mean() == pytest.approx(percent, abs=2.5)
    still = [au for au in AUS if au not in rates]
    assert not occurs[:, [AUS.index(au) for au in still]].any()


def test_aus_that_go_together_do() -> None:
    generator = np.random.default_rng(1)
    rates = rates_of("bp4d")
    occurs = np.concatenate([
        draw_motion(generator, 60, rates, generator.normal(size=15)).occurs for _ in range(500)
    ])  # fmt: skip

    def given(first: int, second: int) -> float:
        return occurs[occurs[:, AUS.index(second)], AUS.index(first)].mean()

    assert given(2, 1) > 0.5 and given(6, 12) > 0.65 and given(12, 6) > 0.7
    assert given(12, 15) < occurs[:, AUS.index(12)].mean()
    assert not (occurs[:, AUS.index(24)] & occurs[:, AUS.index(25)]).mean() > 0.03


def test_correlations_are_possible() -> None:
    for name in ("bp4d", "disfa", "affwild2", "gft"):
        factor = mixing(AU_SETS[name])
        np.testing.assert_allclose(np.diag(factor @ factor.T), 1)


def test_onset_apex_offset() -> None:
    """A label changes where the strength is about half of the apex, which is reached over some frames."""
    generator = np.random.default_rng(2)
    motion = draw_motion(generator, 2000, rates_of("bp4d"), np.zeros(15))
    column = AUS.index(12)
    strength, occurs = motion.strength[:, column], motion.occurs[:, column]
    assert np.abs(np.diff(strength)).max() < 0.5
    changes = np.flatnonzero(np.diff(occurs.astype(int)))
    middle = (strength[changes] + strength[changes + 1]) / 2
    assert len(changes) > 20 and ((middle > 0.15) & (middle < 0.65)).all()
    assert strength[occurs].mean() > 0.6 and strength[~occurs].mean() < 0.1


# ---- trees ---------------------------------------------------------------------------------------


def test_subjects_come_from_all_parts() -> None:
    for layout in ("bp4d", "disfa"):
        names = subject_names(Recipe(layout=layout, subjects=7, videos=1))
        assert [sum(name in part for name in names) for part in FOLDS[layout]] == [3, 2, 2]
    assert len(set(subject_names(Recipe(subjects=41)))) == 41


def test_tree_is_read_and_aligned(tree: Path) -> None:
    videos = read_bp4d(tree)
    assert [video.name for video in videos] == ["F001_T1", "F003_T1", "F004_T1"]
    for k, video in enumerate(videos):  # of three subjects, the order of names is the recipe's
        assert video.synthetic and len(video) == 40 and video.notes == ()
        points = video.landmarks(video.numbers)
        aligned = align_face(load_image(video.images[0]), points[0])
        eyes = aligned.landmarks[19:25].mean(0), aligned.landmarks[25:31].mean(0)
        assert abs(eyes[0][1] - eyes[1][1]) < 1e-6 and 55 < eyes[1][0] - eyes[0][0] < 85
        motion, pairs = draw_video(Recipe(subjects=3, videos=1, frames=40, seed=4), k, 0)
        frames, drawn = zip(*pairs, strict=True)
        np.testing.assert_allclose(points, drawn, atol=0.006)
        assert np.abs(load_image(video.images[7]).astype(int) - frames[7]).mean() < 4  # JPEG
        columns = [AUS.index(au) for au in AU_SETS["bp4d"]]
        np.testing.assert_array_equal(video.labels, motion.occurs[:, columns] & video.mask)
        for row, place in enumerate(motion.occluder):
            hidden = set(np.array(AU_SETS["bp4d"])[~video.mask[row]].tolist())
            assert hidden == set(hidden_aus(place)) & set(AU_SETS["bp4d"])


def test_every_person_and_video_moves_differently() -> None:
    recipe = Recipe(subjects=2, frames=30, size=64)
    places = [(0, 0), (0, 1), (1, 0)]
    motions = [draw_video(recipe, *place)[0] for place in places]
    for i in range(3):
        for j in range(i):
            assert np.abs(motions[i].strength - motions[j].strength).max() > 0.3
            assert np.abs(motions[i].yaw - motions[j].yaw).max() > 0.02


def test_the_tree_says_synthetic(tree: Path) -> None:
    about = json.loads((tree / "SYNTHETIC.json").read_text())
    assert about["synthetic"] is True and about["seed"] == 4
    assert check_dataset(tree).text().startswith("synthetic bp4d")


def test_something_before_the_mouth_is_not_coded() -> None:
    motions = [draw_video(Recipe(subjects=1, frames=60, seed=seed, size=64), 0, 0)[0] for seed in range(8)]
    covered = [motion for motion in motions if not np.isnan(motion.occluder).all()]
    assert covered and all(any(hidden_aus(place) for place in motion.occluder) for motion in covered)
    assert hidden_aus(np.array([np.nan, np.nan])) == () and hidden_aus(np.array([120.0, 40.0])) == ()
    assert 12 in hidden_aus(np.array([8.0, 44.0])) and 1 in hidden_aus(np.array([38.0, -45.0]))


def test_disfa_tree(tmp_path: Path) -> None:
    root = synthesize(tmp_path / "disfa", Recipe(layout="disfa", subjects=2, videos=1, frames=30, size=96))
    videos = read_disfa(root)
    assert [len(video) for video in videos] == [30, 30] and videos[0].synthetic
    motion = draw_video(Recipe(layout="disfa", subjects=2, videos=1, frames=30, size=96), 0, 0)[0]
    columns = [AUS.index(au) for au in AU_SETS["disfa"]]
    np.testing.assert_array_equal(videos[0].labels, motion.occurs[:, columns])
    assert load_image(videos[1].images[0]).shape == (96, 96, 3)


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    recipe = Recipe(subjects=2, videos=1, frames=4, size=80, seed=9)
    trees = [synthesize(tmp_path / str(workers), recipe, workers) for workers in (1, 2)]
    files = [{p.relative_to(t): p.read_bytes() for p in t.rglob("*") if p.is_file()} for t in trees]
    assert files[0] == files[1] and len(files[0]) == 2 * (4 + 2) + 1


def test_nothing_appears_unless_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aufast.data import synthetic

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(synthetic, "write_landmarks", full)
    with pytest.raises(OSError, match=f"{tmp_path}/new: cannot be written: No space left on device"):
        synthesize(tmp_path / "new", Recipe(subjects=1, videos=1, frames=1, size=64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layout": "ck"}, "layout must be one of bp4d, disfa"),
        ({"subjects": 42}, "subjects must be from 1 to 41, got 42"),
        ({"layout": "disfa", "videos": 2}, "videos must be from 1 to 1"),
        ({"size": 10}, "size must be from 64"),
    ],
)
def test_recipe_refuses(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


def test_synthesize_refuses_a_full_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        synthesize(tmp_path)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        synthesize(tmp_path / "new", workers=0)


def test_what_a_killed_drawing_leaves_is_gone_after_the_next(tmp_path: Path, monkeypatch) -> None:
    recipe = Recipe(subjects=1, videos=1, frames=2, size=96)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(synthetic.json, "dumps", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        synthesize(tmp_path / "data", recipe)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".data.") and any(left.iterdir())
    synthesize(tmp_path / "data", recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
