"""Whoever computes an operator, the outputs and every gradient are the definition's."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import aufast
from aufast.ops.registration import image_format
from tests.samples import (
    SAMPLES,
    TYPICAL,
    Sample,
    assert_same,
    random_like,
    relative_error,
    run,
    ways,
)

pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")
PAIRS = [pytest.param(s, way, id=f"{s}-{way}") for s in SAMPLES for way in ways(s) if way != "reference"]
IMAGES = [s for s in SAMPLES if s.operator in ("roi_crop", "region_conv")]


@pytest.mark.parametrize(("sample", "way"), PAIRS)
def test_float64(sample: Sample, way: str, poisoned_empty: None) -> None:
    truth = run(ways(sample)["reference"], sample.inputs())
    assert_same(run(ways(sample)[way], sample.inputs()), truth, 1e-12)


ENDED = next(s for s in SAMPLES if str(s) == "graph_gru-lengths")


@pytest.mark.parametrize("way", ways(ENDED))
def test_nothing_is_read_after_a_sequences_end(way: str) -> None:
    """Neither of x nor of the incoming gradient: a NaN there reaches no output and no gradient."""
    after = torch.arange(ENDED.tensors["x"].shape[1]) >= ENDED.options["lengths"][:, None]  # (B, T)
    found = []
    for filler in (0.0, torch.nan):
        inputs = ENDED.inputs()
        with torch.no_grad():
            inputs["x"][after] = filler
        wanted = {name: t for name, t in inputs.items() if t is not None}
        outputs = ways(ENDED)[way](inputs)
        grads = random_like(outputs)
        grads[0][after] = filler
        gradients = torch.autograd.grad(outputs, list(wanted.values()), grads)
        found.append(dict(zip(wanted, gradients, strict=True)) | {"out": outputs[0], "h_last": outputs[1]})
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name
    assert found[1]["x"][after].eq(0).all()


def truth_of(sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """What exact arithmetic makes of the arguments rounded to `dtype`."""
    rounded = sample.inputs(dtype, requires_grad=False)
    exact = {k: None if t is None else t.double().requires_grad_() for k, t in rounded.items()}
    return run(ways(sample)["reference"], exact)


def draws(sample: Sample) -> list[Sample]:
    """The sample; of a graph, also with other numbers near its own.

    Where one gate is nearly saturated, its last bit decides the error of a whole gradient of so small a
    sample, for the definition as for the kernels. Several draws tell luck from a systematic error.
    """
    if sample.operator not in ("graph_conv", "graph_gru"):
        return [sample]
    generator = torch.Generator().manual_seed(0)

    def near(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    return [replace(sample, tensors={k: near(t) for k, t in sample.tensors.items()}) for _ in range(5)]


@pytest.mark.parametrize(("sample", "way"), PAIRS)
def test_float32_is_at_most_twice_as_far_from_the_truth_as_the_definition(sample: Sample, way: str) -> None:
    """RMS over the draws, for each output and gradient of its own; four roundings are allowed beside."""
    squares: dict[str, list[tuple[float, float]]] = {}
    for draw in draws(sample):
        truth = truth_of(draw, torch.float32)
        definition, actual = (
            run(ways(draw)[name], draw.inputs(torch.float32)) for name in ("reference", way)
        )
        for name in truth:
            pair = relative_error(actual[name], truth[name]), relative_error(definition[name], truth[name])
            squares.setdefault(name, []).append((pair[0] ** 2, pair[1] ** 2))
    for name, errors in squares.items():
        actual_error, own_error = (math.sqrt(sum(e) / len(e)) for e in zip(*errors, strict=True))
        assert actual_error <= 2 * own_error + 4 * torch.finfo(torch.float32).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sample", "way"), PAIRS)
def test_low_precision_is_at_most_twice_as_far_from_the_truth_as_the_definition(
    sample: Sample, way: str, dtype: torch.dtype
) -> None:
    """The definition's largest error of the call is the measure: of four numbers, one can be lucky."""
    truth = truth_of(sample, dtype)
    definition, actual = (run(ways(sample)[name], sample.inputs(dtype)) for name in ("reference", way))
    assert [t.dtype for t in actual.values()] == [t.dtype for t in definition.values()]
    assert_same(actual, truth, 2 * max(relative_error(definition[name], truth[name]) for name in truth))


@pytest.mark.parametrize(("sample", "way"), PAIRS)
def test_gradients_that_are_views_with_stride_zero(sample: Sample, way: str) -> None:
    """`out.sum().backward()` hands over one number expanded to the whole output."""
    grads = []
    for name in ("reference", way):
        tensors = sample.inputs()
        outputs = [o for o in ways(sample)[name](tensors) if o.requires_grad]
        sum(o.sum() for o in outputs).backward()
        used = {k: t for k, t in tensors.items() if t is not None}
        grads.append({k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in used.items()})
    if sample.name != "not_finite":  # the sum of a NaN is a NaN for everybody, and so is nobody's gradient
        assert_same(grads[1], grads[0], 1e-12)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_each_gradient_alone(sample: Sample) -> None:
    """What nobody asks for is not computed, and does not change what is."""
    everything = run(sample.raw, sample.inputs())
    for name, tensor in sample.tensors.items():
        if tensor is None:
            continue
        alone = sample.inputs(requires_grad=False)
        alone[name].requires_grad_()
        found = run(sample.raw, alone)
        assert_same(found, {key: everything[key] for key in found}, 1e-12)


