"""Files that are whole or not there, and what killed writers leave of them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from socket import gethostname

import pytest

from aufast import files
from aufast.files import Draft, remove_leftovers, write_whole


def child(work: Callable[[], None], monkeypatch: pytest.MonkeyPatch, stop: signal.Signals) -> int:
    """A process at `work` that gets a signal when its data is about to be forced to the disk."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            monkeypatch.setattr(files.os, "fsync", lambda _: os.kill(os.getpid(), stop))
            work()
            os._exit(0)
        os._exit(1)
    return process


def drafts(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a [1].json"  # the brackets are no pattern
    process = child(lambda: write_whole(path, b"lost"), monkeypatch, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    (left,) = drafts(tmp_path)
    assert left.read_bytes() == b"lost" and not path.exists()
    write_whole(tmp_path / "b.json", b"another file")
    assert drafts(tmp_path) == [left], "it is no business of another file's"
    write_whole(path, b"whole")
    assert path.read_bytes() == b"whole" and drafts(tmp_path) == []


def test_a_living_writers_draft_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    """One process is stopped before its file has its name; another writes the same file meanwhile."""
    path = tmp_path / "a.json"
    process = child(lambda: write_whole(path, b"slow"), monkeypatch, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process, os.WUNTRACED)[1])
    (alive,) = drafts(tmp_path)
    write_whole(path, b"fast")
    assert path.read_bytes() == b"fast" and drafts(tmp_path) == [alive]
    os.kill(process, signal.SIGCONT)
    assert os.waitpid(process, 0)[1] == 0
    assert path.read_bytes() == b"slow" and drafts(tmp_path) == []


def test_a_killed_writers_folder_goes_whole(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        draft = Draft(tmp_path / "data", folder=True)
        (draft.place / "inner").mkdir()
        (draft.place / "inner" / "file").write_bytes(b"lost")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    with Draft(tmp_path / "data", folder=True) as living:
        assert len(drafts(tmp_path)) == 2
        remove_leftovers(tmp_path / "data")
        assert drafts(tmp_path) == [living.place]
        living.commit()
    assert drafts(tmp_path) == [] and (tmp_path / "data").is_dir()


def test_writers_at_the_same_time_do_not_meet(tmp_path: Path) -> None:
    """Threads that write one file over and over, each clearing up before it writes."""
    path, failures = tmp_path / "a", []

    def work(content: bytes) -> None:
        try:
            for _ in range(100):
                write_whole(path, content)
        except Exception as error:
            failures.append(error)

    contents = [bytes([k]) * 1000 for k in range(4)]
    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and path.read_bytes() in contents and drafts(tmp_path) == []


def test_a_draft_that_is_taken_for_a_leftover_before_it_is_locked(tmp_path: Path, monkeypatch) -> None:
    """Between its making and its lock it looks like a dead writer's: then the writer takes another."""
    lock, taken = files.fcntl.flock, []

    def cleared_first(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(drafts(tmp_path))
            remove_leftovers(tmp_path / "a")
        lock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", cleared_first)
    write_whole(tmp_path / "a", b"whole")
    assert len(taken) == 1 and not taken[0].exists()
    assert (tmp_path / "a").read_bytes() == b"whole" and drafts(tmp_path) == []


def test_without_locks_files_are_written_and_leftovers_stay(tmp_path: Path, monkeypatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    left = tmp_path / f".a.{gethostname()}.0123.tmp"
    left.write_bytes(b"perhaps a living writer's")
    write_whole(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole" and drafts(tmp_path) == [left]
    monkeypatch.undo()
    write_whole(tmp_path / "a", b"whole")
    assert drafts(tmp_path) == []


def test_what_another_machine_left_is_its_own(tmp_path: Path) -> None:
    """The locks of a shared folder may be known to one machine alone."""
    theirs = tmp_path / f".a.not-{gethostname()}.0123.tmp"
    theirs.write_bytes(b"perhaps a living writer's")
    write_whole(tmp_path / "a", b"whole")
    assert drafts(tmp_path) == [theirs]
