"""Hypothesis strategies: calls of the operators with any shape, layout, region and number."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.samples import Sample, Tensors

# How many examples are asked for. Without it there are a few, the same in every run of the tests.
ASKED = int(os.environ.get("AUFAST_FUZZ", "0"))


def examples(few: int) -> settings:
    """The number of examples of a test; `make fuzz` asks for more than a `few`, and for others each time."""
    return settings(max_examples=ASKED or few, derandomize=not ASKED, deadline=None, database=None)


View = Callable[[Tensor], Tensor]
SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 1e-40, 0.0)


@dataclass(frozen=True)
class Call:
    """An operator's call whose arguments are views of leaves, so that gradients pass through every layout."""

    sample: Sample  # its tensors are the leaves
    views: dict[str, View]
    about: str

    def __repr__(self) -> str:
        return f"{self.sample.operator}({self.about}, {self.sample.options})"

    def public(self, leaves: Tensors, backend: str | None = None) -> tuple[Tensor, ...]:
        """Call the public function on the views of these leaves."""
        seen = {name: None if t is None else self.views[name](t) for name, t in leaves.items()}
        return self.sample.public(seen, backend)


@st.composite
def _layout(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], View]:
    """A name, the shape of a leaf, and the view of it that has `shape`."""
    kinds = ["plain", "offset", "stepped", "requires_grad_view"]
    kinds += ["transposed"] if len(shape) > 1 else []
    kinds += ["channels_last"] if len(shape) == 4 else []
    kind = draw(st.sampled_from([*kinds, "expanded"]))
    match kind:
        case "offset":
            size = torch.Size(shape).numel()
            return kind, (size + 3,), lambda leaf: leaf[3:].view(shape)
        case "stepped":
            return kind, (*shape[:-1], 2 * shape[-1]), lambda leaf: leaf[..., ::2]
        case "transposed":
            return kind, (*shape[:-2], shape[-1], shape[-2]), lambda leaf: leaf.transpose(-1, -2)
        case "channels_last":
            return kind, shape, lambda leaf: leaf.contiguous(memory_format=torch.channels_last)
        case "expanded":
            axis = draw(st.integers(0, len(shape) - 1))
            leaf_shape = tuple(1 if k == axis else n for k, n in enumerate(shape))
            return f"{kind} along {axis}", leaf_shape, lambda leaf: leaf.expand(shape)
        case "requires_grad_view":
            return kind, (1, *shape), lambda leaf: leaf[0]
    return kind, shape, lambda leaf: leaf


