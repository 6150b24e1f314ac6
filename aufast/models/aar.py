"""AAR, adaptive attention and relation (IEEE TIP 2023), and the variants of its ablation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aufast.aus import AU_SETS
from aufast.models.checkpointing import recomputed
from aufast.models.config import Checker
from aufast.models.layers import (
    ACTIVATIONS,
    NodeLinear,
    Stacked,
    check_pictures,
    exportable,
    full_precision,
    overwriting,
)
from aufast.models.pretrained import Pretrained
from aufast.models.single import OneConv, apart
from aufast.models.streaming import AARStream
from aufast.nn import GraphConv, GraphGRU, RegionLayer


@dataclass(frozen=True)
class _Variant:
    """What a row of AAR Table VI has; "b-net" and "bw-net" differ in their loss alone."""

    attention: bool = True
    graph: str = "none"  # "none", "shared" (eq. 15), "specific" (eq. 11) or "gru" (eq. 13)
    layers: int = 0
    temporal_average: bool = False


VARIANTS = {
    "b-net": _Variant(attention=False),
    "bw-net": _Variant(attention=False),
    "aa": _Variant(),
    "aa-gsh": _Variant(graph="shared", layers=1),
    "aa-gsp": _Variant(graph="specific", layers=2),
    "aa-gsp-tavg": _Variant(graph="specific", layers=2, temporal_average=True),
    "aar": _Variant(graph="gru", layers=2),
}


@dataclass(frozen=True)
class AARConfig:
    """What AAR and its variants are built from.

    Args:
        variant: "aar" or a row of AAR Table VI, see `VARIANTS`.
        aus: the action units, in the order of every output.
        image_size: side l of a frame, a multiple of 16: l and l/2 are cut into 8×8 patches.
        pixel_mean: of each colour in [0, 1], taken off by `to_input`.
        pixel_std: what `to_input` divides by.
        width: unit width c; region layers have 4c and 8c channels, AU branches and graph layers 12c.
        embedding: ce of the graph layers.
        branch_norm: batch normalisation in the AU branches.
        branch_activation: after it.
        attention_position: "before_norm" multiplies conv4's output by the attention map, then normalises and
            activates (ARL's order); "after_activation" multiplies last.
        last_norm: batch normalisation and activation after conv5 too.
        graph_layers: None takes the variant's: 1 for "aa-gsh", 2 for "aa-gsp", "aa-gsp-tavg" and "aar".
        graph_activation: between the spatial graph layers of "aa-gsh" and "aa-gsp"; eq. (11) has none.
        graph_bias: bias pools in the graph layers.
    """

    variant: str = "aar"
    aus: tuple[int, ...] = AU_SETS["bp4d"]
    image_size: int = 176
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    width: int = 8
    embedding: int = 8
    branch_norm: bool = True
    branch_activation: str = "relu"
    attention_position: str = "before_norm"
    last_norm: bool = False
    graph_layers: int | None = None
    graph_activation: str = "none"
    graph_bias: bool = False

    def __post_init__(self) -> None:
        check = Checker(self)
        check.choice("variant", VARIANTS)
        check.aus()
        check.image_size(16)
        check.integers("width", "embedding")
        check.flags("branch_norm", "last_norm", "graph_bias")
        check.choice("branch_activation", ACTIVATIONS)
        check.choice("attention_position", ("before_norm", "after_activation"))
        check.choice("graph_activation", ACTIVATIONS)
        check.triples("pixel_mean")
        check.triples("pixel_std", positive=True)
        if self.graph_layers is not None:
            check.integers("graph_layers")


@exportable
class AAROutput(NamedTuple):
    """What AAR returns for B clips of T frames and m AUs."""

    probabilities: Tensor
    """(B, T, m)."""
    frame_probabilities: Tensor
    """(B, T, m) from each frame alone."""
    attention: Tensor | None
    """(B, T, m, l/4, l/4) attention maps; None for "b-net" and "bw-net"."""
    state: tuple[Tensor, ...] | None
    """The last state (B, m, 12c) of each graph-GRU layer, to go on with; None where the variant has none."""
    logits: Tensor
    """(B, T, m); for "aa-gsp-tavg" those of each frame, whose probabilities are averaged afterwards."""
    frame_logits: Tensor
    """(B, T, m)."""


class _TapSums(torch.autograd.Function):
    """For each tap of a zero-padded 3×3 convolution the sum of the pixels that it meets.

    A tap of the filter's first row never meets the map's last row, one of its last row not the first; columns
    alike. The gradient is one number a channel everywhere but at the border: one pass over the map.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(pixels: Tensor) -> Tensor:
        """Map (N, h, w, C) to (N, 3, 3, C)."""

        def met(x: Tensor, axis: int) -> Tensor:
            total = x.sum(axis)
            return torch.stack([total - x.select(axis, -1), total, total - x.select(axis, 0)], axis)

        return met(met(pixels, 1), 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.sizes = inputs[0].shape[1:3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Give every pixel the gradients of the taps that meet it: (N, 3, 3, C) to (N, h, w, C)."""

        def spread(g: Tensor, axis: int) -> Tensor:
            shape = [*g.shape[:axis], ctx.sizes[axis - 1], *g.shape[axis + 1 :]]
            out = g.sum(axis, keepdim=True).expand(shape).clone(memory_format=torch.contiguous_format)
            out.select(axis, -1).sub_(g.select(axis, 0))
            out.select(axis, 0).sub_(g.select(axis, 2))
            return out

        return spread(spread(grad, 2), 1)


class TapSums(_TapSums):
    """The same with forward mode, which `torch.compile` does not take."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        """Forward mode: sums are linear."""
        return TapSums.forward(tangent)


def pooled_conv(x: Tensor, conv: nn.Conv2d | OneConv) -> Tensor:
    """Global average of a zero-padded 3×3 convolution, without the convolution.

    The mean over all output pixels is linear in the input: each tap of the filter sees the sum of the pixels
    that it meets. So nine sums per channel are enough.

    Args:
        x: (N, C_in, H, W).
        conv: 3×3, stride 1, zero padding 1, any groups.

    Returns:
        (N, C_out), equal to `conv(x).mean((2, 3))`.
    """
    taps = _TapSums if torch.compiler.is_compiling() else TapSums
    sums = taps.apply(full_precision(x).permute(0, 2, 3, 1))  # (N, 3, 3, C_in)
    means = (sums / (x.shape[2] * x.shape[3])).permute(0, 3, 1, 2).to(conv.weight.dtype)
    return F.conv2d(means, conv.weight, conv.bias, groups=conv.groups).flatten(1)  # (N, C_out)


class AUBranches(Stacked):
    """One branch of five convolutions per AU, each with its attention map.

    The m branches are groups of one convolution: output channels `j·12c … (j+1)·12c - 1` are those of AU j.
    All read the same input, so the first convolution is one wide one. A CPU runs the branches one after the
    other: one AU's maps fit its caches, those of all AUs together go to memory for every normalisation,
    activation and gradient.

    Args:
        config: of the model.
    """

    LAYERS = (
        *(f"{kind}{k}" for k in range(1, 6) for kind in ("conv", "bn")),
        "attention",
    )

    def __init__(self, config: AARConfig, factory: dict):
        super().__init__()
        m, width = len(config.aus), 12 * config.width
        self.networks = m
        self.checkpointing = False
        self.multiply_first = config.attention_position == "before_norm"
        self.activation = ACTIVATIONS[config.branch_activation]

        def norm(wanted: bool) -> nn.Module:
            return nn.BatchNorm2d(m * width, **factory) if wanted else nn.Identity()

        def grouped(channels: int) -> nn.Conv2d:
            return nn.Conv2d(m * width, m * channels, 3, padding=1, groups=m, **factory)

        self.conv1 = nn.Conv2d(8 * config.width, m * width, 3, padding=1, **factory)
        self.bn1 = norm(config.branch_norm)
        self.conv2, self.bn2 = grouped(width), norm(config.branch_norm)
        self.conv3, self.bn3 = grouped(width), norm(config.branch_norm)
        self.attention = grouped(1) if VARIANTS[config.variant].attention else None
        self.conv4, self.bn4 = grouped(width), norm(config.branch_norm)
        self.conv5 = grouped(width)
        self.bn5 = norm(True) if config.last_norm else None
        # As the maps are: a gradient then comes in its weight's own layout, which saves a slow copy of each.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map stem features to AU features.

        Args:
            x: (N, 8c, h, w).

        Returns:
            (N, m, 12c), and the attention maps (N, m, h, w) or None.
        """
        # Convolutions and their gradients are up to twice as fast with the channels innermost.
        x = x.contiguous(memory_format=torch.channels_last)
        compiling = torch.compiler.is_compiling()  # whose programs would be m times as long
        if compiling or not (x.device.type == "cpu" or self.checkpointing):
            features, attention = self._run(self, x)
            return features.unflatten(1, (self.networks, -1)), attention
        features, maps = [], []
        for branch in apart(self, self.LAYERS, self.networks):
            run = partial(self._run, branch)
            found, attention = recomputed(self, run, x) if self.checkpointing else run(x)
            features.append(found)  # (N, 12c)
            maps.append(attention)  # (N, 1, h, w)
        return torch.stack(features, dim=1), None if maps[0] is None else torch.cat(maps, dim=1)

    def _run(self, of: AUBranches | SimpleNamespace, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the n branches whose layers `of` holds: features (N, n·12c) and maps (N, n, h, w) or None."""
        activation = overwriting(self.activation)
        x = activation(of.bn1(of.conv1(x)))  # (N, n·12c, h, w)
        x = activation(of.bn2(of.conv2(x)))
        x = activation(of.bn3(of.conv3(x)))
        attention = None if of.attention is None else of.attention(x).sigmoid()  # (N, n, h, w)
        x = of.conv4(x)
        if self.multiply_first:
            x = activation(of.bn4(attend(x, attention)))
        else:
            x = attend(activation(of.bn4(x)), attention)
        if of.bn5 is not None:
            return activation(of.bn5(of.conv5(x))).mean((2, 3)), attention
        return pooled_conv(x, of.conv5), attention


def attend(x: Tensor, attention: Tensor | None) -> Tensor:
    """Multiply every network's maps (N, n·C, h, w) by its attention map of (N, n, h, w)."""
    if attention is None:
        return x
    maps = x.unflatten(1, (attention.shape[1], -1)) * attention.unsqueeze(2)  # (N, n, C, h, w)
    return maps.flatten(1, 2)


class FrameNetwork(nn.Module):
    """The adaptive attention regression network: everything that looks at one frame.

    Args:
        config: of the model.

    Source: AAR section III-B.
    """

    def __init__(self, config: AARConfig, factory: dict):
        super().__init__()
        c = config.width
        self.checkpointing = False
        self.region1 = RegionLayer(3, 4 * c, **factory)
        self.region2 = RegionLayer(4 * c, 8 * c, **factory)
        self.branches = AUBranches(config, factory)
        self.head = NodeLinear(len(config.aus), 12 * c, **factory)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Look at frames one by one.

        Args:
            frames: (N, 3, l, l).

        Returns:
            AU features (N, m, 12c), attention maps (N, m, l/4, l/4) or None, and logits (N, m).
        """
        x = self._stage(self.region1, frames)  # (N, 4c, l/2, l/2)
        x = self._stage(self.region2, x)  # (N, 8c, l/4, l/4)
        features, attention = self.branches(x)
        return features, attention, full_precision(self.head(features))

    def _stage(self, layer: RegionLayer, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return F.max_pool2d(layer(x), 2)

        return recomputed(layer, run, x) if self.checkpointing else run(x)


def _clip_mean(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean over each clip's own frames: (B, T, m) to (B, 1, m)."""
    if lengths is None:
        return values.mean(1, keepdim=True)
    counted = torch.arange(values.shape[1], device=values.device) < lengths[:, None]  # (B, T)
    total = (values * counted[..., None]).sum(1, keepdim=True)
    return total / counted.sum(1)[:, None, None]


class AAR(Pretrained):
    """AAR or one of its variants.

    `frame` is the network of the first training stage, `graph` and `head` those of the second.

    Args:
        config: None means `AARConfig()`, the model of the paper for BP4D.

    Source: AAR section III.
    """

    config_class = AARConfig
    variants = tuple(VARIANTS)

    def __init__(
        self,
        config: AARConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config = AARConfig() if config is None else config
        variant = VARIANTS[config.variant]
        m, width = len(config.aus), 12 * config.width
        self.frame = FrameNetwork(config, factory)
        self.relations = nn.ModuleList()
        self.head = None
        if variant.graph != "none":
            layers = variant.layers if config.graph_layers is None else config.graph_layers
            options = {"embedding": config.embedding, "bias": config.graph_bias, **factory}
            if variant.graph != "gru":
                options["shared"] = variant.graph == "shared"
            layer = GraphGRU if variant.graph == "gru" else GraphConv
            self.relations.extend(layer(width, width, m, **options) for _ in range(layers))
            self.head = NodeLinear(m, width, **factory)
        self.graph_activation = ACTIVATIONS[config.graph_activation]

    @property
    def graph(self) -> nn.ModuleList:
        """The graph layers; registered as `relations`, since an exported program calls itself `graph`."""
        return self.relations

    @property
    def attention_size(self) -> int:
        """Side of the attention maps, l/4."""
        return self.config.image_size // 4

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps few activations of the frame network and computes the others again.

        Set it for long clips: a training step takes about a third longer and a fraction of the memory. The
        numbers are the same, running statistics included.
        """
        return self.frame.checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        self.frame.checkpointing = self.frame.branches.checkpointing = wanted

    def stream(self, *, chunk: int = 16) -> AARStream:
        """Start on a video that comes frame by frame or in chunks.

        The stream carries the graph-GRU's state from call to call. Its predictions are those of the whole
        clip, and its memory does not grow with the video. A new video needs a new stream.

        Args:
            chunk: frames that go through the network together; more in one call are taken in pieces.

        Returns:
            A callable: frames in, the model's output for them back; see `AARStream`.

        Raises:
            ValueError: the variant is "aa-gsp-tavg", whose predictions need the whole clip, or a bad `chunk`.
        """
        return AARStream(self, chunk)

    def forward(
        self, clips: Tensor, state: tuple[Tensor, ...] | None = None, lengths: Tensor | None = None
    ) -> AAROutput:
        """Recognise action units in every frame of clips of any length.

        In evaluation mode a clip may come in chunks, each with the `state` of the one before: the numbers are
        those of the whole clip. Variants without graph-GRU ignore `state`.

        Args:
            clips: (B, T, 3, l, l), l being `config.image_size`, in the model's dtype.
            state: of the chunk before; None at the start of a clip.
            lengths: (B,) int64, frames of each clip; None means T for all. What is returned for frames at and
                after a clip's end says nothing; the state is the one at its own end, and "aa-gsp-tavg"
                averages over its own frames. In training mode such frames count in batch statistics.

        Returns:
            Probabilities, attention maps, the state to go on with, and logits.

        Raises:
            TypeError, ValueError: an argument of wrong rank, size, dtype or device.
        """
        check_pictures(self, "clips", clips, "B, T")
        if lengths is not None:
            self._check_lengths(clips, lengths)
        shape = clips.shape[:2]
        features, attention, frame_logits = self.frame(clips.flatten(0, 1))
        features = features.unflatten(0, shape)  # (B, T, m, 12c)
        frame_logits = frame_logits.unflatten(0, shape)  # (B, T, m)
        attention = None if attention is None else attention.unflatten(0, shape)  # (B, T, m, l/4, l/4)

        variant = VARIANTS[self.name]
        logits, last = frame_logits, None
        if variant.graph == "gru":
            features, last = self._through_time(features, state, lengths)
        elif variant.graph != "none":
            features = self._through_space(features)
        if self.head is not None:
            logits = full_precision(self.head(features))  # (B, T, m)
        probabilities = logits.sigmoid()
        if variant.temporal_average:
            probabilities = _clip_mean(probabilities, lengths).expand_as(logits)
        return AAROutput(probabilities, frame_logits.sigmoid(), attention, last, logits, frame_logits)

    def _through_time(
        self, x: Tensor, state: tuple[Tensor, ...] | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        before = (None,) * len(self.graph) if state is None else self._check_state(x, state)
        after = []
        for layer, h0 in zip(self.graph, before, strict=True):
            x, h = layer(x, h0, lengths)  # (B, T, m, 12c), (B, m, 12c)
            after.append(h)
        return x, tuple(after)

    def _through_space(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.graph):
            x = layer(x if index == 0 else self.graph_activation(x))  # (B, T, m, 12c)
        return x

    def _check_lengths(self, clips: Tensor, lengths: Tensor) -> None:
        wanted = f"int64 of shape ({len(clips)},) on {clips.device}"
        if not isinstance(lengths, Tensor):
            raise TypeError(f"{self.name}: lengths must be {wanted}, got {type(lengths).__name__}")
        if (lengths.dtype, lengths.shape, lengths.device) != (torch.int64, clips.shape[:1], clips.device):
            found = f"{lengths.dtype} of shape {tuple(lengths.shape)} on {lengths.device}"
            raise ValueError(f"{self.name}: lengths must be {wanted}, got {found}")

    def _check_state(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape = (x.shape[0], *x.shape[2:])
        if not isinstance(state, (tuple, list)) or len(state) != len(self.graph):
            found = f"{len(state)}" if isinstance(state, (tuple, list)) else type(state).__name__
            raise ValueError(
                f"{self.name}: state must be {len(self.graph)} tensors, one a layer, got {found}"
            )
        for index, h in enumerate(state):
            if not isinstance(h, Tensor) or h.shape != shape:
                found = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
                raise ValueError(f"{self.name}: state[{index}] must have shape {shape}, got {found}")
            if not h.is_floating_point():
                raise TypeError(f"{self.name}: state[{index}] must be floating point, got {h.dtype}")
            if h.device != x.device:
                raise ValueError(
                    f"{self.name}: state[{index}] is on {h.device}, but the clips are on {x.device}"
                )
        return tuple(state)
