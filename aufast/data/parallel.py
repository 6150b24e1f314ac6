"""Many independent pieces of work over processes, with their progress on standard error."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Progress:
    """One line that counts; on a terminal it is rewritten, elsewhere it is written now and then.

    Args:
        what: is being done.
        total: number of units.
        done: how many of them were done before.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, what: str, total: int, done: int = 0, every: float = 10.0):
        self.what, self.total, self.done, self._before = what, total, done, done
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else every
        self._start = self._last = time.monotonic()

    def update(self, note: str = "") -> None:
        """Count a unit as done; `note` says more about it."""
        self.done += 1
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            left = (now - self._start) / (self.done - self._before) * (self.total - self.done)
            self._write(f"{self.what}: {self.done} of {self.total}, {left:.0f} s left{note}")

    def close(self) -> None:
        """The last line: how many, how long."""
        self._write(f"{self.what}: {self.done} of {self.total} in {time.monotonic() - self._start:.1f} s")
        if self._terminal:
            sys.stderr.write("\n")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r{line}\033[K" if self._terminal else line + "\n")
        sys.stderr.flush()


def run_all(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, what: str
) -> Iterator[Result]:
    """Results of `function(job)`, in whatever order they are ready.

    Args:
        function: of a module, so that another process finds it.
        jobs: what it is called with; they can be pickled.
        workers: processes; 1 works in this one.
        what: is being done, for the line of progress.

    Raises:
        ValueError: workers is below 1.
        ChildProcessError: a process was ended from outside, for want of memory perhaps.
        Exception: the first that `function` raised; what is not begun yet is not begun.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    progress = Progress(what, len(jobs))
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            yield function(job)
            progress.update()
        progress.close()
        return
    # Spawned, not forked: a fork copies the locks of torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
                progress.update()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"{what}: a process was ended from outside; was there too little memory?"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    progress.close()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
