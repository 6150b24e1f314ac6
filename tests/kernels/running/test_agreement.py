"""The Triton kernels compute the definition, outputs and gradients, and touch nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from aufast.kernels import graph_conv
from torch import Tensor

from aufast import ops
from aufast.ops import backends
from tests.samples import SAMPLES, TYPICAL, Sample, Tensors, relative_error, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior"),
    # NumPy speaks of what a GPU computes without a word: 0 · inf of a region, exp(-x) of a saturated gate.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
GUARD = 512  # elements on both sides of every tensor


def tensors(**shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def _large() -> list[Sample]:
    """More than one tile along every axis, and not a whole number of them."""
    boxes = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 14 - 2
    crop = tensors(features=(2, 70, 11, 13)) | {"rois": boxes}
    last = crop | {"features": crop["features"].contiguous(memory_format=torch.channels_last)}
    conv = tensors(x=(70, 3, 35), U=(3, 2), Q=(3, 2), W=(2, 35, 66), bias=(2, 66))
    many = tensors(x=(9, 19, 5), U=(19, 2), Q=(19, 2), W=(2, 2, 5, 4), bias=(2, 4))
    gru = tensors(
        x=(18, 2, 3, 5), U=(3, 2), Q=(3, 2), **dict.fromkeys(("W_z", "W_r", "W_h"), (2, 75, 70)),
        h0=(18, 3, 70), **dict.fromkeys(("b_z", "b_r", "b_h"), (2, 70)),
    )  # fmt: skip
    for name in ("W_z", "W_r", "W_h"):
        gru[name] /= 8  # about 1/√75: a saturated gate has no gradient to compare in bfloat16
    nodes = tensors(
        x=(2, 2, 18, 3), U=(18, 2), Q=(18, 2), **dict.fromkeys(("W_z", "W_r", "W_h"), (2, 2, 5, 2))
    )  # fmt: skip
    nodes |= dict.fromkeys(("h0", "b_z", "b_r", "b_h"))
    region = tensors(x=(2, 35, 18, 10), weight=(2, 2, 66, 35, 3, 3), bias=(2, 2, 66))
    region |= tensors(scale=(2, 2, 35), shift=(2, 2, 35))
    return [
        Sample("roi_crop", "tiles", crop, {"size": (6, 7)}),
        Sample("roi_crop", "tiles_channels_last", last, {"size": (6, 7)}),
        Sample("graph_conv", "tiles", conv),
        Sample("graph_conv", "many_nodes", many, {"normalization": "softmax"}),
        Sample("graph_gru", "tiles", gru, {"lengths": torch.arange(18) % 3}),
        Sample("graph_gru", "many_nodes", nodes, {"normalization": "softmax"}),
        Sample("region_conv", "tiles", region),
    ]


LARGE = _large()


def on_triton(sample: Sample) -> Callable[[Tensors], tuple[Tensor, ...]]:
    """The public function on Triton, where the kernels run, with arguments and results on the CPU."""
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in sample.options.items()}
    there = replace(sample, options=moved)

    def call(tensors: Tensors) -> tuple[Tensor, ...]:
        inputs = {k: None if t is None else t.to(DEVICE) for k, t in tensors.items()}
        return tuple(out.cpu() for out in there.public(inputs, "triton"))

    return call


def draws(sample: Sample) -> list[Sample]:
    """The sample, and for the tiny graphs more of its kind: one alone says little about rounding."""
    if sample in LARGE or sample.empty or sample.operator not in ("graph_conv", "graph_gru"):
        return [sample]
    generator = torch.Generator().manual_seed(11)

    def drawn(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * (tensor != 0)

    again = [{k: drawn(t) for k, t in sample.tensors.items()} for _ in range(7)]
    return [sample, *(replace(sample, tensors=tensors) for tensors in again)]


def errors(sample: Sample, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """How far Triton and PyTorch in this dtype are from the float64 truth, by output and gradient."""
    inputs = sample.inputs(dtype)
    exact = {k: None if t is None else t.detach().double().requires_grad_() for k, t in inputs.items()}
    truth = run(lambda t: sample.public(t, "reference"), exact)
    definition = run(lambda t: sample.public(t, "reference"), sample.inputs(dtype))
    actual = run(on_triton(sample), sample.inputs(dtype))
    for name in truth:
        assert actual[name].dtype == definition[name].dtype
        assert actual[name].shape == definition[name].shape
    return {k: (relative_error(actual[k], truth[k]), relative_error(definition[k], truth[k])) for k in truth}


def assert_close_enough(sample: Sample, dtype: torch.dtype) -> None:
    """Low precision: at most twice as far from the float64 truth as PyTorch's own result in this dtype."""
    found = [errors(drawn, dtype) for drawn in ([sample] if dtype == torch.float32 else draws(sample))]
    for name in found[0]:
        error, definition = (math.sqrt(sum(e[name][k] ** 2 for e in found) / len(found)) for k in (0, 1))
        allowed = 1e-5 if dtype == torch.float32 else 2 * definition + 8 * torch.finfo(torch.float32).eps
        assert error <= allowed, f"{name}: relative error {error:.2e} is above {allowed:.2e}"


