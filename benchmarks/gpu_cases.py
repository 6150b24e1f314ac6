"""The GPU's cases: the papers' operators at the sizes of a large machine, their peers and their yardsticks.

Everything is made on the device that it is asked for; on a CPU the same cases run small, in the tests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from aufast import ops, reference
from aufast.ops.backends import can_run
from benchmarks import peers, region_cases
from benchmarks.harness import Case, Run

BACKENDS = ("cuda", "triton")
PASSES = ("fwd", "bwd", "fwd+bwd")
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Backbone level -> channels, side of the map, side of the initial box around an AU centre.
LEVELS = {"layer2": (128, 24, 10), "layer3": (256, 12, 5), "layer4": (512, 6, 2)}
REGIONS, SIZE = 24, 6
STEPS, NODES, WIDTH, EMBEDDING = 48, 12, 96, 8
LOW = (torch.float32, torch.bfloat16)


def boxes(batch: int, side: int, extent: int, device: str) -> Tensor:
    """Boxes (B, R, 4) inside the map, sides scaled by up to ±20 % as an adaptive ROI's are.

    Inside, so that peers that repeat the border instead of zeros compute the same. No sample lies within 1e-3
    pixels of a pixel's centre, where the gradient of a box jumps.
    """
    generator = torch.Generator(device).manual_seed(2)
    options = {"generator": generator, "device": device, "dtype": torch.float64}
    offsets = (torch.arange(SIZE, device=device, dtype=torch.float64) + 0.5) / SIZE

    def interval() -> Tensor:
        while True:
            place, scale = torch.rand(2, batch * REGIONS, 64, **options)
            length = extent * (0.8 + 0.4 * scale)
            start = (0.5 + place * (side - 1 - length)).float().double()
            stop = (start + length).float().double()
            samples = start[..., None] + offsets * (stop - start)[..., None] - 0.5  # (B*R, 64, SIZE)
            clear = ((samples - samples.round()).abs() > 1e-3).all(-1)  # (B*R, 64)
            if clear.any(1).all():
                pick = clear.int().argmax(1, keepdim=True)
                return torch.cat([start.gather(1, pick), stop.gather(1, pick)], dim=1).float()  # (B*R, 2)

    x, y = interval(), interval()
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1).view(batch, REGIONS, 4)


def _crop_inputs(level: str, layout: str, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    channels, side, extent = LEVELS[level]
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(batch, channels, side, side, generator=generator, device=device)
    return features.to(dtype, memory_format=FORMATS[layout]), boxes(batch, side, extent, device)


def roi_crop_cases(device: str, batch: int = 256) -> list[Case]:
    cases = []
    for level, (channels, side, _) in LEVELS.items():
        crops, features = batch * REGIONS * channels * SIZE * SIZE, batch * channels * side * side
        rois = batch * REGIONS * 4
        forward = features + rois + crops
        for layout in FORMATS:
            cases.append(
                Case(
                    "roi_crop",
                    f"{level}-{layout}",
                    f"B={batch} R={REGIONS} C={channels} H=W={side} {layout}",
                    functools.partial(_crop_inputs, level, layout, batch, device),
                    flops=9 * crops,
                    moved=(4 * forward, 4 * (forward + 2 * features + crops + 2 * rois)),
                    passes=PASSES,
                    dtypes=LOW,
                )
            )
    return cases


def _graph(device: str, inputs: int, outputs: int, pools: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(1)
    U, Q = torch.randn(2, NODES, EMBEDDING, generator=generator, device=device)
    W = torch.randn(pools, EMBEDDING, inputs, outputs, generator=generator, device=device)
    return (U, Q, *(W / (inputs * EMBEDDING) ** 0.5))


def _conv_inputs(batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, NODES, 2 * WIDTH, generator=generator, device=device)
    return tuple(t.to(dtype) for t in (x, *_graph(device, 2 * WIDTH, WIDTH, 1)))


def graph_conv_cases(device: str, batches: tuple[int, ...] = (48, 12288)) -> list[Case]:
    cases = []
    for batch in batches:
        inputs, outputs = 2 * WIDTH, WIDTH
        x, out = batch * NODES * inputs, batch * NODES * outputs
        parameters = 2 * NODES * EMBEDDING + EMBEDDING * inputs * outputs
        forward = x + parameters + out
        cases.append(
            Case(
                "graph_conv",
                f"batch{batch}",
                f"batch={batch} m={NODES} {inputs}→{outputs} ce={EMBEDDING}",
                functools.partial(_conv_inputs, batch, device),
                flops=2 * batch * NODES * inputs * (NODES + outputs)
                + 2 * NODES * EMBEDDING * inputs * outputs,
                moved=(4 * forward, 4 * (forward + out + 2 * (x + parameters))),
                passes=PASSES,
                dtypes=LOW,
            )
        )
    return cases


def _gru_inputs(batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, STEPS, NODES, WIDTH, generator=generator, device=device)
    return tuple(t.to(dtype) for t in (x, *_graph(device, 2 * WIDTH, WIDTH, 3)))


def graph_gru_cases(device: str, batches: tuple[int, ...] = (1, 16, 256)) -> list[Case]:
    cases = []
    for batch in batches:
        mixes = 2 * batch * STEPS * NODES * NODES * 3 * WIDTH
        products = 2 * batch * STEPS * NODES * (2 * WIDTH) * (3 * WIDTH)
        theta = 2 * NODES * EMBEDDING * (2 * WIDTH) * (3 * WIDTH)
        x = batch * STEPS * NODES * WIDTH
        parameters = 2 * NODES * EMBEDDING + EMBEDDING * (2 * WIDTH) * (3 * WIDTH)
        forward = 2 * x + parameters
        cases.append(
            Case(
                "graph_gru",
                f"B{batch}",
                f"B={batch} T={STEPS} m={NODES} c={WIDTH} ce={EMBEDDING}",
                functools.partial(_gru_inputs, batch, device),
                flops=mixes + products + theta,
                moved=(4 * forward, 4 * (forward + 4 * x + 2 * parameters)),
                passes=("fwd", "fwd+bwd"),
                dtypes=LOW,
            )
        )
    return cases


def roi_align(features: Tensor, rois: Tensor) -> Tensor:
    """torchvision's, one sample a bin: the same crops where boxes lie inside the map."""
    from torchvision.ops import roi_align

    batch, regions = rois.shape[:2]
    image = torch.arange(batch, device=rois.device).repeat_interleave(regions).to(rois)
    rows = torch.cat([image[:, None], rois.flatten(0, 1)], dim=1)  # (B*R, 5)
    crops = roi_align(features, rows, SIZE, sampling_ratio=1, aligned=True)
    return crops.unflatten(0, (batch, regions))


