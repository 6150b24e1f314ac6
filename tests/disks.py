"""Disks that are full or read-only, for real: a file system in memory that only one process sees."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A user and mount namespace of its own needs no rights, and nothing of it is left when the process ends.
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
_MOUNT = 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"'


@lru_cache
def _refused() -> str:
    """Why no disk can be mounted here; empty where one can."""
    try:
        done = subprocess.run(
            [*_UNSHARE, _MOUNT, "sh", "size=64k", "/mnt", "true"], capture_output=True, text=True
        )
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""


def run_on_disk(options: str, folder: Path, script: str, *arguments: object) -> str:
    """What a Python script prints when `folder` is a file system of its own while it runs.

    Args:
        options: of the mount, such as "size=400k" or "ro".
        folder: an empty one.
        script: the program; it may `mount -o remount,…` the folder. It fails the test where it raises.
        arguments: its words.
    """
    if reason := _refused():
        pytest.skip(f"no file system can be mounted here: {reason}")
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        [*_UNSHARE, _MOUNT, "sh", options, str(folder), *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