@contextmanager
def guarded_launches() -> Iterator[list[str]]:
    """Give every launch copies of its tensors with guards around them, which it must neither use nor change.

    The interpreter does not notice a read or a write out of bounds.
    """
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__
    launched = []

    def guarded(self: GridExecutor, *args: object, **kwargs: object) -> None:
        guards = []

        def copy(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            strides = zip(value.shape, value.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in strides) if value.numel() else 0
            flat = value.as_strided((extent,), (1,))
            poison = torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).max
            padded = torch.full((extent + 2 * GUARD,), poison, dtype=value.dtype)
            padded[GUARD : GUARD + extent] = flat
            before = padded.clone()
            guards.append((flat, padded, before))
            return padded.as_strided(value.shape, value.stride(), GUARD)

        launch(self, *map(copy, args), **{name: copy(value) for name, value in kwargs.items()})
        for flat, padded, before in guards:
            for side in (slice(0, GUARD), slice(padded.numel() - GUARD, None)):
                untouched = padded[side].view(torch.uint8).equal(before[side].view(torch.uint8))
                assert untouched, f"{self.fn.__name__} writes outside a tensor"
            flat.copy_(padded[GUARD : GUARD + flat.numel()])
        launched.append(self.fn.__name__)

    with mock.patch.object(GridExecutor, "__call__", guarded):
        yield launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_option(sample: Sample, dtype: torch.dtype) -> None:
    assert_close_enough(sample, dtype)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_float16(sample: Sample) -> None:
    assert_close_enough(sample, torch.float16)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU compute-sanitizer looks for this")
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_nothing_outside_the_tensors_is_used_or_changed(sample: Sample, poisoned_empty: None) -> None:
    with guarded_launches() as launched:
        guarded = run(on_triton(sample), sample.inputs(torch.float32))
    for name, value in run(on_triton(sample), sample.inputs(torch.float32)).items():
        assert torch.equal(value.nan_to_num(7), guarded[name].nan_to_num(7)), name
    assert sample.empty or sum(name.startswith(sample.operator) for name in launched) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", LARGE, ids=str)
def test_several_tiles(sample: Sample, dtype: torch.dtype, poisoned_empty: None) -> None:
    assert_close_enough(sample, dtype)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.operator == "graph_conv"], ids=str)
