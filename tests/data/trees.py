"""Small trees in exactly the layouts of the data sets, with generated images."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from aufast.aus import AU_SETS
from aufast.data.landmarks import write_landmarks

# A face in an image of 120 x 120 pixels, 49 points; any that can be aligned will do.
BROWS = [(26 + 7 * k, 40 - (3, 5, 6, 5, 3)[k]) for k in range(5)]
EYE = [(30, 50), (36, 47), (42, 47), (48, 51), (42, 53), (36, 53)]
NOSE = [(60, 50), (60, 57), (60, 64), (60, 71), (52, 76), (56, 78), (60, 79), (64, 78), (68, 76)]
MOUTH = [(44, 92), (50, 88), (56, 86), (60, 87), (64, 86), (70, 88), (76, 92), (70, 96), (64, 98), (60, 99)]
MOUTH += [(56, 98), (50, 96), (56, 91), (60, 91), (64, 91), (64, 93), (60, 93), (56, 93)]
RIGHT_EYE = [(120 - x, y) for x, y in (EYE[3], EYE[2], EYE[1], EYE[0], EYE[5], EYE[4])]
POINTS = np.array(
    [*BROWS, *[(120 - x, y) for x, y in reversed(BROWS)], *NOSE, *EYE, *RIGHT_EYE, *MOUTH], float
)


def save_image(path: Path, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((120, 120, 3), value % 256, np.uint8)).save(path)


def write_codes(path: Path, rows: Mapping[int, Mapping[int, int]]) -> None:
    """A BP4D occurrence CSV: columns 0 to 99, 9 where an AU is not coded; frame -> AU -> code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coded = AU_SETS["bp4d"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(range(100))
        for frame, codes in rows.items():
            cells = [codes.get(au, 0 if au in coded else 9) for au in range(1, 100)]
            writer.writerow([frame, *cells])


def bp4d(
    root: Path,
    videos: Mapping[str, Mapping[int, Mapping[int, int]]],
    *,
    images: str = "2D+3D",
    codes: str = "AUCoding/AU_OCC",
    digits: int = 4,
    landmarks: bool = True,
) -> Path:
    """videos: "F001_T1" -> frame -> AU -> code; every frame gets an image and its landmarks."""
    for name, rows in videos.items():
        subject, task = name.split("_")
        for frame in rows:
            save_image(root / images / subject / task / f"{frame:0{digits}d}.jpg", frame)
        write_codes(root / codes / f"{name}.csv", rows)
        if landmarks:
            (root / "Landmarks").mkdir(exist_ok=True)
            points = np.repeat(POINTS[None], len(rows), axis=0)
            write_landmarks(root / "Landmarks" / f"{name}.csv", np.array(list(rows)), points)
    return root


def disfa(
    root: Path,
    subject: str,
    frames: int,
    intensities: Mapping[int, Mapping[int, int]] | None = None,
    *,
    first: int = 0,
    folder: str = "Images",
    aus: Sequence[int] = AU_SETS["disfa"],
) -> Path:
    """intensities: AU -> frame (from 1) -> intensity; images are numbered from `first`, not padded."""
    labels = root / "ActionUnit_Labels" / subject
    labels.mkdir(parents=True)
    for au in aus:
        values = (intensities or {}).get(au, {})
        lines = [f"{frame},{values.get(frame, 0)}" for frame in range(1, frames + 1)]
        (labels / f"{subject}_au{au}.txt").write_text("\n".join(lines) + "\n")
    for k in range(frames):
        save_image(root / folder / subject / f"{first + k}.png", k)
    return root


def affwild2(
    root: Path, group: str, name: str, rows: Sequence[str], images: Sequence[int], header: str = ""
) -> Path:
    """rows: the label lines; images: the numbers of the images there are."""
    header = header or ",".join(f"AU{au}" for au in AU_SETS["affwild2"])
    folder = root / "AU_Detection_Challenge" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text("\r\n".join([header, *rows]) + "\r\n")
    for number in images:
        save_image(root / "cropped_aligned" / name / f"{number:05d}.jpg", number)
    return root
