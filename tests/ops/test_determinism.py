"""The same call, the same bits: again, at any number of threads, in another process, alone or in a batch.

Between levels of vector code the bits differ, since sums are cut into other pieces; within one they do not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import aufast
from tests.ops.calls import CALLS, are_equal, compute, forward, make

pytestmark = pytest.mark.skipif(
    not aufast.backends()["cpu"].startswith("ready"), reason="the compiled CPU part is not built"
)
REPOSITORY = Path(__file__).parents[2]
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
# How far two levels may be from each other, relative RMS: roundings of sums in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-7}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
each_call = pytest.mark.parametrize("name", CALLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
# Results that belong to one sample each, by position; the others are sums over the samples.
OF_SAMPLES = {name: (0, 1, 2) if name.startswith("roi") else (0, 1) for name in CALLS}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@each_dtype
@each_call
def test_any_number_of_threads_and_again(name: str, dtype: torch.dtype) -> None:
    inputs = make(name, 5, dtype)
    torch.set_num_threads(1)
    expected = compute(name, inputs)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert are_equal(compute(name, inputs), expected), threads


@each_dtype
@each_call
def test_a_sample_alone_is_the_sample_in_its_batch(name: str, dtype: torch.dtype) -> None:
    """Outputs and the gradients that are a sample's own; also in the reverse order, and beside NaN."""
    size = 5
    inputs = make(name, size, dtype)
    whole = compute(name, inputs)
    batched = [k - 1 for k in OF_SAMPLES[name] if k]
    share = len(whole[0]) // size  # of the batch axis: graph_conv has frames

    def of(sample: int, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[k][sample * share : (sample + 1) * share] for k in OF_SAMPLES[name]]

    def company(order: list[int], broken: int | None = None) -> list[Tensor]:
        chosen = list(inputs)
        for k in batched:
            chosen[k] = torch.cat([inputs[k][j * share : (j + 1) * share] for j in order])
        if broken is not None:
            chosen[0][broken * share : (broken + 1) * share] = torch.nan
        return compute(name, tuple(chosen))

    for sample in range(size):
        assert are_equal(of(0, company([sample])), of(sample, whole)), sample
    for order in ([4, 3, 2, 1, 0], [2, 2, 2]):
        found = company(order)
        assert all(are_equal(of(place, found), of(sample, whole)) for place, sample in enumerate(order))
    beside_nan = company([0, 1, 2, 3, 4], broken=1)
    assert all(are_equal(of(sample, beside_nan), of(sample, whole)) for sample in (0, 2, 3, 4))


def computed_in_this_process() -> dict[str, list[Tensor]]:
    """Every call in every dtype, on one thread and on two with the same bits."""
    results = {}
    for name in CALLS:
        for dtype in TOLERANCE:
            inputs = make(name, 5, dtype)
            torch.set_num_threads(2)
            results[f"{name} {dtype}"] = compute(name, inputs)
            torch.set_num_threads(1)
            assert are_equal(compute(name, inputs), results[f"{name} {dtype}"]), (name, dtype)
    return results


def save(path: str) -> None:
    """In a process of its own, at the level that AUFAST_CPU_ISA names."""
    torch.save(computed_in_this_process(), path)


def in_a_process(call: str, level: str) -> subprocess.CompletedProcess[str]:
    """Call a function of this file in a process that is held to a level."""
    program = f"import sys; sys.path[:] = {sys.path}; from tests.ops import test_determinism as t; t.{call}"
    environment = os.environ | {"AUFAST_CPU_ISA": level}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)


def computed_at(level: str, folder: Path) -> dict[str, list[Tensor]] | None:
    """What a process at a level computes; None where this CPU has not got it."""
    done = in_a_process(f"save({str(folder / level)!r})", level)
    if "asks for more than this CPU has" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return torch.load(folder / level)


def levels_refused() -> None:
    """In a process that is held to a level which does not exist."""
    for name in CALLS:
        with pytest.raises(RuntimeError, match="AUFAST_CPU_ISA must be baseline, avx2, .*, got sse9"):
            forward(name, make(name, 5))


def test_every_operator_refuses_a_level_that_does_not_exist() -> None:
    done = in_a_process("levels_refused()", "sse9")
    assert done.returncode == 0, done.stderr


def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    """This one runs at the best level, unless it is held to one."""
    here = computed_in_this_process()
    held = os.environ.get("AUFAST_CPU_ISA")
    levels = [held] if held else reversed(LEVELS)
    there = next(found for level in levels if (found := computed_at(level, tmp_path)) is not None)
    assert here.keys() == there.keys()
    for call, expected in there.items():
        assert are_equal(here[call], expected), call


@pytest.mark.slow
def test_levels_agree_within_rounding(tmp_path: Path) -> None:
    at_levels = {level: computed_at(level, tmp_path) for level in LEVELS}
    assert at_levels["baseline"] is not None
    for level, results in at_levels.items():
        for call, found in (results or {}).items():
            for actual, expected in zip(found, at_levels["baseline"][call], strict=True):
                error = (actual.double() - expected.double()).norm() / expected.double().norm()
                assert error <= TOLERANCE[actual.dtype], (level, call, float(error))
