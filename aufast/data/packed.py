"""Packed data: aligned faces of a data set as memory-mapped arrays, one folder a video.

OUT/index.json            what is here; written last, so a folder that has it is whole
OUT/SHA256SUMS            of every array; `sha256sum -c` understands it
OUT/videos/NAME/          frames.npy    uint8 (n, size, size, 3) RGB
                          landmarks.npy float32 (n, 49, 2), (x, y) in the aligned face's pixels
                          labels.npy    int8 (n, m)
                          mask.npy      bool (n, m), True where the AU is coded
                          numbers.npy   int64 (n,), the data set's own frame numbers
                          video.json    who, what was left out, and the sums
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from aufast.files import file_sum

FORMAT_VERSION = 1
INDEX, SUMS, VIDEOS, VIDEO = "index.json", "SHA256SUMS", "videos", "video.json"
ARRAYS = ("frames", "landmarks", "labels", "mask", "numbers")


class PackedVideo:
    """One video of a packed data set. Arrays are mapped when first used, in each process anew.

    Args:
        folder: where the arrays lie.
        entry: its part of index.json.
        size: of the faces in pixels.
        m: number of AUs.

    Attributes:
        subject, name, group: as in the data set.
        folder: where the arrays lie.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], size: int, m: int):
        self.folder = folder
        self.subject: str = entry["subject"]
        self.name: str = entry["name"]
        self.group: str = entry["group"]
        self._length: int = entry["frames"]
        self._size, self._m = size, m

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ARRAYS}

    @cached_property
    def frames(self) -> np.ndarray:
        """uint8 (n, size, size, 3), read-only, mapped from disk."""
        return self._load("frames", np.uint8, (self._size, self._size, 3), mapped=self._length > 0)

    @cached_property
    def landmarks(self) -> np.ndarray:
        """float32 (n, 49, 2)."""
        return self._load("landmarks", np.float32, (49, 2))

    @cached_property
    def labels(self) -> np.ndarray:
        """int8 (n, m)."""
        return self._load("labels", np.int8, (self._m,))

    @cached_property
    def mask(self) -> np.ndarray:
        """bool (n, m)."""
        return self._load("mask", np.bool_, (self._m,))

    @cached_property
    def numbers(self) -> np.ndarray:
        """int64 (n,)."""
        return self._load("numbers", np.int64, ())

    def _load(self, name: str, dtype: type, shape: tuple[int, ...], mapped: bool = False) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        except Exception as error:  # NumPy parses the header as Python text, which fails in many ways
            _refuse(path, f"missing, cut short or damaged: {error}")
        if array.dtype != dtype or array.shape != (self._length, *shape):
            _refuse(
                path, f"is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {(self._length, *shape)}"
            )
        return array


class PackedDataset:
    """A folder written by `prepare_dataset`.

    Args:
        root: the folder.
        verify: read every array and compare its SHA-256 first; at the speed of the disk.

    Attributes:
        dataset: the data set's name.
        synthetic: the faces were drawn.
        aus: the m AUs of the labels.
        size: side of a face in pixels.
        videos: those with at least one frame.
        sums: SHA-256 of every array by its path.

    Raises:
        ValueError: the folder is not whole, a file is missing or changed, or the format is newer.
    """

    def __init__(self, root: str | os.PathLike[str], verify: bool = False):
        self.root = Path(root)
        index = read_json(self.root / INDEX, "not a packed data set, or one whose preparing has not ended")
        version = index.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            _refuse(
                self.root / INDEX,
                f"format {version}, this aufast reads up to {FORMAT_VERSION}; update aufast",
            )
        try:
            self.dataset: str = index["dataset"]
            self.synthetic: bool = index["synthetic"]
            self.aus: tuple[int, ...] = tuple(index["aus"])
            self.size: int = index["size"]
            self.sums: dict[str, str] = {
                f"{VIDEOS}/{entry['name']}/{name}": value
                for entry in index["videos"]
                for name, value in entry["sums"].items()
            }
            self.videos = [
                PackedVideo(self.root / VIDEOS / entry["name"], entry, self.size, len(self.aus))
                for entry in index["videos"]
                if entry["frames"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            _refuse(self.root / INDEX, f"damaged: {error!r} does not fit")
        if verify:
            self.verify()

    def __len__(self) -> int:
        """Frames of all videos."""
        return sum(map(len, self.videos))

    def verify(self) -> None:
        """Compare every array with its SHA-256.

        Raises:
            ValueError: the first file that is missing or changed.
        """
        for name, expected in self.sums.items():
            path = self.root / name
            if not path.is_file():
                _refuse(path, "is missing")
            if file_sum(path) != expected:
                _refuse(path, f"was changed: its SHA-256 is not the one in {INDEX}")


def gather_labels(videos: Sequence[PackedVideo]) -> tuple[Tensor, Tensor]:
    """Labels int8 (n, m) and mask bool (n, m) of `videos`, for class weights and AU relations."""
    if not videos:
        raise ValueError("there is no video to take labels from")
    arrays = (np.concatenate([getattr(video, name) for video in videos]) for name in ("labels", "mask"))
    labels, mask = (torch.from_numpy(array) for array in arrays)
    return labels, mask


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """The object in a JSON file; `otherwise` says what its absence means."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        _refuse(path, f"no such file: {otherwise}")
    except (OSError, ValueError) as error:
        _refuse(path, f"cannot be read as JSON: {error}")
    if not isinstance(value, dict):
        _refuse(path, "must hold an object")
    return value


def _refuse(path: Path, reason: str) -> NoReturn:
    raise ValueError(f"{path}: {reason}")
