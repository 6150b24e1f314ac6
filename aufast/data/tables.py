"""Text tables to numbers; whatever does not fit is named by file, line and value."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np


def refuse(path: Path, reason: str, line: int | None = None) -> NoReturn:
    """Raise one sentence that begins with the file, and the line where there is one (from 1)."""
    raise ValueError(f"{path}{'' if line is None else f', line {line}'}: {reason}")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, without blank ones at its end.

    Raises:
        ValueError: the file is missing, empty or not text, or a line within it is blank: rows are counted.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        refuse(path, f"cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        refuse(path, "the file is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            refuse(path, "the line is blank", number)
    return lines


def integers(path: Path, lines: Sequence[str], columns: int, first_line: int) -> np.ndarray:
    """Comma-separated integers, int64 (n, columns).

    Args:
        path: for messages.
        lines: n rows of the file.
        columns: how many values each must hold.
        first_line: the number of the first of them in the file, from 1.
    """
    if not lines:
        return np.empty((0, columns), np.int64)
    try:
        values = np.loadtxt(lines, dtype=np.int64, delimiter=",", comments=None, ndmin=2)
        if values.shape == (len(lines), columns):
            return values
    except ValueError:
        pass  # the message below says more than NumPy's
    for number, line in enumerate(lines, first_line):
        cells = line.split(",")
        if len(cells) != columns:
            refuse(path, f"{len(cells)} values, expected {columns}", number)
        for cell in cells:
            try:
                np.int64(int(cell))
            except (ValueError, OverflowError):
                refuse(path, f"{cell.strip()!r} is not a whole number", number)
    refuse(path, "the numbers could not be read")


def header(path: Path, line: str) -> list[str]:
    """Column names of the first line, each once."""
    names = [name.strip() for name in next(csv.reader([line]))]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        refuse(path, f"column {twice[0]!r} is there twice", 1)
    return names


def occurrences(
    path: Path,
    values: np.ndarray,
    aus: Sequence[int],
    first_line: int,
    *,
    missing: Collection[int],
    highest: int = 1,
    positive_from: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes to labels and their mask.

    Args:
        path: for messages.
        values: integers (n, m).
        aus: the m AUs.
        first_line: line of the first row in the file.
        missing: codes that mean nobody decided.
        highest: the largest code there is; 1 for occurrence, 5 for intensity.
        positive_from: the smallest code that counts as an occurrence.

    Returns:
        labels int8 (n, m), 0 where missing, and mask bool (n, m).

    Raises:
        ValueError: another code.
    """
    coded = ~np.isin(values, list(missing))
    wrong = coded & ((values < 0) | (values > highest))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        codes = f"0 to {highest}" + "".join(f" or {code} (not coded)" for code in missing)
        refuse(
            path, f"AU {aus[column]} has the code {values[row, column]}, expected {codes}", first_line + row
        )
    return (coded & (values >= positive_from)).astype(np.int8), coded


def increasing(path: Path, numbers: np.ndarray, first_line: int) -> np.ndarray:
    """Frame numbers (n,), each larger than the one before."""
    wrong = np.flatnonzero(np.diff(numbers) <= 0)
    if wrong.size:
        row = int(wrong[0]) + 1
        refuse(path, f"frame {numbers[row]} follows frame {numbers[row - 1]}", first_line + row)
    return numbers
