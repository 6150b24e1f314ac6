"""DISFA: 27 subjects, one video of 4,845 frames each, AU intensities 0 to 5 in one text file an AU.

Read are `ActionUnit_Labels/SN001/SN001_au1.txt` (lines `frame,intensity`, frames from 1), frames as images in
`Images/SN001/` or `SN001/` or in the video files of one camera, and `Landmark_Points/SN001/…_lm.mat`.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from aufast.aus import AU_SETS
from aufast.data.frames import told_frames
from aufast.data.landmarks import load_landmarks
from aufast.data.matlab import read_matrix
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
)
from aufast.data.tables import increasing, integers, occurrences, read_lines, refuse
from aufast.faces import landmarks_49

POSITIVE_FROM = 2  # the intensity from which an AU counts as occurring
FRAMES = 4845
ONE_SHORT = ("SN010",)  # their video lacks the last labelled frame

# Frames (from 1, both ends included) on which the released landmarks are known to be wrong. SN010's video is
# one frame short. JAA-Net's lists leave out exactly these, and so hold 126,144 frames of 130,815.
BAD_LANDMARKS: dict[str, tuple[tuple[int, int], ...]] = {
    "SN001": ((398, 420), (3190, 3243)),
    "SN002": ((800, 826),),
    "SN004": ((4541, 4555),),
    "SN006": ((1349, 1405),),
    "SN009": ((1736, 1808), (1851, 1885)),
    "SN010": ((4845, 4845),),
    "SN011": ((4529, 4533), (4830, 4845)),
    "SN021": (
        (574, 616), (985, 1164), (1190, 1205), (1305, 1338), (1665, 1710), (1862, 2477),
        (2554, 4657), (4710, 4722),
    ),
    "SN023": ((1021, 1049), (3378, 3557), (3584, 3668), (4547, 4621), (4741, 4772), (4825, 4845)),
    "SN025": ((4596, 4662), (4816, 4835)),
    "SN027": ((3461, 3494), (4738, 4785)),
    "SN028": ((1875, 1885), (4571, 4690)),
    "SN029": ((4090, 4543),),
    "SN030": ((939, 962), (1406, 1422), (2100, 2132), (2893, 2955)),
}  # fmt: skip


def read_disfa(
    root: str | os.PathLike[str],
    aus: tuple[int, ...] = AU_SETS["disfa"],
    *,
    camera: Literal["left", "right"] | None = None,
    first_image: Literal[0, 1] | None = None,
    bad_landmarks: Literal["drop", "keep"] = "drop",
    problems: list[str] | None = None,
) -> list[Video]:
    """Read the labels of DISFA and find their frames and landmarks.

    Args:
        root: the folder that holds ActionUnit_Labels.
        aus: the AUs wanted, in the order wanted.
        camera: which camera's videos; needed where both are there and there are no images.
        first_image: the number of the image of the first frame; None tells it from the numbers there are.
        bad_landmarks: "drop" leaves out the frames of `BAD_LANDMARKS`, as published lists do; "keep" keeps
            them, for landmarks of one's own.
        problems: collects the sentences of subjects that cannot be read, which are then left out; None
            raises.

    Returns:
        A record a subject, by name.

    Raises:
        ValueError: a folder or file is missing, files disagree, or a code is unknown; it is named.
    """
    root, aus = existing_folder(root), check_aus(aus)
    for name, value, known in (
        ("camera", camera, (None, "left", "right")),
        ("first_image", first_image, (None, 0, 1)),
        ("bad_landmarks", bad_landmarks, ("drop", "keep")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    folder = first_folder(root, "ActionUnit_Labels")
    if folder is None:
        raise ValueError(f"{root}: no folder ActionUnit_Labels, so this is not DISFA")
    subjects = sorted(path for path in folder.iterdir() if re.fullmatch("SN[0-9]{3}", path.name))
    if not subjects:
        raise ValueError(f"{folder}: holds no folder of a subject, such as SN001")

    def read(path: Path) -> Video:
        video = _read_subject(root, path, aus, camera, first_image)
        return _without_bad(video) if bad_landmarks == "drop" else video

    return read_each(read, subjects, problems)


def _read_subject(
    root: Path, folder: Path, aus: tuple[int, ...], camera: str | None, first_image: int | None
) -> Video:
    subject = folder.name
    numbers, labels, mask = read_intensities(folder, aus)
    landmarks, landmark_files = _find_landmarks(root, subject)
    common = {
        "dataset": "disfa",
        "subject": subject,
        "name": subject,
        "aus": aus,
        "landmarks": landmarks,
        "landmark_files": landmark_files,
        "synthetic": is_synthetic(root),
    }
    images = first_folder(root, f"Images/{subject}", subject)
    if images is None:
        movie = _find_movie(root, subject, camera)
        common |= {"movie": movie, "positions": numbers - 1, "notes": _count_film(movie, subject, numbers)}
        return Video(numbers=numbers, labels=labels, mask=mask, **common)
    found = numbered_images(images)
    filmed = len(numbers) - (subject in ONE_SHORT and len(numbers) == FRAMES)
    base = _first_number(images, found, filmed) if first_image is None else first_image
    by_frame = {number + 1 - base: path for number, path in found.items()}
    extra = sorted(set(by_frame) - set(numbers.tolist()))
    keep = np.array([int(number) in by_frame for number in numbers], bool)
    if not keep.any():
        raise ValueError(f"{images}: none of its {len(found)} images is a labelled frame")
    notes = []
    if extra:
        notes.append(f"{subject}: images without a label, frames {some(extra)}")
    if not keep.all():
        notes.append(f"{subject}: no image for labelled frames {some(numbers[~keep])}")
    return Video(
        numbers=numbers[keep],
        labels=labels[keep],
        mask=mask[keep],
        images=tuple(by_frame[int(number)] for number in numbers[keep]),
        notes=tuple(notes),
        **common,
    )


def _count_film(movie: Path, subject: str, numbers: np.ndarray) -> tuple[str, ...]:
    """A note where a film tells another number of frames than there are labels for."""
    labelled, told = int(numbers[-1]), told_frames(movie)
    known = labelled - (subject in ONE_SHORT and labelled == FRAMES)
    if told is None or told == known:
        return ()
    return (f"{subject}: {movie.name} has {told:,} frames, and the labels end with frame {labelled:,}",)


def read_intensities(folder: Path, aus: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame numbers (n,), labels (n, m) and mask (n, m) of a subject's folder of intensity files."""
    columns, numbers, first = [], None, None
    for au in aus:
        file = folder / f"{folder.name}_au{au}.txt"
        values = integers(file, read_lines(file), 2, first_line=1)  # (n, 2)
        frames = increasing(file, values[:, 0], first_line=1)
        if numbers is None:
            numbers, first = frames, file
            if numbers[0] < 1:
                refuse(file, f"frames count from 1, got {numbers[0]}", 1)
        elif not np.array_equal(frames, numbers):
            refuse(file, f"its {len(frames)} frames are not the {len(numbers)} frames of {first.name}")
        columns.append(
            occurrences(file, values[:, 1:], (au,), 1, missing=(), highest=5, positive_from=POSITIVE_FROM)
        )
    labels, mask = (np.concatenate(parts, axis=1) for parts in zip(*columns, strict=True))  # (n, m)
    return numbers, labels, mask


