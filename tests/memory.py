"""What a process holds in memory of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest


def own_memory(pid: int | None = None) -> float:
    """MiB of a process, this one by default, that are its own; mapped files are the system's."""
    status = Path("/proc") / str(os.getpid() if pid is None else pid) / "status"
    if not status.exists():
        pytest.skip("reads /proc/PID/status")
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status.read_text())[0]) / 1024
