"""What a data set on disk holds, what it lacks, and how often each AU occurs beside the published rates."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aufast.aus import OCCURRENCE_RATES
from aufast.data.affwild2 import read_affwild2
from aufast.data.bp4d import TASKS, read_bp4d
from aufast.data.disfa import read_disfa
from aufast.data.generic import read_table
from aufast.data.protocols import FOLDS
from aufast.data.records import Video, existing_folder, first_folder

_READERS = {"bp4d": read_bp4d, "disfa": read_disfa, "affwild2": read_affwild2, "table": read_table}
_SIGNS = {
    "bp4d": ("AUCoding",),
    "disfa": ("ActionUnit_Labels",),
    "affwild2": (
        "AU_Detection_Challenge",
        "AU_Set",
        "annotations/AU_Detection_Challenge",
        "annotations/AU_Set",
    ),
}


def detect_dataset(root: str | os.PathLike[str]) -> str:
    """Which data set lies in `root`: "bp4d", "disfa", "affwild2", or "table" for a JSON file.

    Raises:
        ValueError: none of them, or several.
    """
    if Path(root).suffix == ".json" and Path(root).is_file():
        return "table"
    root = existing_folder(root)
    found = [name for name, folders in _SIGNS.items() if first_folder(root, *folders)]
    if len(found) != 1:
        signs = ", ".join(f"{folders[0]} for {name}" for name, folders in _SIGNS.items())
        which = f"looks like {' and '.join(found)}" if found else "is no data set that is known"
        raise ValueError(f"{root} {which}; expected one of {signs}, or the JSON file of a table")
    return found[0]


def read_dataset(root: str | os.PathLike[str], dataset: str | None = None, **options: object) -> list[Video]:
    """Read whatever data set lies at `root`.

    Args:
        root: its folder, or the JSON file of a table.
        dataset: "bp4d", "disfa", "affwild2" or "table"; None looks.
        options: of that reader, such as `aus`.

    Returns:
        A record a video.

    Raises:
        ValueError: no such data set, an option that its reader does not have, or what the reader raises.
    """
    dataset = detect_dataset(root) if dataset is None else dataset
    if dataset not in _READERS:
        raise ValueError(f"dataset must be one of {', '.join(_READERS)}, got {dataset!r}")
    reader = _READERS[dataset]
    if unknown := [name for name in options if name not in inspect.signature(reader).parameters]:
        raise ValueError(f"{unknown[0]} is no option of the reader of {dataset}")
    return reader(root, **options)


@dataclass(frozen=True)
class Counts:
    """Frames of some videos, by AU.

    Attributes:
        frames: labelled frames with a picture.
        coded: m counts of frames in which the AU is coded.
        positive: m counts of frames in which it occurs.
    """

    frames: int
    coded: tuple[int, ...]
    positive: tuple[int, ...]

    @classmethod
    def of(cls, videos: Sequence[Video]) -> Counts:
        """Count over videos of one list of AUs."""
        coded = sum(video.mask.sum(axis=0) for video in videos)
        positive = sum(video.labels.sum(axis=0, dtype=np.int64) for video in videos)
        return cls(sum(map(len, videos)), tuple(coded.tolist()), tuple(positive.tolist()))

    def cells(self) -> list[str]:
        """For each AU its positive frames, and behind them the coded ones where these are not all."""
        return [
            str(positive) if coded == self.frames else f"{positive}/{coded}"
            for coded, positive in zip(self.coded, self.positive, strict=True)
        ]


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found.

    Attributes:
        dataset: its name.
        synthetic: it was generated.
        aus: the m AUs.
        videos: how many.
        without_landmarks: names of the videos that bring no landmark file.
        missing: subjects of the published folds that are not here.
        missing_tasks: BP4D's tasks of subjects that are here, without a video that can be read.
        subjects: counts of each subject.
        total: counts over all.
        notes: what the reader left out.
        problems: a sentence for each video that cannot be read; preparing would stop at the first.
    """

    dataset: str
    synthetic: bool
    aus: tuple[int, ...]
    videos: int
    without_landmarks: tuple[str, ...]
    missing: tuple[str, ...]
    missing_tasks: tuple[str, ...]
    subjects: dict[str, Counts]
    total: Counts
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def text(self) -> str:
        """The report for people, without a final line break."""
        published = OCCURRENCE_RATES.get(self.dataset, {})
        kind = "synthetic " if self.synthetic else ""
        lines = [
            f"{kind}{self.dataset}: {len(self.subjects)} subjects, {self.videos} videos, "
            f"{self.total.frames:,} labelled frames with a picture"
        ]
        if self.missing:
            lines.append(f"missing subjects of the published folds: {' '.join(self.missing)}")
        if self.missing_tasks:
            lines.append(f"no video that can be read of the tasks {' '.join(self.missing_tasks)}")
        if self.without_landmarks:
            count = len(self.without_landmarks)
            lines.append(f"videos without landmark files: {count} of {self.videos} (dlib can find them)")
        lines += ["", f"{'AU':>4} {'coded':>9} {'positive':>9} {'rate %':>7} {'Table I':>8}"]
        for k, au in enumerate(self.aus):
            coded, positive = self.total.coded[k], self.total.positive[k]
            rate = f"{100 * positive / coded:7.1f}" if coded else f"{'-':>7}"
            table = f"{published[au]:8.1f}" if au in published else f"{'-':>8}"
            lines.append(f"{au:>4} {coded:>9,} {positive:>9,} {rate} {table}")
        if published:
            lines.append(
                "Table I of AAR counts the training frames of the data set, so small differences are right."
            )
        aus = " ".join(map(str, self.aus))
        lines += [
            "",
            f"{'subject':<12} {'frames':>8}  positive frames (/coded, where not all are) of AU {aus}",
        ]
        for subject, counts in self.subjects.items():
            lines.append(f"{subject:<12} {counts.frames:>8,}  {' '.join(counts.cells())}")
        if self.notes:
            lines += ["", *self.notes]
        if self.problems:
            lines += ["", f"{len(self.problems)} videos cannot be read:", *self.problems]
        return "\n".join(lines)


def check_dataset(root: str | os.PathLike[str], dataset: str | None = None, **options: object) -> Report:
    """Report what is there and what is wrong; `root`, `dataset` and `options` as for `read_dataset`."""
    problems: list[str] = []
    videos = read_dataset(root, dataset, problems=problems, **options)
    name = videos[0].dataset
    by_subject: dict[str, list[Video]] = {}
    for video in videos:
        by_subject.setdefault(video.subject, []).append(video)
    names = {video.name for video in videos}
    wanted = [f"{subject}_{task}" for subject in sorted(by_subject) for task in TASKS]
    real_bp4d = name == "bp4d" and not videos[0].synthetic
    expected = [subject for part in FOLDS.get(name, ()) for subject in part]
    return Report(
        dataset=name,
        synthetic=videos[0].synthetic,
        aus=videos[0].aus,
        videos=len(videos),
        without_landmarks=tuple(video.name for video in videos if video.landmarks is None),
        missing=tuple(sorted(set(expected) - set(by_subject))),
        missing_tasks=tuple(task for task in wanted if task not in names) if real_bp4d else (),
        subjects={subject: Counts.of(by_subject[subject]) for subject in sorted(by_subject)},
        total=Counts.of(videos),
        notes=tuple(note for video in videos for note in video.notes),
        problems=tuple(problems),
    )
