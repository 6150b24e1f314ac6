"""Who is trained on and who is tested: subject-exclusive folds and official splits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

# The three parts of BP4D and DISFA that JAA-Net published and later papers kept.
FOLDS: dict[str, tuple[tuple[str, ...], ...]] = {
    name: tuple(tuple(part.split()) for part in parts)
    for name, parts in {
        "bp4d": (
            "F001 F002 F008 F009 F010 F016 F018 F023 M001 M004 M007 M008 M012 M014",
            "F003 F005 F011 F013 F020 F022 M002 M005 M010 M011 M013 M016 M017 M018",
            "F004 F006 F007 F012 F014 F015 F017 F019 F021 M003 M006 M009 M015",
        ),
        "disfa": (
            "SN001 SN002 SN009 SN010 SN016 SN026 SN027 SN030 SN032",
            "SN006 SN011 SN012 SN013 SN018 SN021 SN024 SN028 SN031",
            "SN003 SN004 SN005 SN007 SN008 SN017 SN023 SN025 SN029",
        ),
    }.items()
}


class Recording(Protocol):
    """What a split looks at: a `Video`, or one that is packed."""

    subject: str
    name: str
    group: str


Item = TypeVar("Item", bound=Recording)


def fold(
    videos: Sequence[Item], test_part: int, parts: Sequence[Collection[str]]
) -> tuple[list[Item], list[Item]]:
    """Train on all parts but one, test on that one.

    Args:
        videos: the recordings.
        test_part: the part that is tested, from 1. Papers number folds differently: ME-GraphAU's fold 1 tests
            part 3.
        parts: subjects of each part, such as `FOLDS["bp4d"]`.

    Returns:
        Training and test recordings, in the order given.

    Raises:
        ValueError: no such part, a subject in two parts or in none, or nothing to train or test on.
    """
    if not 1 <= test_part <= len(parts):
        raise ValueError(f"test_part must be from 1 to {len(parts)}, got {test_part}")
    place: dict[str, int] = {}
    for number, part in enumerate(parts, 1):
        for subject in part:
            if place.setdefault(subject, number) != number:
                raise ValueError(f"subject {subject} is in part {place[subject]} and in part {number}")
    if unplaced := sorted({video.subject for video in videos} - set(place)):
        raise ValueError(f"subject {unplaced[0]} is in no part" + _others(unplaced))
    train = [video for video in videos if place[video.subject] != test_part]
    test = [video for video in videos if place[video.subject] == test_part]
    return _checked(train, test, f"part {test_part}")


def official_split(
    videos: Sequence[Item], train: str | Collection[str] = "train", test: str | Collection[str] = "validation"
) -> tuple[list[Item], list[Item]]:
    """The data set's own split, by its groups or by lists of videos or subjects.

    Args:
        videos: the recordings.
        train, test: a group's name, or names of videos or subjects. GFT's test set is such a list.

    Returns:
        Training and test recordings, in the order given. Recordings in neither are left out.

    Raises:
        ValueError: a name in a list fits no recording, a subject is in both, or nothing is in one of them.
    """
    chosen = []
    for wanted in (train, test):
        if isinstance(wanted, str):
            chosen.append([video for video in videos if video.group == wanted])
            continue
        known = {name for video in videos for name in (video.name, video.subject)}
        if unknown := sorted(set(wanted) - known):
            raise ValueError(f"{unknown[0]} is neither a video nor a subject of the data" + _others(unknown))
        chosen.append([video for video in videos if video.name in wanted or video.subject in wanted])
    label = test if isinstance(test, str) else "the list of test names"
    return _checked(*chosen, label)


def subject_parts(videos: Sequence[Recording], count: int = 3) -> tuple[tuple[str, ...], ...]:
    """`count` parts where none are published: the subjects of `videos` by name, dealt out in turn."""
    subjects = sorted({video.subject for video in videos})
    if not 2 <= count <= len(subjects):
        raise ValueError(f"count must be from 2 to {len(subjects)}, the number of subjects, got {count}")
    return tuple(tuple(subjects[k::count]) for k in range(count))


def _checked(train: list[Item], test: list[Item], label: str) -> tuple[list[Item], list[Item]]:
    check_disjoint(train, test)
    if not train or not test:
        side = "test on" if train else "train on"
        raise ValueError(f"there is nothing to {side}: no recording fits when {label} is tested")
    return train, test


def check_disjoint(train: Sequence[Recording], test: Sequence[Recording]) -> None:
    """Refuse a subject that is in `train` and in `test`.

    Raises:
        ValueError: it names the subject.
    """
    if shared := sorted({video.subject for video in train} & {video.subject for video in test}):
        raise ValueError(f"subject {shared[0]} is in training and in test" + _others(shared))


def _others(names: Sequence[str]) -> str:
    return f" ({len(names)} such names in all)" if len(names) > 1 else ""
