"""Inference forms of both models: normalisation folded, constants computed once, convolutions prepacked."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aufast import ops
from aufast.models.aar import AAR, FrameNetwork
from aufast.models.layers import ACTIVATIONS, full_precision
from aufast.models.margl import MARGL, RegionalNetworks
from aufast.models.plain import Branch, Branches
from aufast.models.pretrained import INFERENCE_DTYPES
from aufast.models.resnet import BasicBlock, ResNet18, ResNetOutput
from aufast.models.single import conv_to_one, taps_to_one
from aufast.nn import RegionConv, RegionLayer
from aufast.ops.conv3x3 import fused_conv3x3, serves

Model = TypeVar("Model", AAR, MARGL)

# Frames that go through the frame network together: what a branch holds of them stays in the cache.
FRAMES = 4


def optimize_for_inference(model: Model, dtype: torch.dtype | str | None = None) -> Model:
    """Make a copy of a model that only predicts, and does it faster.

    Batch normalisation is folded into the convolutions, what depends on parameters alone is computed once,
    images are kept channels_last, and on the CPU weights are held in the layout that its convolutions read.
    The copy takes the same arguments and gives the same outputs. It has no gradients and no training mode;
    it saves, loads, exports and compiles as any model does.

    Args:
        model: an AAR or MARGL, in any mode; it stays as it is. Its running statistics are what is folded.
        dtype: of convolutions and feature maps. None keeps the model's own; `torch.bfloat16` is for machines
            that compute in it; "auto" is bfloat16 where this machine does and the model's own elsewhere.
            Boxes, pooled features, graphs, states and outputs stay in float32.

    Returns:
        A model of the same class, in evaluation mode. Images may be float32 whatever `dtype` is.

    Raises:
        TypeError: `model` is no model of this library.
        ValueError: it is optimized already, the dtype is not one of those above, or a weight is not finite:
            fused layers would turn its NaN into plausible numbers.
    """
    if not isinstance(model, (AAR, MARGL)):
        raise TypeError(f"optimize_for_inference: model must be an AAR or MARGL, got {type(model).__name__}")
    if model.inference_dtype is not None:
        raise ValueError("optimize_for_inference: model is optimized already; start from the original")
    parameter = next(model.parameters())
    if dtype == "auto":
        dtype = torch.bfloat16 if computes_bfloat16(parameter.device) else None
    dtype = parameter.dtype if dtype is None else dtype
    if dtype not in INFERENCE_DTYPES.values():
        raise ValueError(
            f"optimize_for_inference: dtype must be None, 'auto' or torch's {', '.join(INFERENCE_DTYPES)}, "
            f"got {dtype!r}"
        )
    for name, weight in model.state_dict().items():
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError(f"optimize_for_inference: {name} of the model is not finite")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    if parameter.dtype == torch.bfloat16:
        fast.float()
    if isinstance(fast, AAR):
        fast.frame = FusedFrameNetwork(fast.frame, fast.reference().frame, fast.attention_size, dtype)
    else:
        _optimize_margl(fast, dtype)
    fast.inference_dtype = dtype
    return fast


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _optimize_margl(model: MARGL, dtype: torch.dtype) -> None:
    model.backbone = FusedResNet(model.backbone, dtype)
    for level in model.levels:
        if level.roi.squeeze is not None:
            level.roi.squeeze = FusedConv(level.roi.squeeze, dtype=dtype)
        level.regional = FusedRegions(level.regional, dtype)
    if model.graph is not None:
        model.normalized = model.normalized_adjacency()


class FusedConv(nn.Module):
    """A convolution with its batch normalisation folded in and its ReLU fused.

    Args:
        conv: any convolution with zero padding.
        scale: what normalisation multiplies each output channel by, (C_out,), or None.
        shift: what it adds, (C_out,), or None.
        relu: whether a ReLU follows.
        dtype: of the weights and of what goes through.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        relu: bool = False,
        dtype: torch.dtype,
    ):
        super().__init__()
        weight = conv.weight.detach()
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
        if scale is not None:
            weight, bias = weight * scale[:, None, None, None], bias * scale
        if shift is not None:
            bias = bias + shift
        # What may go through `fused_conv3x3` is kept as that reads it.
        self.minimal = (
            weight.shape[2:] == (3, 3)
            and conv.stride == conv.padding == (1, 1)
            and dtype in (torch.float32, torch.float64)
        )
        layout = torch.contiguous_format if self.minimal else torch.channels_last
        self.weight = constant(weight.to(dtype, memory_format=layout))
        self.bias = constant(bias.to(dtype))
        self.stride, self.padding, self.groups, self.relu = conv.stride, conv.padding, conv.groups, relu
        self._packed: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Map (B, C_in, H, W), or its groups apart (B, groups, C_in / groups, H, W), to (B, C_out, H', W').

        `shortcut` is added, and may be overwritten.
        """
        if self.minimal and not (x.requires_grad and torch.is_grad_enabled()):
            maps = x if x.dim() == 5 else x.unflatten(1, (self.groups, -1))
            if serves(maps, self.weight):
                return fused_conv3x3(maps, self.weight, self.bias, shortcut, relu=self.relu)
        if x.dim() == 5:  # side by side, channels_last
            x = x.permute(0, 3, 4, 1, 2).flatten(3).permute(0, 3, 1, 2)
        if not _packs(x):
            x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
            x = x if shortcut is None else x + shortcut
            return F.relu(x) if self.relu else x
        x = x.contiguous(memory_format=torch.channels_last)
        geometry = (self.padding, self.stride, (1, 1), self.groups)
        unary = ("relu" if self.relu else "none", [], "")
        if shortcut is None:
            return torch.ops.mkldnn._convolution_pointwise(x, self._pack(x), self.bias, *geometry, *unary)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, x, self._pack(x), self.bias, *geometry, "add", None, *unary
        )

    def _pack(self, x: Tensor) -> Tensor:
        # The best layout depends on the size of the map, hardly on the batch.
        version = 0 if self.weight.is_inference() else self.weight._version
        key = (self.weight.data_ptr(), version, x.shape[1:])
        if self._packed is None or self._packed[0] != key:
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, (1, 1), self.groups, x.shape
            )
            self._packed = (key, packed)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}  # derived: made again where it is needed

    def extra_repr(self) -> str:
        before, after = self.weight.shape[1] * self.groups, self.weight.shape[0]
        return f"{before}, {after}, stride={self.stride}, groups={self.groups}, relu={self.relu}"


def _packs(x: Tensor) -> bool:
    """Whether oneDNN's prepacked convolutions take this input; tracers see the plain convolution."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and (x.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def constant(value: Tensor) -> nn.Parameter:
    """A parameter that is never trained, in memory of its own."""
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def spoiled(images: Tensor) -> Tensor:
    """Zeros (N,), or NaN for an image (C, H, W) that is not finite: oneDNN's fused ReLU makes 0 of a NaN."""
    return 0 * images.sum((1, 2, 3), dtype=torch.promote_types(images.dtype, torch.float32))


