"""Aff-Wild2: one text file of AU labels a video, in the official training and validation sets.

Read are `cropped_aligned/VIDEO/00001.jpg` and `AU_Detection_Challenge/{Train_Set,Validation_Set}/VIDEO.txt`
(older releases: `AU_Set/…`). Line i after the header is image i, from 1; an image is missing where no
face was found.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from aufast.aus import AU_SETS
from aufast.data.landmarks import load_landmarks
from aufast.data.records import (
    Video,
    check_aus,
    existing_folder,
    first_folder,
    is_synthetic,
    numbered_images,
    read_each,
    some,
    visible_files,
)
from aufast.data.tables import header, integers, occurrences, read_lines, refuse

NOT_CODED = -1
GROUPS = {"train": "Train_Set", "validation": "Validation_Set"}


def read_affwild2(
    root: str | os.PathLike[str],
    aus: tuple[int, ...] = AU_SETS["affwild2"],
    *,
    problems: list[str] | None = None,
) -> list[Video]:
    """Read the labels of Aff-Wild2 and find their images.

    A frame is kept where it has an image; -1 becomes a mask. The data set does not say who is in a video, so
    each video is its own subject.

    Args:
        root: the folder that holds cropped_aligned and the annotations.
        aus: the AUs wanted, in the order wanted.
        problems: collects the sentences of videos that cannot be read, which are then left out; None raises.

    Returns:
        A record a video; `group` is "train" or "validation".

    Raises:
        ValueError: a folder, file or column is missing, or a code is unknown; it is named.
    """
    root, aus = existing_folder(root), check_aus(aus)
    names = ("AU_Detection_Challenge", "AU_Set")
    labels = first_folder(root, *(f"{parent}{name}" for parent in ("", "annotations/") for name in names))
    if labels is None:
        raise ValueError(f"{root}: no folder AU_Detection_Challenge or AU_Set, so this is not Aff-Wild2")
    images = first_folder(root, "cropped_aligned")
    if images is None:
        raise ValueError(f"{root}: no folder cropped_aligned")
    files: dict[str, tuple[Path, str]] = {}
    for group, name in GROUPS.items():
        folder = first_folder(labels, name)
        for file in visible_files(folder, ".txt") if folder else ():
            if file.stem in files:
                refuse(file, f"the video is also in {GROUPS[files[file.stem][1]]}")
            files[file.stem] = file, group
    if not files:
        raise ValueError(f"{labels}: holds no label file in {' or '.join(GROUPS.values())}")
    return read_each(lambda source: _read_video(root, images, *source, aus), files.values(), problems)


def _read_video(root: Path, images: Path, file: Path, group: str, aus: tuple[int, ...]) -> Video:
    lines = read_lines(file)
    names = header(file, lines[0])
    for au in aus:
        if f"AU{au}" not in names:
            refuse(file, f"no column AU{au}", 1)
    values = integers(file, lines[1:], len(names), first_line=2)
    columns = [names.index(f"AU{au}") for au in aus]
    labels, mask = occurrences(file, values[:, columns], aus, 2, missing=(NOT_CODED,))
    numbers = np.arange(1, len(values) + 1)
    folder = images / file.stem
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, but {file} labels it")
    found = numbered_images(folder)
    keep = np.array([int(number) in found for number in numbers], bool)
    if not keep.any():
        raise ValueError(f"{folder}: none of its {len(found)} images has a label in {file}")
    notes = []
    if extra := [number for number in found if not 1 <= number <= len(values)]:
        notes.append(f"{file.stem}: images without a label, frames {some(extra)}")
    if not keep.all():
        notes.append(f"{file.stem}: {np.count_nonzero(~keep)} of {len(keep)} labelled frames have no image")
    own = root / "Landmarks" / f"{file.stem}.csv"
    return Video(
        dataset="affwild2",
        subject=file.stem,
        name=file.stem,
        aus=aus,
        numbers=numbers[keep],
        labels=labels[keep],
        mask=mask[keep],
        images=tuple(found[int(number)] for number in numbers[keep]),
        landmarks=partial(load_landmarks, own) if own.is_file() else None,
        landmark_files=(own,) if own.is_file() else (),
        group=group,
        notes=tuple(notes),
        synthetic=is_synthetic(root),
    )
