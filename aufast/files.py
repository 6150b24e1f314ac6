"""Files that appear whole or not at all, folders with one writer, and sums of files."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname
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


class Draft:
    """A hidden file or folder beside the place that it takes when it is whole.

    Each has a name and a lock of its own. The lock ends with the process, however it ends: so
    `remove_leftovers` knows what a dead writer left, and touches no living one's.

    Args:
        path: where it will be.
        folder: whether it is one.

    Attributes:
        place: where it is until then, empty at first.
    """

    def __init__(self, path: Path, folder: bool = False):
        self.path = path
        self._lock: int | None = None
        while self._lock is None:
            self.place = path.with_name(f".{path.name}.{gethostname()}.{secrets.token_hex(8)}.tmp")
            self.place.mkdir() if folder else self.place.touch(exist_ok=False)
            # Until it is locked it looks like a leftover, and may be gone.
            with contextlib.suppress(FileNotFoundError):
                self._lock = _open(self.place)
                # A file system may have no locks: then nobody clears up either.
                with contextlib.suppress(OSError):
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if not self.place.exists():
                    self._close()

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def commit(self) -> None:
        """Give it its place."""
        os.replace(self.place, self.path)
        self._close()

    def discard(self) -> None:
        """Remove it, unless it has its place."""
        if self._lock is not None:
            _remove(self.place)
            self._close()

    def _close(self) -> None:
        os.close(self._lock)
        self._lock = None


def remove_leftovers(path: Path) -> None:
    """Remove what dead writers left of this path, and of paths that begin with it and go on with a dot.

    Those of this machine: another's locks may be its own business.
    """
    for place in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not place.name.rsplit(".", 2)[0].endswith(f".{gethostname()}"):
            continue
        with contextlib.suppress(OSError):  # a living writer's, or gone
            lock = _open(place)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(place)
            finally:
                os.close(lock)


def _open(place: Path) -> int:
    """A descriptor to lock: some file systems lock only files that could be written."""
    return os.open(place, os.O_RDONLY if place.is_dir() else os.O_RDWR)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name, and give it its own when it is on disk."""
    remove_leftovers(path)
    with Draft(path) as draft:
        with open(draft.place, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.commit()


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
