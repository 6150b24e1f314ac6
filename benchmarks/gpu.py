"""Check and time the operators on a GPU: `benchmarks/gpu.sh` runs this where the package was built.

    python -m benchmarks.gpu check [NAME...]            what must hold before anything is timed
    python -m benchmarks.gpu time [OPERATOR...]         ceilings, then every provider; writes a record
    python -m benchmarks.gpu bars RECORD.json...        the table of records

A record has the format of `benchmarks/results/`, so `python -m benchmarks.table` reads it too.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import aufast
from aufast.files import write_whole
from benchmarks import gpu_cases, gpu_checks, table
from benchmarks.harness import Run, WrongResultError, check, compiler, work

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FLUSHED = 1 << 30  # bytes written before a round: empties the second cache, and gives time to queue a call
SECONDS, ROUNDS = 0.25, (10, 200)  # of a run
COPIED, MATRIX = 1 << 28, 8192
COMPILING = 240.0  # seconds that one compiled run may take


def measure(call: Callable[[], object], device: str) -> dict[str, float | int]:
    """Median and spread in seconds: on a GPU between two events, behind a write that clears the caches."""
    for _ in range(3):
        call()
    times: list[float] = []
    fewest, most = ROUNDS
    if device == "cuda":
        flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
        torch.cuda.synchronize()
    begin = time.perf_counter()
    while len(times) < fewest or (len(times) < most and time.perf_counter() - begin < SECONDS):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()  # the GPU is busy with it while the call is queued
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median": statistics.median(times),
        "iqr": quartiles[2] - quartiles[0],
        "rounds": len(times),
        "min": min(times),
    }


def ceilings(device: str, copied: int = COPIED, matrix: int = MATRIX) -> dict[str, dict[str, Any]]:
    """What the device does at most: a copy, and large matrix products."""
    found = {}
    source = torch.randn(copied, device=device)
    target = torch.empty_like(source)
    best = measure(lambda: target.copy_(source), device)["min"]
    found["copy"] = {"unit": f"{4 * copied >> 20} MiB, read and written", "rate": 8 * copied / best}
    for name, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16)):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(matrix, matrix, device=device).to(dtype) for _ in range(2))
        best = measure(lambda a=a, b=b: a @ b, device)["min"]
        torch.set_float32_matmul_precision(before)
        found[f"matmul {name}"] = {"unit": f"torch, {matrix}³", "rate": 2 * matrix**3 / best}
    return found


def git(*arguments: str) -> str | None:
    """What git prints, None where there is no repository or no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def driver() -> str:
    """The GPU's driver, as its tool names it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def processor() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].partition(": ")[2] if found else platform.machine()


def about(device: str) -> dict[str, Any]:
    """The record's facts: date, commit, machine, versions."""
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    machine = {
        "cpu": processor(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "AUFAST_CPU_ISA": os.environ.get("AUFAST_CPU_ISA", ""),
        "system": f"{platform.system()} {platform.release()}",
    }
    versions = {
        "aufast": aufast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": compiler() or "",
    }
    if device == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(), "driver": driver()}
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        build = json.loads(Path(aufast.__file__).with_name("_build.json").read_text())
        versions["built"] = build["cuda"]["reason"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "commit": commit,
        "uncommitted": bool(changes),
        "machine": machine,
        "versions": versions,
        "backends": aufast.backends(),
        "threads": torch.get_num_threads(),
    }


def timed(run: Run, device: str) -> dict[str, Any]:
    """Check a run where it can be checked, then time it; the record's line."""
    if run.provider not in gpu_cases.YARDSTICKS:
        check(run)
    stats = measure(work(run), device)
    return run.facts() | {key: stats[key] for key in ("median", "iqr", "rounds")}


