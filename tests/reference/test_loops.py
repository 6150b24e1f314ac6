"""Every definition equals the slow loops, and its derivative equals differences."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from aufast import reference
from tests.reference import loops
from tests.samples import SAMPLES, TYPICAL, Sample, Tensors, differences_agree

# PyTorch remarks on crops of one pixel with align_corners=True; they are defined, and tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior")

# Every derivative by itself; the tests of the operators take one random direction of each sample.
DIFFERENTIATED = [
    pytest.param(s, id=str(s), marks=[] if s in TYPICAL else [pytest.mark.slow])
    for s in SAMPLES
    if s.smooth and not s.empty
]


def define(sample: Sample, tensors: Tensors) -> tuple[Tensor, ...]:
    """Call the reference itself."""
    arguments = tensors | sample.options
    if sample.operator == "graph_gru":
        biases = tuple(arguments.pop(name) for name in ("b_z", "b_r", "b_h"))
        arguments["biases"] = None if biases[0] is None else biases
    out = getattr(reference, sample.operator)(**arguments)
    return out if isinstance(out, tuple) else (out,)


def loop(sample: Sample) -> tuple[np.ndarray, ...]:
    """Call the slow loops."""
    arrays = {
        k: t.numpy() if isinstance(t, Tensor) else t for k, t in (sample.tensors | sample.options).items()
    }
    if sample.operator == "graph_gru":
        biases = tuple(arrays.pop(name) for name in ("b_z", "b_r", "b_h"))
        return loops.graph_gru(**arrays, biases=None if biases[0] is None else biases)
    if sample.operator == "graph_conv":
        leading = arrays["x"].shape[:-2]
        x = arrays.pop("x").reshape(-1, *sample.tensors["x"].shape[-2:])
        return (loops.graph_conv(x, **arrays).reshape(*leading, x.shape[1], -1),)
    return (getattr(loops, sample.operator)(**arrays),)


def assert_equal(actual: Tensor, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    scale = np.nanmax(np.abs(expected), initial=0)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.name != "no_samples"], ids=str)
def test_definition_equals_loops(sample: Sample) -> None:
    for actual, expected in zip(define(sample, sample.tensors), loop(sample), strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("sample", DIFFERENTIATED)
def test_derivatives_equal_differences(sample: Sample) -> None:
    assert differences_agree(lambda tensors: define(sample, tensors), sample.inputs())


def test_graph_conv_of_no_samples_is_empty() -> None:
    (sample,) = [s for s in SAMPLES if s.name == "no_samples"]
    assert define(sample, sample.tensors)[0].shape == (0, 5, 4)
