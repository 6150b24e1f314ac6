"""Splits never share a subject, and say which name does not fit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from aufast.data import FOLDS, check_disjoint, fold, official_split, subject_parts


@dataclass(frozen=True)
class Recording:
    subject: str
    name: str = ""
    group: str = ""


ALL = [Recording(s, f"{s}_T{k}") for part in FOLDS["bp4d"] for s in part for k in (1, 2)]


def test_published_parts_are_whole() -> None:
    bp4d = {f"F{k:03d}" for k in range(1, 24)} | {f"M{k:03d}" for k in range(1, 19)}
    disfa = {f"SN{k:03d}" for k in range(1, 33)} - {f"SN{k:03d}" for k in (14, 15, 19, 20, 22)}
    for name, subjects, sizes in (("bp4d", bp4d, [14, 14, 13]), ("disfa", disfa, [9, 9, 9])):
        listed = [subject for part in FOLDS[name] for subject in part]
        assert set(listed) == subjects and len(listed) == len(subjects)
        assert [len(part) for part in FOLDS[name]] == sizes


@pytest.mark.parametrize("part", [1, 2, 3])
def test_fold_tests_one_part(part: int) -> None:
    train, test = fold(ALL, part, FOLDS["bp4d"])
    assert {v.subject for v in test} == set(FOLDS["bp4d"][part - 1])
    assert sorted(v.name for v in train + test) == sorted(v.name for v in ALL)


def test_fold_refuses() -> None:
    with pytest.raises(ValueError, match="test_part must be from 1 to 3, got 0"):
        fold(ALL, 0, FOLDS["bp4d"])
    with pytest.raises(ValueError, match="subject X is in no part"):
        fold([*ALL, Recording("X")], 1, FOLDS["bp4d"])
    with pytest.raises(ValueError, match="subject F001 is in part 1 and in part 2"):
        fold(ALL, 1, [("F001",), ("F001", "F002")])
    with pytest.raises(ValueError, match="nothing to train on: no recording fits when part 1"):
        fold([Recording("F001")], 1, FOLDS["bp4d"])


def test_official_split() -> None:
    videos = [
        Recording(s, f"v{s}", g)
        for s, g in (("a", "train"), ("b", "train"), ("c", "validation"), ("d", "test"))
    ]
    train, test = official_split(videos)
    assert [v.subject for v in train] == ["a", "b"] and [v.subject for v in test] == ["c"]
    train, test = official_split(videos, train=["va", "b"], test=["d"])
    assert [v.subject for v in train] == ["a", "b"] and [v.subject for v in test] == ["d"]
    with pytest.raises(ValueError, match="zz is neither a video nor a subject"):
        official_split(videos, train=["a"], test=["zz"])
    with pytest.raises(ValueError, match="nothing to test on"):
        official_split(videos, test="dev")
    with pytest.raises(ValueError, match="subject a is in training and in test"):
        official_split([*videos, Recording("a", "other", "validation")])


def test_disjoint_names_the_subject() -> None:
    check_disjoint(ALL[:2], ALL[2:4])
    with pytest.raises(ValueError, match=r"subject F001 is in training and in test \(2 such names in all\)"):
        check_disjoint(ALL[:4], ALL[:4])


def test_subject_parts_deal_all_subjects_out() -> None:
    parts = subject_parts(ALL, 3)
    assert sorted(s for part in parts for s in part) == sorted({v.subject for v in ALL})
    with pytest.raises(ValueError, match="count must be from 2 to 41"):
        subject_parts(ALL, 42)
