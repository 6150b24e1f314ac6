"""Collects one file an operator by its name, pins the threads and records the machine."""

from __future__ import annotations

import os

import pytest
import torch

import aufast
from benchmarks.harness import THREADS, compiler

FILES = ("ceilings", "roi_crop", "graph_conv", "graph_gru", "agcrn", "region_conv", "models")


def pytest_configure(config: pytest.Config) -> None:
    for name in FILES:
        config.addinivalue_line("python_files", f"benchmarks/{name}.py")
    # PyTorch's compiler trips over its own deprecation.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script_method`:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The ceilings first: a machine that is busy shows there before anything else is timed."""
    items.sort(key=lambda item: FILES.index(item.path.stem) if item.path.stem in FILES else -1)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["aufast"] = {
        "version": aufast.__version__,
        "torch": torch.__version__,
        "threads": THREADS,
        "cores": len(os.sched_getaffinity(0)),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "AUFAST_CPU_ISA": os.environ.get("AUFAST_CPU_ISA", ""),
        "compiler": compiler() or "",
        "backends": aufast.backends(),
    }