def through_float32(peer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A peer that wants one dtype: that of the boxes, since coordinates in bfloat16 would lie elsewhere."""
    return lambda features, rois: peer(features.float(), rois).to(features.dtype)


class Graphed:
    """A forward pass captured once as a CUDA graph and replayed while its arguments stay the same tensors."""

    def __init__(self, function: Callable):
        self.function, self.inputs = function, ()

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if len(inputs) != len(self.inputs) or any(
            a is not b for a, b in zip(inputs, self.inputs, strict=True)
        ):
            self.capture(inputs)
        self.graph.replay()
        return self.outputs

    def capture(self, inputs: tuple[Tensor, ...]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph, self.inputs = torch.cuda.CUDAGraph(), inputs
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(*inputs)


class CuBlas:
    """Yardstick of graph_conv: the two products alone, S and Θ being there."""

    def __call__(self, x: Tensor, U: Tensor, Q: Tensor, W: Tensor) -> Tensor:
        if getattr(self, "made_for", None) is not x:
            self.made_for, self.S, self.theta = x, peers.mixing(U), peers.node_weights(Q, W)
        return torch.bmm((self.S @ x).transpose(0, 1), self.theta)  # (m, N, cout)


class CuDnn:
    """Yardstick of graph_gru: a GRU of as many products, nodes being sequences that share their weights."""

    def __call__(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        if getattr(self, "gru", None) is None or self.gru.weight_ih_l0.dtype != x.dtype:
            self.gru = torch.nn.GRU(x.shape[-1], rest[-1].shape[-1], batch_first=True).to(x.device, x.dtype)
        return self.gru(x.transpose(1, 2).flatten(0, 1))  # (B*m, T, c)


# They do other work than the operator, in a known proportion, so their results are not compared.
YARDSTICKS = ("cublas", "cudnn")


# Their 48 unrolled steps take the compiler minutes, so they come last and with a limit.
COMPILED = ("compiled", "graph")


def providers(case: Case, mode: str, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """Who is timed: the definition, the peers, the yardsticks, and every backend that can run."""
    empty = torch.empty(0, device=device, dtype=dtype)
    ours = getattr(ops, case.operator)
    names = BACKENDS if device == "cuda" else ("cpu",)
    fused = {
        name: functools.partial(ours, backend=name)
        for name in names
        if can_run(name, case.operator, empty) is None
    }
    found: dict[str, Callable] = {"reference": getattr(reference, case.operator)}
    plain = dtype == torch.float32
    if case.operator == "roi_crop":
        found["merged"] = through_float32(peers.roi_crop_merged)
        if find_spec("torchvision") and mode == "fwd":
            found["roi_align"] = through_float32(roi_align)
    if case.operator == "region_conv" and plain:
        found |= region_cases.PEERS
    if case.operator == "graph_conv":
        found |= {"hoisted": peers.graph_conv_hoisted} if plain else {}
        found |= {"cublas": CuBlas()} if mode == "fwd" else {}
    if case.operator == "graph_gru" and plain:
        found["hoisted"] = peers.graph_gru_hoisted
        found["compiled"] = peers.compiled(peers.graph_gru_hoisted)
    if mode == "fwd" and case.operator == "graph_gru":
        found["cudnn"] = CuDnn()
    if device == "cuda" and mode == "fwd" and case.operator == "graph_gru":
        if plain:
            found["graph"] = Graphed(found["compiled"])
        fused |= {f"{name}+graph": Graphed(function) for name, function in fused.items()}
    return found | fused


def region_conv_cases(device: str, batch: int = 16) -> list[Case]:
    """AAR's first region layer."""
    made = []
    for grid in region_cases.LAYERS:
        case = region_cases.case(grid, batch)

        def make(dtype: torch.dtype, make: Callable = case.make) -> tuple[Tensor, ...]:
            return tuple(t.to(device) for t in make(dtype))

        made.append(dataclasses.replace(case, make=make, dtypes=LOW))
    return made


CASES = {
    "roi_crop": roi_crop_cases,
    "graph_conv": graph_conv_cases,
    "graph_gru": graph_gru_cases,
    "region_conv": region_conv_cases,
}


def runs(cases: list[Case], device: str) -> list[Run]:
    """Every run of these cases, the providers of one comparison next to each other, `COMPILED` at the end."""
    found = [
        Run(case, mode, dtype, name, function)
        for case in cases
        for mode in case.passes
        for dtype in case.dtypes
        for name, function in providers(case, mode, dtype, device).items()
    ]
    return sorted(found, key=lambda run: run.provider in COMPILED and 1 + (run.mode != "fwd"))