def _first_number(folder: Path, found: dict[int, Path], frames: int) -> int:
    """Whether images of so many frames count from 0 or from 1: only one fits the first or the last."""
    numbers = list(found)
    if not numbers:
        raise ValueError(f"{folder}: holds no image")
    if numbers[0] == 0 and numbers[-1] < frames:
        return 0
    # An image short at the start or the end leaves the question open, and a guess would shift every label.
    if numbers[0] == 1 and numbers[-1] == frames:
        return 1
    raise ValueError(
        f"{folder}: images {numbers[0]} to {numbers[-1]} for {frames} labelled frames; "
        "say with first_image whether the first frame's image is 0 or 1"
    )


def _find_movie(root: Path, subject: str, camera: str | None) -> Path:
    """The subject's video file; folders are spelled Video_ or Videos_, and files with any case."""
    found = {}
    for side in ("left", "right"):
        pattern = re.compile(rf"{side}video{subject}(_comp)?\.(avi|mp4|mkv)", re.IGNORECASE)
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and re.fullmatch(rf"videos?_{side}camera", folder.name, re.IGNORECASE):
                for path in sorted(folder.iterdir()):
                    if pattern.fullmatch(path.name):
                        found[side] = path
    if camera is not None:
        found = {side: path for side, path in found.items() if side == camera}
    if not found:
        wanted = f"video of the {camera} camera" if camera else "video"
        raise ValueError(f"{root}: no images and no {wanted} of {subject}")
    if len(found) > 1:
        raise ValueError(f"{root}: {subject} has videos of both cameras; choose one with camera")
    return next(iter(found.values()))


def _find_landmarks(root: Path, subject: str) -> tuple[LandmarkLoader | None, tuple[Path, ...]]:
    own = root / "Landmarks" / f"{subject}.csv"
    if own.is_file():
        return partial(load_landmarks, own), (own,)
    folder = first_folder(root, f"Landmark_Points/{subject}/tmp_frame_lm", f"Landmark_Points/{subject}")
    if folder is None:
        return None, ()
    return partial(_load_released, folder, subject), tuple(sorted(folder.glob("*_lm.mat")))


def _load_released(folder: Path, subject: str, numbers: np.ndarray) -> np.ndarray:
    """66 points a file, 1-based pixels. `SN001_0000_lm.mat` counts frames from 0, `l00001_lm.mat` from 1."""
    files = {}
    for path in sorted(folder.glob("*_lm.mat")):
        match = re.fullmatch(rf"(?:({subject}_)|l)([0-9]+)_lm\.mat", path.name)
        if not match:
            refuse(path, f"a landmark file of {subject} is named {subject}_0000_lm.mat or l00001_lm.mat")
        files[int(match[2]) + (1 if match[1] else 0)] = path
    points = np.full((len(numbers), 49, 2), np.nan)
    for k, number in enumerate(numbers):
        if (path := files.get(int(number))) is not None:
            matrix = read_matrix(path, "pts")
            if matrix.shape != (66, 2):
                refuse(path, f"pts has shape {matrix.shape}, expected (66, 2)")
            points[k] = landmarks_49(matrix, one_based=True)
    return points


def _without_bad(video: Video) -> Video:
    ranges = BAD_LANDMARKS.get(video.subject, ()) if not video.synthetic else ()
    bad = np.zeros(len(video), bool)
    for first, last in ranges:
        bad |= (video.numbers >= first) & (video.numbers <= last)
    if not bad.any():
        return video
    return video.select(
        ~bad, f"{video.name}: left out {bad.sum()} frames whose landmarks are known to be wrong"
    )
