"""Builds a .cu source for the CPU, with tests/cuda/emulator in place of a GPU."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
TORCH = Path(torch.__file__).parent
FLAGS = (
    "-std=c++20 -O2 -g -fPIC -shared -Wall -Werror -Wno-unknown-pragmas -Wno-psabi -fno-strict-aliasing"
    " -U_FORTIFY_SOURCE -DTORCH_TARGET_VERSION=0x020b000000000000"
).split()


def emulated(source: Path) -> Path:
    """The shared library of `source`, kept in build/ as long as what it is made of does not change.

    Headers beside `source` come before those of csrc/cuda.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    headers = [
        *Path(__file__).parent.glob("*.h"),
        *(ROOT / "csrc").glob("c*/*.*h"),
        *source.parent.glob("*.*h"),
    ]
    content = b"".join(path.read_bytes() for path in [source, *sorted(headers)])
    recipe = " ".join([*compiler, *FLAGS, torch.__version__]).encode()
    target = (
        ROOT / "build" / "emulator" / f"{source.stem}-{hashlib.sha256(content + recipe).hexdigest()[:16]}.so"
    )
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        folders = ["-isystem", TORCH / "include", "-I", ROOT / "csrc" / "cuda", "-I", Path(__file__).parent]
        command = [*compiler, *FLAGS, *folders, "-x", "c++", source, "-o", unfinished]
        done = subprocess.run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        unfinished.rename(target)
    return target
