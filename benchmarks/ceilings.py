"""What this machine can do at most: multiply-adds of its widest vector unit, sgemm, stream copy, fill."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.harness import THREADS, compiler

SOURCE = Path(__file__).with_name("ceilings.cpp")
STEPS = 1_000_000  # of a dozen vector instructions each: a few milliseconds
MATRIX = 2048
STREAM = 64 * 2**20  # float32 elements: beyond the caches
CACHED = 2 * 2**20  # in the last cache, beyond those of the cores
ROUNDS = 15


@functools.cache
def native(command: str) -> ctypes.CDLL:
    """The compiled loops, kept in the user's cache folder for as long as the source stays the same."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aufast"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(SOURCE.read_bytes() + command.encode()).hexdigest()[:16]
    library = folder / f"ceilings-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch, library.name)
            flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread"]
            subprocess.run([command, *flags, str(SOURCE), "-o", str(built)], check=True)
            built.replace(library)
    loops = ctypes.CDLL(str(library))
    loops.unit.restype = ctypes.c_char_p
    loops.operations.restype = ctypes.c_int64
    loops.operations.argtypes = loops.run.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    return loops


def record(benchmark, name: str, unit: str, **amount: int) -> None:
    """Mark a benchmark as a ceiling: `flops` or `bytes` of one round, and what does the work."""
    benchmark.group = "ceilings"
    benchmark.extra_info |= {"ceiling": name, "unit": unit, **amount}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fma(benchmark, dtype: str) -> None:
    command = compiler()
    if command is None:
        pytest.skip("FMA rate not measured: no compiler")
    loops, low = native(command), int(dtype == "bfloat16")
    unit = loops.unit(low).decode()
    if not unit:
        pytest.skip(f"FMA rate not measured: this CPU has no {dtype} vector unit that we know")
    record(benchmark, f"fma {dtype}", unit, flops=loops.operations(low, STEPS, THREADS))
    benchmark.pedantic(loops.run, (low, STEPS, THREADS), rounds=100, warmup_rounds=10)


def test_sgemm(benchmark) -> None:
    a, b = torch.randn(2, MATRIX, MATRIX, generator=torch.Generator().manual_seed(0))
    out = torch.empty(MATRIX, MATRIX)
    record(benchmark, "sgemm", f"torch, {MATRIX}³", flops=2 * MATRIX**3)
    benchmark.pedantic(torch.mm, (a, b), {"out": out}, rounds=ROUNDS, warmup_rounds=2)


def test_copy(benchmark) -> None:
    source, target = torch.ones(STREAM), torch.zeros(STREAM)
    record(benchmark, "copy", f"{4 * STREAM >> 20} MiB", bytes=2 * 4 * STREAM)
    benchmark.pedantic(target.copy_, (source,), rounds=ROUNDS, warmup_rounds=2)


def test_cached_copy(benchmark) -> None:
    source, target = torch.ones(CACHED), torch.zeros(CACHED)
    record(benchmark, "cached copy", f"{4 * CACHED >> 20} MiB", bytes=2 * 4 * CACHED)
    benchmark.pedantic(target.copy_, (source,), rounds=20 * ROUNDS, warmup_rounds=20)


def test_fill(benchmark) -> None:
    target = torch.zeros(STREAM)
    record(benchmark, "fill", f"{4 * STREAM >> 20} MiB", bytes=4 * STREAM)
    benchmark.pedantic(target.fill_, (1.0,), rounds=ROUNDS, warmup_rounds=2)
