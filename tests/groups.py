"""What a group of processes leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest


def group_threads() -> list[str]:
    """The threads of this process that serve a group of processes over gloo."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("reads /proc/self/task")
    names = ((task / "comm").read_text().strip() for task in tasks.iterdir())
    return [name for name in names if "gloo" in name]
