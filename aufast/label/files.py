"""What a run reads and writes: inputs by content, outputs that are whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aufast.faces import read_image
from aufast.faces.images import FORMATS
from aufast.files import Draft, remove_leftovers, stream_sum, sync_folder
from aufast.label.config import InputError
from aufast.label.video import open_regular

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ts .webm .wmv".split()
)


class OutputError(OSError):
    """A result cannot be written: the run cannot go on."""


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn what goes wrong with an output into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{what} cannot be written: {reason}; finished files are whole, and the same command goes on"
        ) from error


# ---- inputs ----------------------------------------------------------------------------------------


def find_inputs(paths: Iterable[str], out: Path) -> tuple[list[str], int]:
    """Files to label, sorted, each once, and how many other files the folders hold.

    A file that is named is taken whatever it is; in folders, and theirs, files are taken by their ending.
    Hidden ones and the output folder are left alone.
    """
    found, others = set(), 0
    for path in paths:
        if not os.path.isdir(path):
            found.add(path)
            continue

        def unreadable(error: OSError) -> None:
            found.add(os.path.normpath(error.filename))  # it will say why when its turn comes

        for folder, folders, names in os.walk(path, onerror=unreadable):
            folders[:] = [n for n in folders if n[0] != "." and not _same(os.path.join(folder, n), out)]
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                if name[0] != "." and suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                    found.add(os.path.normpath(os.path.join(folder, name)))
                else:
                    others += 1
    return sorted(found), others


def _same(a: str, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def in_shard(path: str, shard: tuple[int, int]) -> bool:
    """Whether an input is this shard's: by its name, so that files which come later move no other."""
    index, count = shard
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") % count == index


class Source:
    """A file to label, opened once: what is hashed is what is read, whatever becomes of its name.

    Args:
        path: of a regular file.

    Attributes:
        path: as given.
        file: open for reading.
        size: in bytes.

    Raises:
        InputError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.file = open_regular(path)
        self.size, self._changed = self._state()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _state(self) -> tuple[int, int]:
        state = os.fstat(self.file.fileno())
        return state.st_size, state.st_mtime_ns

    def is_changed(self) -> bool:
        """Whether somebody has written into the file since it was opened."""
        return self._state() != (self.size, self._changed)

    def sum(self) -> str:
        """SHA-256 of the content."""
        self.file.seek(0)
        try:
            return stream_sum(self.file)
        except OSError as error:
            raise InputError("undecodable", error.strerror or str(error)) from error

    def is_image(self, max_pixels: int) -> tuple[bool, bool]:
        """Whether it is an image, by its content, and whether it is an animation.

        Raises:
            InputError: "too_large", before anything is decoded.
        """
        from PIL import Image, UnidentifiedImageError

        self.file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                with Image.open(self.file, formats=FORMATS) as image:
                    width, height = image.size
                    animated = getattr(image, "is_animated", False)
            except UnidentifiedImageError:
                return False, False
            except Image.DecompressionBombError as error:
                raise InputError("too_large", str(error)) from error
            except Exception:  # a decoder may raise anything; `read_image` will say what
                return True, False
        if width * height > max_pixels:
            raise InputError("too_large", f"its {width} x {height} pixels are more than {max_pixels}")
        return True, animated

    def image(self, max_pixels: int) -> np.ndarray:
        """The image, uint8 (H, W, 3).

        Raises:
            InputError: it is damaged, or memory does not suffice.
        """
        self.file.seek(0)
        try:
            return read_image(self.file, max_pixels)
        except ValueError as error:
            raise InputError("undecodable", str(error)) from error
        except MemoryError as error:
            raise InputError("oom", "decoding it takes more memory than there is") from error


# ---- outputs ---------------------------------------------------------------------------------------


class Outputs:
    """The files of one input. They are written under hidden names and renamed when all are whole.

    The sidecar `NAME.json` is renamed last: where it is, everything is.

    Args:
        folder: the output folder.
        name: of the files, without suffix.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._drafts: dict[str, Draft] = {}
        remove_leftovers(folder / name)

    @property
    def sidecar(self) -> Path:
        """Where the sidecar is or will be."""
        return self.folder / f"{self.name}.json"

    def path(self, suffix: str) -> Path:
        """A place to write the file that will be NAME + suffix."""
        self._drafts[suffix] = Draft(self.folder / f"{self.name}{suffix}")
        return self._drafts[suffix].place

    def commit(self, facts: dict[str, Any]) -> None:
        """Give every file its name, the sidecar with `facts` last."""
        with writing(str(self.sidecar)):
            facts = {**facts, "outputs": [self.name + suffix for suffix in self._drafts]}
            with open(self.path(".json"), "w", encoding="utf-8") as file:
                json.dump(facts, file, indent=1)
                file.write("\n")
            for draft in self._drafts.values():
                sync_folder(draft.place)
            for draft in self._drafts.values():
                draft.commit()
            sync_folder(self.folder)
        self._drafts.clear()

    def discard(self) -> None:
        """Remove what was written."""
        for draft in self._drafts.values():
            with contextlib.suppress(OSError):
                draft.discard()
        self._drafts.clear()


def output_name(path: str, *sums: str) -> str:
    """The name of an input's files: its own, cleaned, and a hash of all that they depend on."""
    stem = re.sub(r"[^\w.-]", "_", os.path.splitext(os.path.basename(path))[0], flags=re.ASCII)
    digest = hashlib.sha256("\n".join(sums).encode()).hexdigest()
    return f"{stem.lstrip('-.')[:60] or '_'}-{digest[:16]}"