class OutOfTime(BaseException):
    """Past every `except Exception` of a compiler."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what takes longer."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def record(
    runs: list[Run], device: str, seconds: float, found: dict[str, dict[str, Any]], path: Path
) -> tuple[dict[str, Any], list[str]]:
    """Time every run as long as there is time; the record, and the runs that were wrong or left out.

    The record is written after every run: whatever ends this process, what was measured is there.
    """
    results, left = [], []
    written = about(device) | {"ceilings": found, "results": results, "not timed": left}
    begin = time.perf_counter()
    for run in runs:
        name = f"{run.case.operator} {run}"
        rest = seconds - (time.perf_counter() - begin)
        if rest < 0:
            left.append(f"{name}: no time left")
            continue
        limit = min(rest, COMPILING) if run.provider in gpu_cases.COMPILED else None
        try:
            with contextlib.nullcontext() if limit is None else limited(limit):
                results.append(timed(run, device))
            print(f"  {results[-1]['median'] * 1e6:12.1f} µs  {name}", flush=True)
        except OutOfTime:
            left.append(f"{name}: not compiled and timed within {limit:.0f} s")
            print(f"  not timed        {left[-1]}", flush=True)
        except (WrongResultError, RuntimeError) as error:
            left.append(f"{name}: {' '.join(str(error).split())[:300]}")
            print(f"  not timed        {left[-1]}", flush=True)
        keep(written, path)
    keep(written, path)
    return written, left


def keep(written: dict[str, Any], path: Path) -> None:
    write_whole(path, (json.dumps(written, indent=1, ensure_ascii=False) + "\n").encode())


def run_checks(device: str, names: list[str]) -> int:
    """Print what every check found; the number of failures."""
    failures = 0
    for name in names:
        print(name, flush=True)
        try:
            found = 0
            for found, line in enumerate(gpu_checks.CHECKS[name](device), start=1):  # noqa: B007
                print(f"  ok      {line}", flush=True)
            if not found:
                raise gpu_checks.Failed(
                    "there is nothing to check: no backend but the reference can run here"
                )
        except gpu_checks.Skipped as reason:
            print(f"  skipped {reason}", flush=True)
        except (gpu_checks.Failed, RuntimeError) as error:
            failures += 1
            print(f"  FAILED  {error}", flush=True)
    print(f"{len(names) - failures} of {len(names)} checks passed or were skipped with their reason")
    return failures


def run_times(options: argparse.Namespace) -> int:
    """Time the operators, write the record and print its table; the number of runs left out."""
    found = ceilings(options.device)
    for name, ceiling in found.items():
        print(f"  {ceiling['rate'] / 1e9:12.1f} G/s  {name}", flush=True)
    cases = [case for name in options.names for case in gpu_cases.CASES[name](options.device)]
    runs = gpu_cases.runs(cases, options.device)
    kept = [run for run in runs if options.only in f"{run.case.operator} {run}"]
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-") if options.device == "cuda" else "cpu"
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    path = options.out or RESULTS / "local" / f"{now}-{gpu}-{'-'.join(options.names)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    written, left = record(kept, options.device, 60 * options.minutes, found, path)
    print(table.render(written))
    print(*("not timed: " + line for line in left), f"kept in {path}", sep="\n")
    return len(left)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    stages = parser.add_subparsers(dest="stage", required=True)
    checks = stages.add_parser("check", help="what must hold before anything is timed")
    checks.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(gpu_checks.CHECKS)}")
    times = stages.add_parser("time", help="ceilings, then every provider of these operators")
    times.add_argument("names", nargs="*", metavar="OPERATOR", help=f"of {', '.join(gpu_cases.CASES)}")
    times.add_argument("--minutes", type=float, default=8.0, help="start no run after (default: %(default)s)")
    times.add_argument("--only", default="", metavar="TEXT", help="runs whose name holds this")
    times.add_argument("--out", type=Path, metavar="FILE", help="the record; default: in results/local/")
    tables = stages.add_parser("bars", help="the table of records")
    tables.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    options = parser.parse_args(arguments)
    if options.stage != "bars":
        known = gpu_checks.CHECKS if options.stage == "check" else gpu_cases.CASES
        unknown = [name for name in options.names if name not in known]
        if unknown:
            parser.error(f"{options.stage}: no {unknown[0]!r}; there are {', '.join(known)}")
        options.names = options.names or list(known)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.stage == "bars":
        for path in options.records:
            print(table.render(json.loads(path.read_text())))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "this PyTorch sees no CUDA device: nothing was measured, every GPU bar stays open",
            file=sys.stderr,
        )
        return 2
    if options.stage == "check":
        return min(run_checks(options.device, options.names), 1)
    return min(run_times(options), 1)


if __name__ == "__main__":
    sys.exit(main())