@pytest.mark.parametrize("way", ["reference", "auto", "operator"])
@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_without_gradients(sample: Sample, way: str) -> None:
    with_grad = ways(sample)[way](sample.inputs())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            without = ways(sample)[way](sample.inputs())
        for actual, expected in zip(without, with_grad, strict=True):
            assert not actual.requires_grad and torch.equal(actual, expected)


@pytest.mark.parametrize("sample", IMAGES, ids=str)
def test_images_keep_their_memory_format(sample: Sample) -> None:
    tensors = sample.inputs()
    image = next(iter(tensors.values()))
    (out,) = sample.raw(tensors)
    pixels = out.flatten(0, -4)  # (…, C, h, w) of one batch
    if out.numel():
        assert pixels.is_contiguous(memory_format=image_format(image))
    (grad,) = torch.autograd.grad(out, image, torch.ones_like(out))
    assert grad.is_contiguous(memory_format=image_format(image))


def test_a_graph_gru_called_for_inference_has_no_gradient() -> None:
    sample = TYPICAL[2]
    *arguments, _ = sample.raw_arguments(sample.inputs())
    out, _, saved = torch.ops.aufast.graph_gru(*arguments, False)
    assert saved.shape == (0,)
    with pytest.raises(RuntimeError, match="save=False"):
        out.sum().backward()


@pytest.mark.parametrize("k", [0, 1], ids=["states", "last_state"])
def test_one_output_of_the_graph_gru_is_enough(k: int) -> None:
    sample = TYPICAL[2]
    truth = run(lambda tensors: (sample.public(tensors, "reference")[k],), sample.inputs())
    assert_same(run(lambda tensors: (sample.raw(tensors)[k],), sample.inputs()), truth, 1e-12)


@pytest.mark.parametrize("way", ["reference", "auto"])
@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_autocast_casts_the_products_and_keeps_regions_and_states(sample: Sample, way: str) -> None:
    """As if the arguments of the products had been cast by hand; a crop has no products."""
    products = torch.float32 if sample.operator == "roi_crop" else torch.bfloat16
    expected = sample.public(sample.inputs(products), way)
    tensors = sample.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = sample.public(tensors, way)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted)
    if sample.operator == "graph_gru":
        assert [o.dtype for o in outputs] == [torch.bfloat16, torch.float32]
    sum(o.float().sum() for o in outputs).backward()
    for tensor in tensors.values():
        assert tensor is None or tensor.grad.dtype == tensor.dtype == torch.float32


def test_autocast_does_not_round_the_regions() -> None:
    features, box = torch.randn(1, 2, 60, 60), torch.tensor([[[1.37, 2.71, 53.1, 58.9]]], requires_grad=True)
    for backend in ("reference", "auto"):
        exact = aufast.ops.roi_crop(features, box, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            crop = aufast.ops.roi_crop(features, box, backend=backend)
        assert crop.dtype == torch.float32 and torch.equal(crop, exact)


@pytest.mark.parametrize("sample", TYPICAL, ids=str)
def test_operators_keep_their_dtype_under_autocast(sample: Sample) -> None:
    """A raw operator promises its input's dtype to the compiler, whatever region it is called from."""
    tensors = sample.inputs(torch.float32)
    expected = run(sample.raw, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(sample.raw, tensors)
    assert_same(actual, expected, 1e-6)
    assert all(actual[k].dtype == expected[k].dtype for k in expected)


@pytest.mark.parametrize("sample", [s for s in TYPICAL if "cpu" in ways(s)], ids=str)
def test_compiled_kernels_give_the_same_bits_at_any_number_of_threads(sample: Sample) -> None:
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(ways(sample)["cpu"], sample.inputs(torch.float32)))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_without_the_compiled_part_everything_is_right(tmp_path: Path) -> None:
    """A copy of the package without its libraries: every operator exists and equals the definition."""
    package = Path(aufast.__file__).parent
    shutil.copytree(package, tmp_path / "aufast", ignore=shutil.ignore_patterns("*.so", "_build.json"))
    program = (
        "import aufast; from tests.samples import *\n"
        "assert all(state.startswith('off: not built') for name, state in aufast.backends().items()"
        " if name in ('cpu', 'cuda')), aufast.backends()\n"
        "for s in SAMPLES:\n"
        "    for way, call in ways(s).items():\n"
        "        assert_same(run(call, s.inputs()), run(ways(s)['reference'], s.inputs()), 1e-12)\n"
        "print(aufast.__file__, len(SAMPLES))\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "aufast" / "__init__.py"), str(len(SAMPLES))]
