"""Every barrier of the persistent graph-GRU is needed, and the emulator sees it when one is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.emulator.building import ROOT, emulated

BARRIER = re.compile(r"group\.sync\(\);|__syncthreads\(\);|if \(w\.clusters\) cluster_sync\(\);")
SWITCH = """#include <cstdlib>
inline int missing_barrier() {
  const char* number = getenv("MISSING_BARRIER");
  return number == nullptr ? 0 : atoi(number);
}
"""
# Runs in a process of its own: the kernels with the switch take the operators' place there.
RUN = """
import os, sys
import torch
from tests.cuda.test_graph_gru import Size, gru_grads, run
torch.ops.load_library(sys.argv[1])
right = {}
for missing in range(int(sys.argv[2]) + 1):
    seen = False
    for batch in (9, 131):
        inputs, lengths = Size(batch, 3, 3, 4, 20, 2).tensors(torch.float32)
        for order in range(4):
            os.environ["MISSING_BARRIER"], os.environ["AUFAST_EMULATED_ORDER"] = str(missing), str(order)
            try:
                found = run(inputs, gru_grads(inputs), lengths, "global")
            except (RuntimeError, AssertionError):
                seen = True
                continue
            expected = right.setdefault(batch, found)
            seen = seen or not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    print(missing, "seen" if seen else "unseen")
"""


def switchable(folder: Path) -> tuple[Path, int]:
    """The kernels with a switch at each barrier, and how many there are."""
    count = 0

    def numbered(barrier: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return f"if (missing_barrier() != {count}) {{ {barrier[0]} }}"

    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda")
    shutil.copytree(ROOT / "csrc" / "common", folder / "common")
    (folder / "cuda" / "switch.cuh").write_text("#pragma once\n" + SWITCH)
    for direction in ("forward", "backward"):
        header = folder / "cuda" / f"graph_gru_{direction}.cuh"
        text = BARRIER.sub(numbered, header.read_text(encoding="utf-8"))
        header.write_text(
            text.replace("#pragma once", '#pragma once\n#include "switch.cuh"'), encoding="utf-8"
        )
    return folder / "cuda" / "graph_gru.cu", count


@pytest.mark.slow
def test_a_missing_barrier_is_seen(tmp_path: Path) -> None:
    source, count = switchable(tmp_path)
    assert count == 12
    command = [sys.executable, "-c", RUN, str(emulated(source)), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 unseen", *(f"{number} seen" for number in range(1, count + 1))]
