"""The crew of csrc/cpu/crew.h, the one place where threads wait for each other, under the thread sanitizer.

It is compiled alone, with plain threads in place of torch's pool: that pool is OpenMP's, whose own waiting
the sanitizer does not see, so that it calls every loop of torch a race.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.harness import compiler

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
# Each item of a phase reads what two items of the phase before wrote, so that whoever leaves a phase early or
# does not see its numbers is a race, and the sum at the end is wrong. Threads that are started late or not at
# all leave their share to the others.
PROGRAM = """
#include <sched.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
struct alignas(128) CrewSeat {
  uint64_t word;
  int arrived;
};
#include "crew.h"

int main() {
  for (int round = 0; round < 60; ++round)
    for (int members : {1, 2, 3, 5})
      for (int absent = 0; absent < members; ++absent) {
        const int64_t items = 1 + (round * 7) % 23, phases = 12;
        std::vector<CrewSeat> seats(members);
        int64_t finished = 0;
        std::vector<int64_t> now(items, 1), next(items);
        auto work = [&](int me) {
          Crew crew(seats.data(), &finished, members, me);
          int64_t *from = now.data(), *to = next.data();
          for (int64_t phase = 0; phase < phases; ++phase) {
            crew.phase(items, [=](int64_t k) {
              if (k % 3 == 0) sched_yield();  // else one of them does it all on a machine of few cores
              to[k] = from[k] + from[(k + 1) % items];
            });
            int64_t* old = from;
            from = to;
            to = old;
          }
        };
        std::vector<std::thread> threads;
        for (int me = absent; me < members; ++me) threads.emplace_back(work, me);
        for (auto& thread : threads) thread.join();
        for (int64_t k = 0; k < items; ++k)
          if (now[k] != int64_t{1} << phases) return std::printf("wrong numbers\\n"), 1;
      }
  std::printf("right\\n");
}
"""
RELAXED = [f"-U__ATOMIC_{name}" for name in ("ACQUIRE", "ACQ_REL")]
RELAXED += [f"-D__ATOMIC_{name}=__ATOMIC_RELAXED" for name in ("ACQUIRE", "ACQ_REL")]


def run(folder: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Compile the program and run it, without the random addresses that the sanitizer cannot place."""
    if compiler() is None or shutil.which("setarch") is None:
        pytest.skip("there is no C++ compiler, or no setarch")
    (folder / "crew.cpp").write_text(PROGRAM)
    command = [compiler(), "-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{SOURCES}", *flags]
    built = subprocess.run([*command, "crew.cpp", "-o", "crew"], cwd=folder, capture_output=True, text=True)
    if "tsan" in built.stderr and built.returncode:
        pytest.skip("this compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    start = ["setarch", platform.machine(), "-R", "./crew"]
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # no other sanitizer
    return subprocess.run(start, cwd=folder, env=clean, capture_output=True, text=True, timeout=300)


def test_a_crew_has_no_race(tmp_path: Path) -> None:
    done = run(tmp_path, [])
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


def test_the_sanitizer_sees_a_crew_that_does_not_wait_for_memory(tmp_path: Path) -> None:
    """Without it the test above would prove nothing."""
    done = run(tmp_path, RELAXED)
    assert "data race" in done.stderr
