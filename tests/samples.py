"""The operator calls that the tests share: every option, odd sizes, memory formats and empty tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from aufast import ops
from aufast.ops import backends
from aufast.ops.checks import NORMALIZATIONS

Tensors = dict[str, Tensor | None]
# Kept in float32 where everything else is in low precision.
COORDINATES_AND_STATES = ("rois", "h0")


@dataclass(frozen=True)
class Sample:
    """One call: the differentiable arguments in the operator's order (float64), and the other arguments."""

    operator: str
    name: str
    tensors: Tensors
    options: dict[str, Any] = field(default_factory=dict)
    smooth: bool = True  # False where the function has a kink or a NaN, so that differences say nothing

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}"

    @property
    def empty(self) -> bool:
        return any(t is not None and t.numel() == 0 for t in self.tensors.values())

    def inputs(self, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> Tensors:
        """Fresh leaves in `dtype`, memory format kept; regions and states never below float32."""
        made: Tensors = {}
        for name, tensor in self.tensors.items():
            kept = torch.promote_types(dtype, torch.float32) if name in COORDINATES_AND_STATES else dtype
            made[name] = None if tensor is None else tensor.to(kept, copy=True).requires_grad_(requires_grad)
        return made

    def public(self, tensors: Tensors, backend: str | None = None) -> tuple[Tensor, ...]:
        """Call the public function; an argument left out is None."""
        arguments: dict[str, Any] = {**dict.fromkeys(self.tensors), **tensors, **self.options}
        if self.operator == "graph_gru":
            biases = tuple(arguments.pop(name) for name in ("b_z", "b_r", "b_h"))
            arguments["biases"] = None if biases[0] is None else biases
        out = getattr(ops, self.operator)(**arguments, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def raw_arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        """The arguments of `torch.ops.aufast`."""
        options = self.options
        code = NORMALIZATIONS[options.get("normalization", "global")]
        rest: tuple[Any, ...] = {
            "roi_crop": (*options.get("size", ()), options.get("align_corners", False)),
            "graph_conv": (code,),
            "graph_gru": (options.get("lengths"), code, True),
            "region_conv": (),
        }[self.operator]
        return (*tensors.values(), *rest)

    def raw(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Call the operator itself: its compiled kernel, or its fallback where there is none."""
        out = getattr(torch.ops.aufast, self.operator)(*self.raw_arguments(tensors))
        return out[:2] if isinstance(out, tuple) else (out,)

    def raw_backward_arguments(self, tensors: Tensors, needs: int) -> tuple[Any, ...]:
        """The arguments of the backward operator, for random gradients of the outputs."""
        arguments = self.raw_arguments(tensors)
        out = getattr(torch.ops.aufast, self.operator)(*arguments)
        if self.operator == "graph_gru":
            *inputs, code, _ = arguments
            return (*random_like(out[:2]), *inputs, out[0], out[2], code, needs)
        (grad,) = random_like((out,))
        if self.operator == "roi_crop":
            return (grad, *tensors.values(), arguments[-1], needs)
        return (grad, *arguments, needs)


def random_like(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same standard normal numbers for the same shapes, rounded to the dtype of each output."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs)


def run(
    call: Callable[[Tensors], tuple[Tensor, ...]], tensors: Tensors, again: bool = False
) -> dict[str, Tensor]:
    """Outputs of `call` and the gradient of every argument that asks for one, by name."""
    outputs = call(tensors)
    wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    pairs = [(o, g) for o, g in zip(outputs, random_like(outputs), strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs],
        list(wanted.values()),
        [g for _, g in pairs],
        create_graph=again,
        materialize_grads=True,
    )
    results = {f"output {k}": o.detach() for k, o in enumerate(outputs)}
    return results | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Norm of the difference over that of the truth; NaN must stand where NaN stands.

    The samples' numbers are of order one, so a truth below 1e-12 is a zero not met exactly: the error is then
    the difference itself.
    """
    actual, truth = actual.detach().double(), truth.detach().double()
    assert actual.shape == truth.shape
    assert torch.equal(actual.isnan(), truth.isnan())
    difference, size = (actual - truth).nan_to_num().norm(), truth.nan_to_num().norm()
    return float(difference / size) if size > 1e-12 else float(difference)


def assert_same(actual: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Every output and gradient within a relative error."""
    assert actual.keys() == truth.keys()
    for name in truth:
        error = relative_error(actual[name], truth[name])
        assert error <= tolerance, f"{name}: relative error {error:.2e} is above {tolerance:.0e}"


def differences_agree(
    call: Callable[[Tensors], tuple[Tensor, ...]], tensors: Tensors, *, order: int = 1, **options: Any
) -> bool:
    """Compare derivatives of first or second order with differences, on one thread: the calls are tiny."""
    check = {1: torch.autograd.gradcheck, 2: torch.autograd.gradgradcheck}[order]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return check(lambda *t: call(dict(zip(tensors, t, strict=True))), tuple(tensors.values()), **options)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def through_operators() -> Iterator[None]:
    """Make "auto" call `torch.ops.aufast` on the CPU for every operator, compiled or only its fallback."""
    everything = {"cpu": frozenset(backends.OPERATORS)}
    with patch.dict(backends._kernels, everything), patch.dict(backends._missing, {"cpu": None}):
        yield


def ways(sample: Sample) -> dict[str, Callable[[Tensors], tuple[Tensor, ...]]]:
    """Every way to compute this call here, by name; "operator" is `torch.ops.aufast`, compiled or not."""
    names = ["reference", "auto"]
    if backends.can_run("cpu", sample.operator, torch.empty(0)) is None:
        names.append("cpu")
    return {name: partial(sample.public, backend=name) for name in names} | {"operator": sample.raw}


def _make(**shapes: tuple[int, ...] | None) -> Tensors:
    generator = torch.Generator().manual_seed(sum(map(ord, "".join(shapes))))
    return {
        name: None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def _boxes(batch: int, regions: int, height: int, width: int) -> Tensor:
    """Random boxes: some reach over the border, some are mirrored."""
    generator = torch.Generator().manual_seed(7)
    corners = torch.rand(batch, regions, 4, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    return corners * torch.tensor([width, height, width, height])


def _crop(
    name: str, shape: tuple, rois: Tensor, size: tuple[int, int], smooth: bool = True, **options: Any
) -> Sample:
    features = _make(features=shape)["features"]
    return Sample("roi_crop", name, {"features": features, "rois": rois}, {"size": size, **options}, smooth)


def _roi_crop() -> list[Sample]:
    boxes = _boxes(2, 3, 7, 5)
    theta = 0.6 * _make(theta=(2, 3, 2, 3))["theta"]
    broken = boxes.clone()
    broken[0, 1, 2] = torch.nan
    broken[1, 0, 0] = torch.inf
    special = torch.tensor([[[1.3, 2.2, 1.3, 2.2], [9.1, 9.2, 12.0, 13.0], [-40.0, -3.0, -8.0, 4.0]]])
    shape, size = (2, 3, 7, 5), (4, 3)
    samples = [
        _crop("boxes", shape, boxes, size),
        _crop("theta", shape, theta, size),
        _crop("theta_corners", shape, theta, size, align_corners=True),
        _crop("point_and_outside", (1, 3, 7, 5), special.double(), size),
        _crop("not_finite", shape, broken, size, smooth=False),
        _crop("one_pixel", (1, 1, 1, 1), torch.tensor([[[0.1, 0.2, 0.7, 1.1]]]).double(), (1, 1)),
        _crop("one_pixel_corners", (1, 1, 1, 1), theta[:1, :1], (2, 1), align_corners=True),
        _crop("no_regions", shape, boxes[:, :0], size),
        _crop("no_images", (0, 3, 7, 5), boxes[:0], size),
        _crop("no_channels", (2, 0, 7, 5), boxes, size),
        _crop("no_output", shape, boxes, (0, 3)),
    ]
    plain = samples[0].tensors["features"]
    views = {
        "channels_last": plain.contiguous(memory_format=torch.channels_last),
        "transposed": plain.transpose(2, 3).contiguous().transpose(2, 3),
    }
    return samples + [
        Sample("roi_crop", name, {"features": view, "rois": boxes}, {"size": size})
        for name, view in views.items()
    ]


def _graph_conv() -> list[Sample]:
    def sample(
        name: str, x: tuple, W: tuple, bias: tuple | None = None, shared: bool = False, **options: Any
    ):
        Q = None if shared else (x[-2], 2)
        return Sample("graph_conv", name, _make(x=x, U=(x[-2], 2), Q=Q, W=W, bias=bias), options)

    samples = [
        sample("global", (2, 5, 3), (2, 3, 4)),
        sample("global_bias", (2, 3, 5, 3), (2, 3, 4), (2, 4)),
        sample("one_sample", (5, 3), (2, 3, 4), (2, 4)),
        sample("shared", (2, 5, 3), (3, 4), shared=True),
        sample("shared_bias", (2, 5, 3), (3, 4), (4,), shared=True),
        *(sample(f"softmax_{K}", (2, 5, 3), (2, K, 3, 4), normalization="softmax") for K in (1, 2, 3)),
        sample("softmax_bias", (2, 5, 3), (2, 2, 3, 4), (2, 4), normalization="softmax"),
        sample("softmax_shared", (2, 5, 3), (2, 3, 4), (4,), shared=True, normalization="softmax"),
        sample("one_node", (1, 1, 1), (2, 1, 1)),
        sample("no_samples", (0, 5, 3), (2, 3, 4), (2, 4)),
    ]
    lonely = samples[0].tensors | {"U": torch.zeros(5, 2, dtype=torch.float64)}
    transposed = samples[1].tensors | {
        "x": samples[1].tensors["x"].transpose(-1, -2).contiguous().transpose(-1, -2)
    }
    return [
        *samples,
        Sample("graph_conv", "U_zero", lonely, smooth=False),
        Sample("graph_conv", "transposed", transposed),
    ]


def _graph_gru() -> list[Sample]:
    def sample(name: str, x: tuple, K: int = 0, h0: bool = False, biases: bool = False, **options: Any):
        batch, _, m, c_in = x
        c, ce = 2, 2
        W = (ce, K, c + c_in, c) if K else (ce, c + c_in, c)
        pool = (ce, c) if biases else None
        state = (batch, m, c) if h0 else None
        if K:
            options["normalization"] = "softmax"
        tensors = _make(
            x=x, U=(m, ce), Q=(m, ce), W_z=W, W_r=W, W_h=W, h0=state, b_z=pool, b_r=pool, b_h=pool
        )
        return Sample("graph_gru", name, tensors, options)

    return [
        sample("plain", (2, 3, 3, 1)),
        sample("h0", (2, 3, 3, 3), h0=True),
        sample("biases", (2, 3, 3, 1), biases=True),
        sample("lengths", (3, 3, 3, 1), h0=True, lengths=torch.tensor([2, 0, 3])),
        sample("lengths_beyond", (3, 3, 3, 1), h0=True, lengths=torch.tensor([9, -1, 2])),
        sample("lengths_column", (3, 3, 3, 1), lengths=torch.tensor([[2, 9], [0, 9], [1, 9]])[:, 0]),
        sample("lengths_expanded", (3, 3, 3, 1), lengths=torch.tensor([2]).expand(3)),
        sample("softmax_1", (1, 2, 3, 1), K=1),
        sample("softmax_2", (2, 2, 3, 1), K=2, h0=True, biases=True, lengths=torch.tensor([1, 2])),
        sample("softmax_3", (1, 2, 3, 1), K=3, biases=True),
        sample("one_node", (1, 2, 1, 1), h0=True),
        sample("no_steps", (2, 0, 3, 1), h0=True),
        sample("no_sequences", (0, 3, 3, 1)),
    ]


def _region_conv() -> list[Sample]:
    def sample(name: str, x: tuple, n: int, bias: bool = False, scale: bool = False):
        tensors = _make(
            x=x,
            weight=(n, n, 2, x[1], 3, 3),
            bias=(n, n, 2) if bias else None,
            scale=(n, n, x[1]) if scale else None,
            shift=(n, n, x[1]) if scale else None,
        )
        return Sample("region_conv", name, tensors)

    samples = [
        sample("plain", (2, 2, 6, 4), 2),
        sample("bias", (1, 2, 5, 5), 1, bias=True),
        sample("scale", (2, 2, 6, 4), 2, scale=True),
        sample("bias_scale", (2, 1, 6, 3), 3, bias=True, scale=True),
        sample("one_pixel_patches", (1, 2, 2, 2), 2, bias=True, scale=True),
        sample("no_images", (0, 3, 6, 4), 2, bias=True, scale=True),
    ]
    formats = samples[2].tensors
    last = formats | {"x": formats["x"].contiguous(memory_format=torch.channels_last)}
    return [*samples, Sample("region_conv", "channels_last", last)]


SAMPLES = [*_roi_crop(), *_graph_conv(), *_graph_gru(), *_region_conv()]
# One of each operator with most of its options: for what is slow or does not depend on the options.
TYPICAL = [
    next(s for s in SAMPLES if str(s) == name)
    for name in ("roi_crop-boxes", "graph_conv-global_bias", "graph_gru-softmax_2", "region_conv-scale")
]
