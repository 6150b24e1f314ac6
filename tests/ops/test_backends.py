"""Who computes: choosing, asking and refusing; and what `import aufast` loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import aufast
from aufast.ops import backends, direct
from tests.samples import TYPICAL, Sample, through_operators

CALLS = {s.operator: s for s in TYPICAL}


@pytest.fixture(autouse=True)
def _selection() -> Iterator[None]:
    before = backends._selected
    yield
    aufast.use_backend(before)


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": root} | environment,
        capture_output=True,
        text=True,
    )


def chosen(sample: Sample, backend: str | None = None) -> str:
    return backends.choose(sample.operator, next(iter(sample.tensors.values())), backend)


def test_backends_says_for_each_one_whether_it_is_ready_and_why_not() -> None:
    states = aufast.backends()
    assert list(states) == ["reference", "cpu", "cuda", "triton"]
    for state in states.values():
        verdict, reason = state.split(": ", 1)
        assert verdict in ("ready", "off") and reason
    assert states["reference"].startswith("ready")
    for operator in backends.OPERATORS:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"aufast::{operator}", "CPU")
        assert (operator in states["cpu"]) == has


@pytest.mark.parametrize("operator", CALLS)
def test_auto_takes_the_compiled_kernel_where_there_is_one(operator: str) -> None:
    with through_operators():
        assert chosen(CALLS[operator]) == "cpu"
        assert chosen(CALLS[operator], "reference") == "reference"
        assert backends.choose(operator, torch.empty(0, device="meta"), None) == "reference"


class OnAGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU: no kernel runs, who would is what counts."""

    device = torch.device("cuda", 0)
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU where everything is installed."""
    for name, kernels in (("cuda", ("roi_crop", "graph_gru")), ("triton", backends.OPERATORS)):
        monkeypatch.setitem(backends._missing, name, None)
        monkeypatch.setitem(backends._kernels, name, frozenset(kernels))
    monkeypatch.setitem(backends._devices, "triton", ("cuda",))
    monkeypatch.setattr(backends, "_too_old", lambda index: None)


def explained(operator: str, dtype: torch.dtype = torch.float32, limit: str | None = None) -> str:
    def call() -> None:
        backends.choose(operator, torch.empty(0, dtype=dtype).as_subclass(OnAGpu), None, lambda: limit)

    return backends.explain(call)


def test_on_a_gpu_operator_dtype_and_sizes_decide(with_a_gpu: None) -> None:
    assert explained("roi_crop") == (
        "roi_crop of float32 on cuda:0: cuda, the first that can of those for cuda"
    )
    assert explained("graph_conv", torch.bfloat16) == (
        "graph_conv of bfloat16 on cuda:0: triton, the first that can of those for cuda;"
        " not cuda: it has no kernel for graph_conv"
    )
    assert explained("graph_gru", limit="the graph has 883 nodes") == (
        "graph_gru of float32 on cuda:0: triton, the first that can of those for cuda;"
        " not cuda: the graph has 883 nodes"
    )
    assert explained("graph_gru", torch.float64) == (
        "graph_gru of float64 on cuda:0: reference, no kernel takes this call;"
        " not cuda: it computes float64 by the definition; not triton: it computes float64 by the definition"
    )
    assert explained("roi_crop", torch.float64).startswith("roi_crop of float64 on cuda:0: cuda, ")


def test_an_old_gpu_is_named(with_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    backends._too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(backends._missing, "cuda", None)
    monkeypatch.setitem(backends._kernels, "cuda", frozenset(backends.OPERATORS))
    on_a_gpu = torch.empty(0).as_subclass(OnAGpu)
    reason = "Tesla T4 has compute capability 7.5, and the kernels need 8.0 or newer"
    assert backends.can_run("cuda", "roi_crop", on_a_gpu) == reason
    with pytest.raises(RuntimeError, match=reason):
        backends.choose("roi_crop", on_a_gpu, "cuda")
    assert backends.choose("roi_crop", on_a_gpu, "auto") == "reference"
    backends._too_old.cache_clear()


def test_what_a_compiled_kernel_cannot_take_is_an_error_where_it_was_asked_for(with_a_gpu: None) -> None:
    on_a_gpu = torch.empty(0).as_subclass(OnAGpu)
    with pytest.raises(RuntimeError, match="graph_gru: the 'cuda' backend cannot run here: 17 nodes"):
        backends.choose("graph_gru", on_a_gpu, "cuda", lambda: "17 nodes")
    assert backends.choose("graph_gru", on_a_gpu, "triton", lambda: "17 nodes") == "triton"


@pytest.mark.parametrize("operator", CALLS)
def test_explain_says_who_and_computes_nothing(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = CALLS[operator]
    inputs = sample.inputs(torch.float32)
    monkeypatch.setattr(torch.ops.aufast, operator, None)  # a call would fail
    with through_operators():
        words = aufast.explain(sample.public, inputs)
        assert words == f"{operator} of float32 on cpu: cpu, the first that can of those for cpu"
        assert aufast.explain(sample.public, inputs, "reference").endswith(": reference, asked for")
    with pytest.raises(RuntimeError, match="the 'cuda' backend cannot run here"):
        aufast.explain(sample.public, inputs, "cuda")
    with pytest.raises(ValueError, match="function called no operator"):
        aufast.explain(len, "")
    assert not backends._explaining


def test_use_backend_sets_and_restores() -> None:
    sample = CALLS["graph_conv"]
    with through_operators():
        with aufast.use_backend("reference"):
            assert chosen(sample) == "reference"
            with aufast.use_backend("cpu"):
                assert chosen(sample) == "cpu"
            assert chosen(sample) == "reference"
        assert chosen(sample) == "cpu"
        aufast.use_backend("reference")
        assert chosen(sample) == "reference"
        assert chosen(sample, "auto") == "cpu"
        aufast.use_backend("auto")
        assert chosen(sample) == "cpu"


def test_use_backend_restores_after_an_error() -> None:
    with pytest.raises(KeyError), aufast.use_backend("reference"):
        raise KeyError
    assert backends._selected == "auto"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="use_backend: name must be one of auto, .*got 'gpu'"):
        aufast.use_backend("gpu")
    for operator, sample in CALLS.items():
        with pytest.raises(ValueError, match=f"{operator}: backend must be one of auto, .*got 'gpu'"):
            sample.public(sample.inputs(), "gpu")


@pytest.mark.parametrize("operator", CALLS)
def test_a_requested_backend_that_cannot_run_says_why(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = CALLS[operator]
    monkeypatch.setitem(backends._missing, "cuda", "not built: no nvcc")
    with pytest.raises(
        RuntimeError, match=f"{operator}: the 'cuda' backend cannot run here: not built: no nvcc"
    ):
        sample.public(sample.inputs(), "cuda")
    with pytest.raises(RuntimeError, match="use_backend: the 'cuda' backend cannot run here: not built"):
        aufast.use_backend("cuda")

    monkeypatch.setattr(direct, "passed", {})  # calls that passed while there was a kernel
    monkeypatch.setitem(backends._missing, "cpu", None)
    monkeypatch.setitem(backends._kernels, "cpu", frozenset())
    with pytest.raises(RuntimeError, match=f"'cpu' backend cannot run here: it has no kernel for {operator}"):
        sample.public(sample.inputs(), "cpu")

    monkeypatch.setitem(backends._kernels, "cpu", frozenset(backends.OPERATORS))
    with pytest.raises(RuntimeError, match="'cpu' backend cannot run here: the input is on meta"):
        backends.choose(operator, torch.empty(0, device="meta"), "cpu")


def test_a_request_is_refused_inside_a_transform_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._missing, "cuda", "not built: no nvcc")
    sample = CALLS["graph_conv"]
    tensors = sample.inputs(requires_grad=False)
    with pytest.raises(RuntimeError, match="not built: no nvcc"):
        torch.vmap(lambda x: sample.public(tensors | {"x": x}, "cuda"))(tensors["x"])


def test_a_library_that_does_not_load_is_a_reason_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path)
    assert backends._load("cpu").startswith("_cpu.so does not load: ")
    assert backends._load("cuda").startswith("not built: ")


def test_import_loads_torch_and_nothing_heavier() -> None:
    heavy = {
        "dlib",
        "av",
        "PIL",
        "matplotlib",
        "triton",
        "skimage",
        "tqdm",
        "face_recognition_models",
    }
    plain = run_python("import torch, sys; print(*sys.modules)")
    ours = run_python("import aufast, sys; print(*sys.modules)")
    assert ours.returncode == 0, ours.stderr
    added = {name.split(".")[0] for name in set(ours.stdout.split()) - set(plain.stdout.split())}
    assert not added & heavy, added & heavy


def test_the_environment_chooses_a_backend_and_is_named_when_it_is_wrong() -> None:
    program = "import aufast; from aufast.ops import backends; print(backends._selected)"
    assert run_python(program, AUFAST_BACKEND="reference").stdout == "reference\n"
    wrong = run_python(program, AUFAST_BACKEND="gpu")
    assert wrong.returncode != 0 and "AUFAST_BACKEND: " in wrong.stderr and "got 'gpu'" in wrong.stderr
