"""Numeric arrays of MATLAB files: level 5 read here, level 7.3 (HDF5) through h5py.

Level 5 is read here because DISFA keeps a small one for each of its 130,000 frames, and SciPy is a large
dependency for one matrix. The layout is MathWorks' "MAT-File Format", chapter 1: a header of 128 bytes, then
elements of a tag (type, size) and data padded to 8 bytes; a variable is an element of type 14, and may be
wrapped in one of type 15, which is zlib.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from aufast.data.tables import refuse

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_MAX_BYTES = 1 << 24  # far more than any landmark file, and little enough for one that was made to burst
_COMPLEX = 0x08


def read_matrix(path: Path, name: str) -> np.ndarray:
    """One real numeric variable of a MATLAB level 5 file, as float64 of its own shape.

    Raises:
        ValueError: the file is missing, damaged or of another level, or has no such variable.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror}")
    if len(data) < 128 or data[126:128] not in (b"IM", b"MI"):
        refuse(path, "not a MATLAB level 5 file")
    order = "<" if data[126:128] == b"IM" else ">"
    try:
        for kind, body in _elements(data[128:], order):
            if kind == _COMPRESSED:
                unpacker = zlib.decompressobj()
                ((kind, body),) = _elements(unpacker.decompress(body, _MAX_BYTES), order)
            if kind == _MATRIX and (matrix := _matrix(body, order, name)) is not None:
                return matrix
    except (struct.error, zlib.error, ValueError, KeyError, IndexError) as error:
        refuse(path, f"the file is damaged or not of a kind that is read: {error}")
    refuse(path, f"holds no variable {name!r}")


def _elements(data: bytes, order: str) -> list[tuple[int, bytes]]:
    """(type, data) of the elements that follow one another in `data`."""
    found, start = [], 0
    while start < len(data):
        (word,) = struct.unpack_from(order + "I", data, start)
        if word >> 16:  # a small element: size and type share a word, the data is the other one
            kind, size, start, step = word & 0xFFFF, word >> 16, start + 4, 4
        else:
            kind, size = struct.unpack_from(order + "II", data, start)
            start, step = start + 8, size if kind == _COMPRESSED else -(-size // 8) * 8
        if start + size > len(data):
            raise ValueError("it ends early")
        found.append((kind, data[start : start + size]))
        start += step
    return found


def _matrix(body: bytes, order: str, name: str) -> np.ndarray | None:
    """The matrix of an element of type 14; None where it has another name."""
    (_, flags), (_, shape), (_, label), *parts = _elements(body, order)
    if label.decode("ascii") != name:
        return None
    if struct.unpack_from(order + "I", flags)[0] >> 8 & _COMPLEX or len(parts) != 1:
        raise ValueError(f"{name} is not a matrix of real numbers")
    kind, values = parts[0]
    dimensions = np.frombuffer(shape, order + "i4")
    return np.frombuffer(values, order + _NUMBERS[kind]).astype(np.float64).reshape(dimensions, order="F")


def read_fitted_points(path: Path) -> list[np.ndarray | None]:
    """BP4D's tracked points: `fit.pred` of a level 7.3 file, a (points, 2) array or None for each frame.

    Raises:
        ImportError: h5py is not installed.
        ValueError: the file is damaged or holds something else.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"{path}: MATLAB 7.3 files need h5py (pip install 'aufast[datasets]'); dlib finds landmarks too"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            references = np.asarray(file["fit"]["pred"]).reshape(-1)
            entries = [file[reference] for reference in references]
            # MATLAB writes an empty matrix as its two zero sizes, and says so in an attribute.
            return [
                None if "MATLAB_empty" in entry.attrs or entry.size <= 2 else np.array(entry, np.float64).T
                for entry in entries
            ]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        refuse(path, f"not a file of tracked points (fit.pred): {error}")