def test_mixing_in_its_own_launch(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for many rows."""
    monkeypatch.setattr(graph_conv, "FUSED_ROWS", 0)
    assert_close_enough(sample, torch.float32)


def test_long_sums_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from aufast.kernels import region_conv

    monkeypatch.setattr(graph_conv, "ROWS_PER_PART", 3)
    monkeypatch.setattr(graph_conv, "COLUMNS_PER_PART", 5)
    monkeypatch.setattr(region_conv, "TILES_PER_PART", 1)
    for sample in TYPICAL[1:]:
        assert_close_enough(sample, torch.float32)


def test_boxes_of_round_numbers_meet_the_pixels_exactly() -> None:
    """A crop at the map's own resolution copies, and its gradient is a copy too."""
    features = torch.randn(1, 3, 9, 11, device=DEVICE, requires_grad=True)
    boxes = torch.tensor([[[0, 0, 7, 6], [4, 3, 11, 9], [2, 1, 9, 7]]], dtype=torch.float32, device=DEVICE)
    crops = ops.roi_crop(features, boxes, (6, 7), backend="triton")
    for crop, (left, top, right, bottom) in zip(crops[0], boxes[0].int().tolist(), strict=True):
        assert torch.equal(crop, features[0, :, top:bottom, left:right])
    weights = torch.randn_like(crops[0, 1])
    (gradient,) = torch.autograd.grad((crops[0, 1] * weights).sum(), features)
    expected = torch.zeros_like(features)
    expected[0, :, 3:9, 4:11] = weights
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_each_gradient_alone(sample: Sample) -> None:
    everything = run(on_triton(sample), sample.inputs(torch.float32))
    for name, tensor in sample.tensors.items():
        if tensor is not None:
            alone = sample.inputs(torch.float32, requires_grad=False)
            alone[name].requires_grad_()
            for key, value in run(on_triton(sample), alone).items():
                assert torch.equal(value, everything[key]), f"{key} where only {name} needs one"


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_gradients_with_stride_zero(sample: Sample) -> None:
    """`out.sum().backward()` hands over one number expanded to the whole output."""
    found = []
    for call in (on_triton(sample), lambda t: sample.public(t, "reference")):
        inputs = sample.inputs(torch.float32)
        sum(out.sum() for out in call(inputs)).backward()
        found.append({k: t.grad for k, t in inputs.items() if t is not None})
    for name in found[0]:
        assert relative_error(found[0][name], found[1][name]) < 1e-4, name


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_the_same_bits_again(sample: Sample) -> None:
    first, second = (run(on_triton(sample), sample.inputs(torch.float32)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", ["lengths", "softmax_2"])
def test_nothing_is_read_after_a_sequences_end(name: str) -> None:
    """Neither of x, nor of the incoming gradient, nor of what the forward pass saved."""
    sample = next(s for s in SAMPLES if str(s) == f"graph_gru-{name}")
    lengths = sample.options["lengths"].to(DEVICE)
    after = torch.arange(sample.tensors["x"].shape[1], device=DEVICE) >= lengths[:, None]  # (B, T)
    operators = torch.ops.aufast.graph_gru.triton, torch.ops.aufast.graph_gru_backward.triton
    arguments = sample.raw_arguments(sample.inputs(torch.float32, requires_grad=False))
    x, *rest, code, save = (a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments)
    generator = torch.Generator().manual_seed(2)
    found = []
    for filler in (0.0, torch.nan):
        filled = x.clone()
        filled[after] = filler
        out, h_last, saved = operators[0](filled, *rest, code, save)
        assert out.isfinite().all() and h_last.isfinite().all()
        grads = [torch.randn(o.shape, generator=generator.manual_seed(2)).to(DEVICE) for o in (out, h_last)]
        grads[0][after] = filler
        saved[after] = filler
        found.append(operators[1](*grads, filled, *rest, out, saved, code, 0b1111111111))
        assert found[-1][0][after].eq(0).all()
    for expected, gradient in zip(*found, strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_opcheck(sample: Sample) -> None:
    if DEVICE == "cuda":
        sample = replace(
            sample,
            tensors={k: None if t is None else t.to(DEVICE) for k, t in sample.tensors.items()},
            options={k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in sample.options.items()},
        )
    operator = getattr(torch.ops.aufast, sample.operator).triton
    torch.library.opcheck(operator, sample.raw_arguments(sample.inputs(torch.float32)))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter is the exception")
def test_auto_never_takes_the_interpreter() -> None:
    for sample in TYPICAL:
        image = next(iter(sample.tensors.values())).float()
        assert backends.choose(sample.operator, image, "auto") in ("cpu", "reference")
        assert backends.choose(sample.operator, image, "triton") == "triton"
