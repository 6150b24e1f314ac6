"""How far a long piece of work is, on standard error."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line that counts; on a terminal it is rewritten, elsewhere it is written now and then.

    Args:
        what: is being done.
        total: number of units.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, what: str, total: int, every: float = 10.0):
        self.what, self.total, self.done = what, total, 0
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else every
        self._start = self._last = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count units as done."""
        self.done += count
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            left = (now - self._start) / self.done * (self.total - self.done) if self.done else 0
            self._write(f"{self.what}: {self.done} of {self.total}, {left:.0f} s left")

    def close(self) -> None:
        """The last line: how many, how long."""
        self._write(f"{self.what}: {self.done} of {self.total} in {time.monotonic() - self._start:.1f} s")
        if self._terminal:
            sys.stderr.write("\n")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r{line}\033[K" if self._terminal else line + "\n")
        sys.stderr.flush()