def folded(norm: nn.Module) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What evaluation-mode batch normalisation multiplies by and adds, each (C,); None without one."""
    if not isinstance(norm, nn.BatchNorm2d):
        return None, None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale.detach(), (norm.bias - norm.running_mean * scale).detach()


class FusedRegionLayer(nn.Module):
    """A region layer and the 2×2 max pool after it.

    The last batch normalisation is `|s|·(±y) + t`. With its signs moved into the filters that make y, what
    is left of it grows with y, as the ReLU does, so the maximum of four pixels can be taken before both: they
    run on a quarter of the map.
    """

    def __init__(self, layer: RegionLayer, dtype: torch.dtype):
        super().__init__()
        scale, shift = folded(layer.norm)
        sign = torch.where(scale < 0, -1, 1).to(scale.dtype)  # (C_out,)
        self.conv = FusedConv(layer.conv, dtype=dtype)
        self.conv.weight *= sign[:, None, None, None]
        self.conv.bias *= sign
        signs = sign.split([region.out_channels for region in layer.regions])
        self.regions = nn.ModuleList(
            FusedRegionConv(region, before, after, dtype)
            for region, before, after in zip(layer.regions, (sign, *signs[:-1]), signs, strict=True)
        )
        self.scale = constant(scale.abs()[:, None, None].to(dtype))
        self.shift = constant(shift[:, None, None].to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H/2, W/2)."""
        total = self.conv(x)  # (B, C_out, H, W)
        found, y = [], total
        for region in self.regions:
            y = region(y)
            found.append(y)
        total = F.max_pool2d(total.add_(torch.cat(found, dim=1)), 2)
        return torch.addcmul(self.shift, total, self.scale).relu_()


class FusedRegionConv(nn.Module):
    """A region convolution whose normalisation is computed once, between channels of changed sign."""

    def __init__(self, layer: RegionConv, before: Tensor, after: Tensor, dtype: torch.dtype):
        super().__init__()
        norm = layer.norm
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # (n, n, C_in)
        self.weight = constant((layer.weight * after[:, None, None, None]).to(dtype))
        self.bias = constant((layer.bias * after).to(dtype))
        self.scale = constant((scale * before).to(dtype))
        self.shift = constant((norm.bias - norm.running_mean * scale).to(dtype))
        self.backend = layer.backend

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        return ops.region_conv(x, self.weight, self.bias, self.scale, self.shift, backend=self.backend)


