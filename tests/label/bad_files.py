"""How a bad file is described: what is given, how it is made, and what must become of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.label.clips import encode, face, moving

Make = Callable[[Path], Any]


class Case(NamedTuple):
    """A file and its fate."""

    number: int
    given: str
    make: Make  # gets the folder, returns the path
    status: str  # one, or several with |
    sentence: str = ""  # a pattern
    rows: int | None = None
    same: str = ""  # the case whose row this one's is
    warning: str = ""
    faces: str = ""  # a digit for every frame: whether it has a face
    times: list[float | None] | None = None  # in seconds


def write(name: str, data: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def image(name: str, pixels: Callable[[], np.ndarray] = face, mode: str | None = None, **options) -> Make:
    def make(folder: Path) -> Path:
        picture = Image.fromarray(pixels())
        (picture.convert(mode) if mode else picture).save(folder / name, **options)
        return folder / name

    return make


def video(name: str, change: Callable[[Path], Path] = lambda path: path, frames=None, **options) -> Make:
    return lambda folder: change(encode(folder / name, frames or moving(10), **options))


def link(name: str, target: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make
