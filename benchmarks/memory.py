"""How far a training step's memory rises above its inputs, measured on a fresh process's resident set."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness import THREADS, Run, dtype_name, work

# Every larger block goes back to the system when it is freed, and no workspace is kept between calls, so that
# the resident set is what is in use.
ALLOCATOR = {
    "AUFAST_FRESH_WORKSPACE": "1",
    "MALLOC_MMAP_THRESHOLD_": "4096",
    "MALLOC_TRIM_THRESHOLD_": "4096",
}


def peak_above_inputs(run: Run, module: str | None = None) -> int:
    """Bytes of a forward + backward, its outputs and gradients included, beyond what the inputs take.

    Args:
        run: one of the RUNS of `benchmarks.<module>`, which may have a `work` of its own.
        module: the operator's where None.
    """
    command = [sys.executable, "-m", "benchmarks.memory", module or run.case.operator, str(run)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=os.environ | ALLOCATOR, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {run} failed:\n{done.stderr}")
    return int(done.stdout)


def measure(benchmark, run: Run, what: str, module: str | None = None) -> None:
    """Take down a run's peak as its result, in the group of `what` is measured."""
    benchmark.group = f"{what} memory {dtype_name(run.dtype)}"
    benchmark.extra_info |= run.facts() | {"pass": "memory"}
    benchmark.extra_info["memory"] = benchmark.pedantic(peak_above_inputs, (run, module), rounds=1)


def resident(field: str, process: int | str = "self") -> int:
    """VmRSS (now) or VmHWM (its highest so far) of a process, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no {field}")


def main(operator: str, name: str) -> None:
    torch.set_num_threads(THREADS)
    module = importlib.import_module(f"benchmarks.{operator}")
    run = next(run for run in module.RUNS if str(run) == name)
    call = getattr(module, "work", work)(run)
    call()  # code, thread pools and the libraries' own workspaces are there from now on
    ctypes.CDLL(None).malloc_trim(0)  # and what the allocator holds free is not
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far := now
    before = resident("VmRSS")
    results = call()
    print(resident("VmHWM") - before)
    del results


if __name__ == "__main__":
    main(*sys.argv[1:])