class AttentionMap(nn.Module):
    """The one-channel convolution of an attention map, and its sigmoid."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.taps = constant(taps_to_one(conv.weight.detach()).to(dtype))  # (C, 9)
        self.bias = constant(conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, h, w) to (N, 1, h, w) in [0, 1], in x's dtype."""
        return conv_to_one(x, self.taps, self.bias).sigmoid().to(x.dtype)


class FusedBranch(nn.Module):
    """One AU's branch up to the global average, from a branch of the plain form."""

    def __init__(self, branch: Branch, dtype: torch.dtype):
        super().__init__()
        relu = branch.activation is F.relu
        # Another activation than ReLU cannot be fused.
        self.activation = ACTIVATIONS["none"] if relu else branch.activation
        options = {"relu": relu, "dtype": dtype}
        self.conv1 = FusedConv(branch.conv1, *folded(branch.bn1), **options)
        self.conv2 = FusedConv(branch.conv2, *folded(branch.bn2), **options)
        self.conv3 = FusedConv(branch.conv3, *folded(branch.bn3), **options)
        self.attention = None if branch.attention is None else AttentionMap(branch.attention, dtype)
        self.multiply_first = branch.multiply_first and self.attention is not None
        scale, shift = folded(branch.bn4)
        if self.multiply_first:
            # M·(W x + b) is what bn4 sees: its scale goes into W and b, its shift comes after M.
            self.conv4 = FusedConv(branch.conv4, scale, dtype=dtype)
            self.relu = relu
            self.shift = None if shift is None else constant(shift[:, None, None].to(dtype))
        else:
            self.conv4 = FusedConv(branch.conv4, scale, shift, **options)
        self.conv5 = None if branch.bn5 is None else FusedConv(branch.conv5, *folded(branch.bn5), **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (N, 8c, h, w) to what is averaged (N, 12c, h, w), and attention (N, 1, h, w) or None."""
        x = self.activation(self.conv1(x))
        x = self.activation(self.conv2(x))
        x = self.activation(self.conv3(x))
        attention = None if self.attention is None else self.attention(x)
        x = self.conv4(x)
        if self.multiply_first:
            x = x.mul_(attention)
            x = x if self.shift is None else x.add_(self.shift)
            x = self.activation(x.relu_() if self.relu else x)
        else:
            x = self.activation(x)
            x = x if attention is None else x.mul_(attention)
        return x if self.conv5 is None else self.activation(self.conv5(x)), attention


def seen_by_taps(height: int, width: int, like: Tensor) -> Tensor:
    """Which pixels each tap of a zero-padded 3×3 convolution meets.

    A tap of the filter's first row never meets the map's last row, one of its last row not the first; columns
    alike.

    Args:
        height: h.
        width: w.
        like: whose dtype and device are taken.

    Returns:
        (9, h·w) of zeros and ones.
    """
    taps = torch.arange(3, device=like.device)[:, None]

    def line(length: int) -> Tensor:
        place = (
            torch.arange(length, device=like.device) + 1 - taps
        )  # (3, length): where the tap's result goes
        return (place >= 0) & (place < length)

    both = line(height)[:, None, :, None] & line(width)[None, :, None, :]  # (3, 3, h, w)
    return both.flatten(2).flatten(0, 1).to(like.dtype)


class FusedBranches(nn.Module):
    """The branches of all AUs, one after the other, so that each one's maps stay in the cache."""

    def __init__(self, branches: Branches, side: int, dtype: torch.dtype):
        super().__init__()
        self.branches = nn.ModuleList(FusedBranch(branch, dtype) for branch in branches)
        self.pooled = None
        if branches[0].bn5 is None:
            weight = torch.stack([branch.conv5.weight.detach() for branch in branches])  # (m, C, C, 3, 3)
            self.pooled = constant(weight.permute(0, 3, 4, 2, 1).flatten(1, 3))  # (m, 9·C, C)
            self.bias = constant(torch.stack([branch.conv5.bias.detach() for branch in branches]))
            self.register_buffer("seen", seen_by_taps(side, side, self.pooled).to(dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map (N, 8c, h, w) to features (N, m, 12c) and attention maps (N, m, h, w) or None."""
        features, maps = [], []
        for branch in self.branches:
            found, attention = branch(x)
            pixels = found.permute(0, 2, 3, 1).flatten(1, 2)  # (N, h·w, 12c)
            features.append(pixels.mean(1) if self.pooled is None else (self.seen @ pixels).flatten(1))
            maps.append(attention)
        features = torch.stack(features)  # (m, N, 12c), or (m, N, 9·12c)
        if self.pooled is not None:
            sums = features.to(self.pooled.dtype) / (x.shape[2] * x.shape[3])
            features = torch.baddbmm(self.bias[:, None], sums, self.pooled)  # (m, N, 12c)
        return features.transpose(0, 1), None if maps[0] is None else torch.cat(maps, dim=1)


class FusedFrameNetwork(nn.Module):
    """`FrameNetwork` for inference, from its plain form."""

    def __init__(self, frame: FrameNetwork, plain: FrameNetwork, side: int, dtype: torch.dtype):
        super().__init__()
        self.region1 = FusedRegionLayer(frame.region1, dtype)
        self.region2 = FusedRegionLayer(frame.region2, dtype)
        self.branches = FusedBranches(plain.branches, side, dtype)
        self.head = frame.head
        self.dtype = dtype

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `FrameNetwork.forward`; features and logits in at least float32."""
        frames = frames.to(self.dtype, memory_format=torch.channels_last)
        # Tracers take all frames at once: the number of pieces would be theirs for good.
        pieces = (frames,) if torch.compiler.is_compiling() or not len(frames) else frames.split(FRAMES)
        features, attention = zip(*map(self._look, pieces), strict=True)
        features = torch.cat(features)  # (N, m, 12c)
        features = features + spoiled(frames)[:, None, None].to(features.dtype)
        attention = None if attention[0] is None else torch.cat(attention)  # (N, m, l/4, l/4)
        return features, attention, full_precision(self.head(features))

    def _look(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.branches(self.region2(self.region1(frames)))


class FusedRegions(nn.Module):
    """The regional networks of a level; the second convolution's average is taken in float32."""

    def __init__(self, networks: RegionalNetworks, dtype: torch.dtype):
        super().__init__()
        relu = networks.activation is F.relu
        self.activation = ACTIVATIONS["none"] if relu else networks.activation
        self.networks = networks.networks
        self.conv1 = FusedConv(networks.conv1, *folded(networks.bn1), relu=relu, dtype=dtype)
        self.conv2 = FusedConv(networks.conv2, *folded(networks.bn2), relu=relu, dtype=dtype)

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (B, R, in_channels, h, w) to features (B, R, C), in at least float32."""
        x = self.activation(self.conv1(crops))  # (B, R·C, h, w)
        x = full_precision(self.activation(self.conv2(x)))
        return x.mean((2, 3)).unflatten(1, (self.networks, -1))  # (B, R, C)


def pooled(x: Tensor) -> Tensor:
    """`max_pool2d(x, 3, 2, 1)` of a ReLU's map (B, C, H, W), H and W even.

    PyTorch's writes an index of eight bytes beside every bfloat16, though nobody asks for it. Numbers that
    are not negative are ordered as their bits are, so maxima of rows and of columns are those of integers.
    """
    if x.dtype != torch.bfloat16 or not _packs(x):
        return F.max_pool2d(x, 3, 2, 1)
    bits = x.view(torch.int16)
    return _halved(_halved(bits, 2), 3).view(torch.bfloat16)


def _halved(x: Tensor, axis: int) -> Tensor:
    """Along one axis, result i is the largest of 2i - 1, 2i and 2i + 1."""
    even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    largest = torch.maximum(even, odd)
    count = largest.shape[axis] - 1
    after_first = largest.narrow(axis, 1, count)
    torch.maximum(after_first, odd.narrow(axis, 0, count), out=after_first)
    return largest


class FusedBlock(nn.Module):
    """Two convolutions and the shortcut, which the second one adds."""

    def __init__(self, block: BasicBlock, dtype: torch.dtype):
        super().__init__()
        self.conv1 = FusedConv(block.conv1, *folded(block.bn1), relu=True, dtype=dtype)
        self.conv2 = FusedConv(block.conv2, *folded(block.bn2), relu=True, dtype=dtype)
        self.downsample = None
        if block.downsample is not None:
            conv, norm = block.downsample
            self.downsample = FusedConv(conv, *folded(norm), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # No map but a block's own result is ever a plain shortcut, so it may be overwritten.
        return self.conv2(self.conv1(x), x if self.downsample is None else self.downsample(x))


class FusedResNet(nn.Module):
    """ResNet-18 for inference; its logits are computed in the classifier's dtype."""

    def __init__(self, resnet: ResNet18, dtype: torch.dtype):
        super().__init__()
        self.conv1 = FusedConv(resnet.conv1, *folded(resnet.bn1), relu=True, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.Sequential(*(FusedBlock(block, dtype) for block in layer))
            for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
        )
        self.fc = resnet.fc
        self.dtype = dtype

    def forward(self, images: Tensor) -> ResNetOutput:
        """As `ResNet18.forward`."""
        x = self.conv1(images.to(self.dtype, memory_format=torch.channels_last))
        x = pooled(x)
        levels = []
        for layer in self.layers:
            x = layer(x)
            levels.append(x)
        logits = self.fc(x.to(self.fc.weight.dtype).mean((2, 3)))
        return ResNetOutput(logits + spoiled(images)[:, None].to(logits.dtype), tuple(levels))
