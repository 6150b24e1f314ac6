"""What every reader returns: one record a video, with its frames, labels and landmarks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from aufast.aus import AU_NAMES

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
MARKER = "SYNTHETIC.json"  # a tree that holds this file was generated, and says so wherever it goes

# Frame numbers (k,) to landmarks (k, 49, 2), float64 pixels from 0, NaN where a frame has none.
LandmarkLoader = Callable[[np.ndarray], np.ndarray]
Source = TypeVar("Source")


@dataclass(frozen=True, eq=False)
class Video:
    """The labelled frames of one video, in order of time.

    Attributes:
        dataset: "bp4d", "disfa", "affwild2", or the name a table gives itself.
        subject: the person, as the data set names them.
        name: the video's name, unique in its data set; it can be a file name.
        aus: the m AUs of the labels' columns.
        numbers: int64 (n,), strictly increasing, as the data set counts its frames.
        labels: int8 (n, m), 1 where the AU occurs, 0 where it does not or nobody decided.
        mask: bool (n, m), True where the AU is coded.
        images: n image files, or None where `movie` holds the frames.
        movie: a video file, or None.
        positions: int64 (n,), each frame's place in `movie`, from 0.
        landmarks: loads landmarks by frame number; None where the data set brings none.
        landmark_files: what it reads.
        group: the data set's own split, such as "train"; empty where it has none.
        notes: what was left out and why, a sentence each.
        synthetic: the frames were generated, not filmed.
    """

    dataset: str
    subject: str
    name: str
    aus: tuple[int, ...]
    numbers: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    images: tuple[Path, ...] | None = None
    movie: Path | None = None
    positions: np.ndarray | None = None
    landmarks: LandmarkLoader | None = None
    landmark_files: tuple[Path, ...] = ()
    group: str = ""
    notes: tuple[str, ...] = ()
    synthetic: bool = False

    def __post_init__(self) -> None:
        n, m = len(self.numbers), len(self.aus)
        if self.labels.shape != (n, m) or self.mask.shape != (n, m):
            shapes = f"labels {self.labels.shape}, mask {self.mask.shape}"
            raise ValueError(f"{self.name}: {shapes}, expected ({n}, {m})")
        if (np.diff(self.numbers) <= 0).any():
            raise ValueError(f"{self.name}: frame numbers must increase")
        if (self.images is None) == (self.movie is None):
            raise ValueError(f"{self.name}: needs either image files or a video file")
        if len(self.images if self.images is not None else self.positions) != n:
            raise ValueError(f"{self.name}: {n} labelled frames, but another number of frame files")

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, keep: np.ndarray, *notes: str) -> Video:
        """The frames where `keep`, bool (n,), is True, with further `notes`."""
        rows = np.flatnonzero(keep)
        return replace(
            self,
            numbers=self.numbers[rows],
            labels=self.labels[rows],
            mask=self.mask[rows],
            images=None if self.images is None else tuple(self.images[i] for i in rows),
            positions=None if self.positions is None else self.positions[rows],
            notes=(*self.notes, *notes),
        )


def read_each(
    read: Callable[[Source], Video], sources: Iterable[Source], problems: list[str] | None
) -> list[Video]:
    """Read videos one after another.

    Args:
        read: reads one.
        sources: what it is called with.
        problems: where the sentence of a video that cannot be read goes, so that the others are read; None
            raises it.

    Raises:
        ValueError: a video cannot be read, or with `problems` not a single one can.
    """
    videos = []
    for source in sources:
        try:
            videos.append(read(source))
        except ValueError as error:
            if problems is None:
                raise
            problems.append(str(error))
    if problems and not videos:
        raise ValueError(problems[0])
    return videos


def existing_folder(root: str | os.PathLike[str]) -> Path:
    """`root` as a path, refused with one sentence where it is no folder."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    return root


def first_folder(root: Path, *names: str) -> Path | None:
    """The first of these folders that exists; letters may be large or small."""
    for name in names:
        folder = root
        for part in name.split("/"):
            matches = [p for p in _children(folder) if p.name.lower() == part.lower() and p.is_dir()]
            if not matches:
                break
            folder = matches[0]
        else:
            return folder
    return None


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def visible_files(folder: Path, suffix: str) -> list[Path]:
    """Files of a kind by name, without the hidden ones that some systems leave beside their own."""
    return sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))


def numbered_images(folder: Path) -> dict[int, Path]:
    """Image files by the number that is their name, however it is padded, in order.

    Raises:
        ValueError: an image whose name is not a number, or two images of one number.
    """
    found: dict[int, Path] = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
            continue
        if not re.fullmatch(r"[0-9]{1,9}", stem):
            raise ValueError(f"{folder / name}: an image must be named by its frame number")
        if (number := int(stem)) in found:
            raise ValueError(f"{folder}: {found[number].name} and {name} are both frame {number}")
        found[number] = folder / name
    return dict(sorted(found.items()))


def is_synthetic(root: Path) -> bool:
    """Whether the tree says that it was generated."""
    return (root / MARKER).is_file()


def check_aus(aus: tuple[int, ...]) -> tuple[int, ...]:
    """AU numbers as a tuple: known, each once, at least one."""
    aus = tuple(aus)
    unknown = [au for au in aus if au not in AU_NAMES]
    if unknown or not aus or len(set(aus)) != len(aus):
        raise ValueError(f"aus must be different AUs out of {tuple(AU_NAMES)}, got {aus}")
    return aus


def some(numbers: np.ndarray | list[int], limit: int = 5) -> str:
    """Frame numbers for a message: all of a few, the first ones of many."""
    shown = ", ".join(str(int(number)) for number in list(numbers)[:limit])
    return shown if len(numbers) <= limit else f"{shown}, … ({len(numbers)} in all)"
