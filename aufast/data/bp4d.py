"""BP4D: 41 subjects, tasks T1 to T8, FACS occurrence codes in one CSV a video.

Two forms are read. The release: `2D+3D/F001/T1/*.jpg`, `AUCoding/AU_OCC/F001_T1.csv`,
`2DFeatures/F001_T1.mat`. The FERA 2015 form: `BP4D-training/F001/T1/*.jpg`, `AUCoding/F001_T1.csv`. Images
may also lie at the root. Landmarks of one's own go to `Landmarks/F001_T1.csv` (see `landmarks.py`), and these
come first.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import numpy as np

from aufast.aus import AU_SETS
from aufast.data.landmarks import by_number, load_landmarks
from aufast.data.matlab import read_fitted_points
from aufast.data.records import (
    LandmarkLoader,
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
from aufast.data.tables import header, increasing, integers, occurrences, read_lines, refuse
from aufast.faces import landmarks_49

NOT_CODED = 9
TASKS = tuple(f"T{k}" for k in range(1, 9))
_NAME = re.compile(r"([FM][0-9]{3})_(T[0-9]+)")


def read_bp4d(
    root: str | os.PathLike[str],
    aus: tuple[int, ...] = AU_SETS["bp4d"],
    *,
    problems: list[str] | None = None,
) -> list[Video]:
    """Read the labels of BP4D and find their images and landmarks.

    A frame is kept where it has both a label row and an image; BP4D codes only a part of each video. Code 9,
    not coded, becomes a mask.

    Args:
        root: the folder that holds AUCoding.
        aus: the AUs wanted, in the order wanted.
        problems: collects the sentences of videos that cannot be read, which are then left out; None raises.

    Returns:
        A record a video, by name.

    Raises:
        ValueError: a folder, file, column or image is missing, or a code is unknown; it is named.
    """
    root, aus = existing_folder(root), check_aus(aus)
    codes = first_folder(root, "AUCoding/AU_OCC", "AUCoding")
    if codes is None:
        raise ValueError(f"{root}: no folder AUCoding, so this is not BP4D")
    files = visible_files(codes, ".csv")
    if not files:
        raise ValueError(f"{codes}: holds no CSV file of occurrence codes")
    images = first_folder(root, "2D+3D", "BP4D-training", "Sequences(2D+3D)") or root
    return read_each(lambda file: _read_video(root, images, file, aus), files, problems)


def _read_video(root: Path, images: Path, file: Path, aus: tuple[int, ...]) -> Video:
    match = _NAME.fullmatch(file.stem)
    if not match:
        refuse(file, "the name must be subject and task, such as F001_T1.csv")
    subject, task = match.groups()
    numbers, labels, mask = read_codes(file, aus)
    folder = images / subject / task
    if not folder.is_dir():
        zipped = next(
            (z for z in (images / f"{subject}.zip", images / subject / f"{task}.zip") if z.exists()), None
        )
        reason = f"unpack {zipped}" if zipped else "its images are missing"
        raise ValueError(f"{folder}: no such folder, but {file.name} codes it; {reason}")
    found = numbered_images(folder)
    has_image = np.array([int(number) in found for number in numbers], bool)
    if not has_image.any():
        raise ValueError(f"{folder}: none of its {len(found)} images is a frame coded in {file.name}")
    notes = []
    if not has_image.all():
        notes.append(f"{file.stem}: no image for coded frames {some(numbers[~has_image])}")
    kept = numbers[has_image]
    landmarks, landmark_files = _find_landmarks(root, file.stem, np.array(list(found)))
    return Video(
        dataset="bp4d",
        subject=subject,
        name=file.stem,
        aus=aus,
        numbers=kept,
        labels=labels[has_image],
        mask=mask[has_image],
        images=tuple(found[int(number)] for number in kept),
        landmarks=landmarks,
        landmark_files=landmark_files,
        notes=tuple(notes),
        synthetic=is_synthetic(root),
    )


def read_codes(file: Path, aus: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame numbers (n,), labels (n, m) and mask (n, m) of one CSV of occurrence codes.

    The first row holds column names: 0 for the frame number, else the AU.
    """
    lines = read_lines(file)
    names = header(file, lines[0])
    for column in ("0", *map(str, aus)):
        if column not in names:
            what = "the frame number" if column == "0" else f"AU {column}"
            refuse(file, f"no column {column!r} ({what})", 1)
    values = integers(file, lines[1:], len(names), first_line=2)
    if not len(values):
        refuse(file, "holds no coded frame")
    numbers = increasing(file, values[:, names.index("0")], first_line=2)
    columns = [names.index(str(au)) for au in aus]
    labels, mask = occurrences(file, values[:, columns], aus, 2, missing=(NOT_CODED,))
    return numbers, labels, mask


def _find_landmarks(
    root: Path, name: str, image_numbers: np.ndarray
) -> tuple[LandmarkLoader | None, tuple[Path, ...]]:
    own, released = root / "Landmarks" / f"{name}.csv", root / "2DFeatures" / f"{name}.mat"
    if own.is_file():
        return partial(load_landmarks, own), (own,)
    if released.is_file():
        return partial(_load_released, released, image_numbers), (released,)
    return None, ()


def _load_released(path: Path, image_numbers: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Tracked points, an entry for each image of the folder in order, 1-based as MATLAB counts pixels."""
    entries = read_fitted_points(path)
    if len(entries) != len(image_numbers):
        refuse(path, f"{len(entries)} entries for a folder of {len(image_numbers)} images")
    points = np.full((len(entries), 49, 2), np.nan)
    for k, entry in enumerate(entries):
        if entry is not None:
            if entry.shape != (49, 2):
                refuse(path, f"entry {k} has shape {entry.shape}, expected (49, 2)")
            points[k] = entry
    return by_number(landmarks_49(points, one_based=True), image_numbers, numbers)
