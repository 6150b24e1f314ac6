"""Files that appear whole or not at all, folders with one writer, and sums of files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Keep a second writer out of a folder. The lock ends with the process, however it ends.

    Raises:
        ValueError: another process holds it; the sentence says that it is at `purpose`.
    """
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is {purpose} it") from error
        yield


@contextlib.contextmanager
def writing(place: Path, kept: str) -> Iterator[None]:
    """Say what could not be written, and what is `kept`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{place}: cannot be written: {error.strerror}; {kept}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name, and give it its own when it is on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sum(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return stream_sum(file)


def stream_sum(file: BinaryIO) -> str:
    """SHA-256 of what an open file holds from here on, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