@st.composite
def _call(draw: st.DrawFn, operator: str, shapes: dict[str, tuple[int, ...] | None], **options: Any) -> Call:
    """Standard normal numbers for these shapes, each in a layout of its own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leaves: Tensors = {}
    views, about = {}, []
    for name, shape in shapes.items():
        if shape is None:
            leaves[name] = None
            continue
        kind, leaf_shape, views[name] = draw(_layout(shape))
        leaf = torch.randn(leaf_shape, generator=generator, dtype=torch.float64)
        # Products of order one: where a gate is saturated, its gradient is all rounding, for everybody.
        leaves[name] = leaf / (2 * max(shape[-2], 1) ** 0.5) if name.startswith("W") else leaf
        about.append(f"{name} {tuple(shape)} {kind}")
    return Call(Sample(operator, "drawn", leaves, options), views, ", ".join(about))


SIDES = st.sampled_from([1, 2, 3, 7, 9])
CHANNELS = st.sampled_from([0, 1, 2, 5, 17])
SOME = st.sampled_from([1, 2, 5, 17])


@st.composite
def boxes(draw: st.DrawFn, count: int, height: int, width: int) -> Tensor:
    """`count` boxes (x1, y1, x2, y2) of every kind that training can make, float64 (count, 4)."""
    place = st.floats(-1.5, 2.5, width=16)
    rows = []
    for _ in range(count):
        x1, y1, x2, y2 = (draw(place) * side for side in (width, height, width, height))
        match draw(
            st.sampled_from(["any", "empty", "mirrored", "outside", "all", "huge", "on pixels", "same"])
        ):
            case "empty":
                x2 = x1
            case "mirrored":
                x1, x2 = max(x1, x2), min(x1, x2)
            case "outside":
                x1, x2 = width + 3.0, width + 5.0
            case "all":
                x1, y1, x2, y2 = 0.0, 0.0, float(width), float(height)
            case "huge":
                x1, y1, x2, y2 = -1e10, -1e10, 1e10, 1e10
            case "on pixels":
                x1, y1, x2, y2 = (round(2 * v) / 2 for v in (x1, y1, x2, y2))
            case "same" if rows:
                x1, y1, x2, y2 = rows[0]
        rows.append((x1, y1, x2, y2))
    return torch.tensor(rows, dtype=torch.float64).view(count, 4)


@st.composite
def roi_crops(draw: st.DrawFn) -> Call:
    """Crops by boxes or matrices."""
    batch, regions = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    channels, height, width = draw(CHANNELS), draw(SIDES), draw(SIDES)
    size = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    as_boxes = draw(st.booleans())
    options = {"size": size} if as_boxes else {"size": size, "align_corners": draw(st.booleans())}
    shape = (batch, regions, 4) if as_boxes else (batch, regions, 2, 3)
    call = draw(_call("roi_crop", {"features": (batch, channels, height, width), "rois": shape}, **options))
    if as_boxes:
        drawn = draw(boxes(batch * regions, height, width)).view(shape)
        call.sample.tensors["rois"] = drawn
        call.views["rois"] = lambda leaf: leaf
    return call


@st.composite
def graph_convs(draw: st.DrawFn) -> Call:
    """Graph convolutions, of any number of leading axes."""
    leading = draw(st.lists(st.integers(0, 3), max_size=2))
    nodes, ce, cin, cout = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(SOME), draw(SOME)
    softmax, shared, biased = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    pool = () if shared else (ce,)
    order = (draw(st.integers(1, 3)),) if softmax else ()
    shapes = {
        "x": (*leading, nodes, cin),
        "U": (nodes, ce),
        "Q": None if shared else (nodes, ce),
        "W": (*pool, *order, cin, cout),
        "bias": (*pool, cout) if biased else None,
    }
    return draw(_call("graph_conv", shapes, normalization="softmax" if softmax else "global"))


@st.composite
def graph_grus(draw: st.DrawFn) -> Call:
    """Graph-GRUs over clips, also of no length."""
    batch, steps, nodes = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 4))
    ce, c_in, c = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16])), draw(SOME)
    softmax, stateful, biased = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    order = (draw(st.integers(1, 3)),) if softmax else ()
    shapes: dict[str, tuple[int, ...] | None] = {"x": (batch, steps, nodes, c_in)}
    shapes |= dict.fromkeys(("U", "Q"), (nodes, ce))
    shapes |= dict.fromkeys(("W_z", "W_r", "W_h"), (ce, *order, c + c_in, c))
    shapes["h0"] = (batch, nodes, c) if stateful else None
    shapes |= dict.fromkeys(("b_z", "b_r", "b_h"), (ce, c) if biased else None)
    lengths = None
    if draw(st.booleans()):
        ends = st.lists(st.integers(-1, steps + 2), min_size=batch, max_size=batch)
        lengths = torch.tensor(draw(ends), dtype=torch.int64)
    normalization = "softmax" if softmax else "global"
    return draw(_call("graph_gru", shapes, lengths=lengths, normalization=normalization))


@st.composite
def region_convs(draw: st.DrawFn) -> Call:
    """Patch convolutions with and without what goes before and after."""
    n, batch = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    cin, cout = draw(SOME), draw(SOME)
    height, width = n * draw(st.integers(1, 5)), n * draw(st.integers(1, 5))
    normalised, biased = draw(st.booleans()), draw(st.booleans())
    shapes = {
        "x": (batch, cin, height, width),
        "weight": (n, n, cout, cin, 3, 3),
        "bias": (n, n, cout) if biased else None,
        "scale": (n, n, cin) if normalised else None,
        "shift": (n, n, cin) if normalised else None,
    }
    return draw(_call("region_conv", shapes))


CALLS = {
    "roi_crop": roi_crops,
    "graph_conv": graph_convs,
    "graph_gru": graph_grus,
    "region_conv": region_convs,
}


@st.composite
def mutations(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with some bytes changed, cut out, doubled, or with its end missing."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["change", "cut", "double", "end", "insert"])):
            case "change" if data:
                data[place] = draw(st.integers(0, 255))
            case "cut":
                del data[place : place + draw(st.integers(1, 40))]
            case "double":
                data[place:place] = data[place : place + draw(st.integers(1, 40))]
            case "end":
                del data[place:]
            case "insert":
                data[place:place] = draw(
                    st.sampled_from([b"\0", b"\xff", b"-1", b"1e999", b"nan", b",", b"\n", b"9" * 30])
                )
    return bytes(data)
