"""What may happen around a call of a compiled CPU operator: forks, threads, interrupts, no memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import aufast
from tests.ops.calls import CALLS, NODES, are_equal, compute, forward, graph_parameters, make, randn

pytestmark = pytest.mark.skipif(
    not aufast.backends()["cpu"].startswith("ready"), reason="the compiled CPU part is not built"
)
REPOSITORY = Path(__file__).parents[2]
LARGE = {"roi_crop": 300, "region_conv": 300, "graph_conv": 3000, "graph_gru": 500}  # a good part of a second
each_operator = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run_in_process(program: Callable[[], None]) -> subprocess.Popen[str]:
    """A function of this file, in a process of its own."""
    lines = (f"import sys; sys.path[:] = {sys.path}", "from tests.ops import test_faults")
    command = [sys.executable, "-c", "\n".join([*lines, f"test_faults.{program.__name__}()"])]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


@each_operator
def test_a_forked_child_computes_what_its_parent_did(name: str, two_threads: None) -> None:
    """As a data loader's worker does: after the parent's threads have run, and with one thread of its own."""
    before = compute(name, make(name, 2))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            # Autograd refuses to run in the child of a process that used it; the kernel itself must not mind.
            with torch.no_grad():
                status = 0 if torch.equal(forward(name, make(name, 2)), before[0]) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert are_equal(compute(name, make(name, 2)), before)


def computed_beside(name: str, sizes: tuple[int, ...], threads: tuple[int, ...]) -> bool:
    """Whether Python threads, each with its own number of torch threads, get what one alone gets."""
    inputs = [make(name, size) for size in sizes]
    alone = [compute(name, each) for each in inputs]
    start = threading.Barrier(len(threads))

    def work(k: int) -> bool:
        torch.set_num_threads(threads[k])
        start.wait()
        return all(are_equal(compute(name, inputs[j]), alone[j]) for _ in range(3) for j in range(len(sizes)))

    with ThreadPoolExecutor(len(threads)) as pool:
        return all(pool.map(work, range(len(threads))))


@each_operator
def test_python_threads_do_not_disturb_each_other(name: str, two_threads: None) -> None:
    """In place of a thread sanitizer (docs/traps.md): a race that matters changes a bit sooner or later."""
    assert computed_beside(name, (1, 2, 5), (1, 2, 3, 7))


def test_operators_called_from_threads_at_once_do_not_disturb_each_other(two_threads: None) -> None:
    """All of them share the workspaces that threads keep between calls."""
    inputs = {name: make(name, 3) for name in CALLS}
    alone = {name: compute(name, each) for name, each in inputs.items()}
    start = threading.Barrier(len(CALLS))

    def work(first: int) -> bool:
        torch.set_num_threads(1 + first % 3)
        start.wait()
        turn = [*CALLS][first:] + [*CALLS][:first]
        return all(are_equal(compute(name, inputs[name]), alone[name]) for _ in range(3) for name in turn)

    with ThreadPoolExecutor(len(CALLS)) as pool:
        assert all(pool.map(work, range(len(CALLS))))


def interrupted_calls() -> None:
    """Every operator in calls of a good part of a second, until an interrupt; then a small call."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have it ignored
    torch.set_num_threads(2)
    for name, size in LARGE.items():
        before, inputs = compute(name, make(name, 2)), make(name, size)
        say("started")
        try:
            while True:
                compute(name, inputs)
        except KeyboardInterrupt:
            assert are_equal(compute(name, make(name, 2)), before), name
        say("survived")


def test_an_interrupt_ends_a_long_call_and_the_next_one_is_right() -> None:
    process = run_in_process(interrupted_calls)
    for name in LARGE:
        assert process.stdout.readline() == "started\n", process.stderr.read()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "survived\n", (name, process.stderr.read())
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    process.stderr.close()


def calls_without_memory() -> None:
    """Calls whose result or whose threads' own buffers do not fit, each followed by small ones."""
    import resource

    torch.set_num_threads(2)
    expected = {name: compute(name, make(name, 2)) for name in CALLS}
    wide, box = torch.zeros(2, 1, 4096, 4096), torch.tensor([0.0, 0.0, 4096.0, 4096.0])
    patch = torch.zeros(1, 1, 4096, 4096), torch.zeros(1, 1, 1, 1, 3, 3)
    nodes = torch.zeros(1, 1, 1, 12).expand(4096, 1024, NODES, 12), *graph_parameters(29, 17, 3)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (300 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    calls = {
        "the crops": ("roi_crop", (torch.zeros(1, 64, 8, 8), box.expand(1, 10**6, 4))),
        "a thread's tile of the map": ("roi_crop", (wide, box.expand(2, 1, 4))),
        "a patch's buffer": ("region_conv", patch),
        "the states": ("graph_gru", nodes),
        "the frames": ("graph_conv", (nodes[0].flatten(0, 1), *graph_parameters(12, 17, 1))),
    }
    for what, (name, inputs) in calls.items():
        try:
            with torch.no_grad():
                getattr(aufast.ops, name)(*inputs, backend="cpu")
        except (RuntimeError, MemoryError):
            pass
        else:
            raise AssertionError(f"{what}: there was enough memory")
        for other in CALLS:
            assert are_equal(compute(other, make(other, 2)), expected[other]), f"{other} after {what}"
    say("survived")


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs the address space"
)
def test_a_call_without_memory_raises_and_the_next_one_is_right() -> None:
    out, err = run_in_process(calls_without_memory).communicate(timeout=300)
    assert out == "survived\n", err


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
def test_crops_from_behind_two_to_the_31_elements(layout: torch.memory_format) -> None:
    """The map's pages are never written but for the corner, so that no memory of its size is needed."""
    side, channels = 23_200, 4
    try:
        features = torch.empty(1, channels, side, side, dtype=torch.bfloat16, memory_format=layout)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of addresses are not to be had: {error}")
    assert features.numel() > 2**31
    corner = features[..., -8:, -8:]
    corner.copy_(randn(1, channels, 8, 8))
    edge = float(side)
    boxes = torch.tensor([[[edge - 7, edge - 6, edge - 1, edge - 2]]], dtype=torch.float64)
    found = aufast.ops.roi_crop(features, boxes, (4, 4), backend="cpu")
    expected = aufast.reference.roi_crop(corner.double(), boxes - (edge - 8), (4, 4))
    assert (found.double() - expected).norm() <= 2**-8 * expected.norm()
