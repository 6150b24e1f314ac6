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
from torch import Tensor

import aufast

pytestmark = pytest.mark.skipif(
    not aufast.backends()["cpu"].startswith("ready"), reason="the compiled CPU part is not built"
)
REPOSITORY = Path(__file__).parents[2]
NODES, EMBEDDING = 5, 3


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def crop_inputs(size: int) -> tuple[Tensor, ...]:
    boxes = torch.rand(size, 7, 4, generator=torch.Generator().manual_seed(size)) * 12
    return randn(size, 33, 12, 12), boxes


def region_inputs(size: int) -> tuple[Tensor, ...]:
    return randn(size, 9, 16, 16), randn(2, 2, 5, 9, 3, 3), randn(2, 2, 5), randn(2, 2, 9), randn(2, 2, 9)


def graph_parameters(cin: int, cout: int, gates: int) -> tuple[Tensor, ...]:
    embedding = randn(NODES, EMBEDDING)
    return embedding, embedding, *(randn(EMBEDDING, cin, cout) / 8 for _ in range(gates))


def conv_inputs(size: int) -> tuple[Tensor, ...]:
    return randn(16 * size, NODES, 12), *graph_parameters(12, 17, 1)


def gru_inputs(size: int) -> tuple[Tensor, ...]:
    return randn(size, 9, NODES, 12), *graph_parameters(29, 17, 3)


OPERATORS = {
    "roi_crop": crop_inputs,
    "region_conv": region_inputs,
    "graph_conv": conv_inputs,
    "graph_gru": gru_inputs,
}
each_operator = pytest.mark.parametrize("name", OPERATORS)


def compute(name: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and every gradient, from the compiled kernel."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = getattr(aufast.ops, name)(*leaves, backend="cpu")
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def are_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
    before = compute(name, OPERATORS[name](2))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            # Autograd refuses to run in the child of a process that used it; the kernel itself must not mind.
            with torch.no_grad():
                out = getattr(aufast.ops, name)(*OPERATORS[name](2), backend="cpu")
            status = 0 if torch.equal(out[0] if isinstance(out, tuple) else out, before[0]) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert are_equal(compute(name, OPERATORS[name](2)), before)


@each_operator
def test_python_threads_do_not_disturb_each_other(name: str, two_threads: None) -> None:
    inputs = [OPERATORS[name](size) for size in (1, 2, 3, 5)]
    alone = [compute(name, each) for each in inputs]
    start = threading.Barrier(len(inputs))

    def work(k: int) -> bool:
        start.wait()
        return all(are_equal(compute(name, inputs[k]), alone[k]) for _ in range(5))

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert all(pool.map(work, range(len(inputs))))


def interrupted_calls() -> None:
    """Every operator in calls of a good part of a second, until an interrupt; then a small call."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have it ignored
    torch.set_num_threads(2)
    large = {"roi_crop": 300, "region_conv": 300, "graph_conv": 3000, "graph_gru": 500}
    for name, make in OPERATORS.items():
        before, inputs = compute(name, make(2)), make(large[name])
        say("started")
        try:
            while True:
                compute(name, inputs)
        except KeyboardInterrupt:
            assert are_equal(compute(name, make(2)), before), name
        say("survived")


def test_an_interrupt_ends_a_long_call_and_the_next_one_is_right() -> None:
    process = run_in_process(interrupted_calls)
    for name in OPERATORS:
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
    expected = {name: compute(name, make(2)) for name, make in OPERATORS.items()}
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
        for other, make in OPERATORS.items():
            assert are_equal(compute(other, make(2)), expected[other]), f"{other} after {what}"
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
