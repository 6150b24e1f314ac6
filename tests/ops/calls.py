"""A call of every operator in each form that has a kernel of its own: to count bits, not to be compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import aufast
from aufast.nn.adaptive import adaptive_graph_gru

NODES, EMBEDDING = 5, 3
MANY_NODES = 50  # graph_gru mixes whole frames of so many


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def crop_inputs(size: int) -> tuple[Tensor, ...]:
    boxes = torch.rand(size, 7, 4, generator=torch.Generator().manual_seed(size)) * 12
    return randn(size, 33, 12, 12), boxes


def turned_crop_inputs(size: int) -> tuple[Tensor, ...]:
    return randn(size, 33, 12, 12).to(memory_format=torch.channels_last), randn(size, 7, 2, 3) / 2


def region_inputs(size: int) -> tuple[Tensor, ...]:
    return randn(size, 9, 16, 16), randn(2, 2, 5, 9, 3, 3), randn(2, 2, 5), randn(2, 2, 9), randn(2, 2, 9)


def graph_parameters(cin: int, cout: int, gates: int, nodes: int = NODES) -> tuple[Tensor, ...]:
    embedding = randn(nodes, EMBEDDING)
    return embedding, embedding, *(randn(EMBEDDING, cin, cout) / 8 for _ in range(gates))


def conv_inputs(size: int) -> tuple[Tensor, ...]:
    return randn(16 * size, NODES, 12), *graph_parameters(12, 17, 1)


def gru_inputs(size: int) -> tuple[Tensor, ...]:
    return randn(size, 9, NODES, 12), *graph_parameters(29, 17, 3)


def wide_gru_inputs(size: int) -> tuple[Tensor, ...]:
    return randn(size, 4, MANY_NODES, 12), *graph_parameters(29, 17, 3, MANY_NODES)


def adaptive_inputs(size: int) -> tuple[Tensor, ...]:
    pools = randn(EMBEDDING, 2, 19, 34) / 8, randn(EMBEDDING, 34), randn(EMBEDDING, 2, 19, 17) / 8
    return randn(size, 6, NODES, 2), randn(NODES, EMBEDDING), *pools, randn(EMBEDDING, 17)


# What is called, and the arguments of it for `size` images, clips or 16 times as many frames; all of these
# have one axis of samples in front in the first argument, and of a crop in the second one.
Inputs = Callable[[int], tuple[Tensor, ...]]
CALLS: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], Inputs]] = {
    "roi_crop": (aufast.ops.roi_crop, crop_inputs),
    "roi_crop, turned": (aufast.ops.roi_crop, turned_crop_inputs),
    "region_conv": (aufast.ops.region_conv, region_inputs),
    "graph_conv": (aufast.ops.graph_conv, conv_inputs),
    "graph_gru": (aufast.ops.graph_gru, gru_inputs),
    "graph_gru, many nodes": (aufast.ops.graph_gru, wide_gru_inputs),
    "AdaptiveGraphGRU": (adaptive_graph_gru, adaptive_inputs),
}


def make(name: str, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The arguments; regions are never rounded."""
    kept = torch.promote_types(dtype, torch.float32)
    inputs = CALLS[name][1](size)
    return tuple(t.to(kept if name.startswith("roi") and t is inputs[1] else dtype) for t in inputs)


def forward(name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output, from the compiled kernel."""
    out = CALLS[name][0](*inputs, backend="cpu")
    return out[0] if isinstance(out, tuple) else out


def compute(name: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and every gradient, from the compiled kernels; each sample gets the same gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = forward(name, leaves)
    weight = torch.linspace(-1, 1, out[:1].numel(), dtype=torch.float64).view(out[:1].shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def are_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
