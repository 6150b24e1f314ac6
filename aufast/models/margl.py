"""MARGL, multi-level adaptive ROI and graph learning (ICASSP 2021), and the variants of its ablation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aufast.aus import AU_SETS
from aufast.labels import check_labels
from aufast.models.config import Checker
from aufast.models.layers import (
    ACTIVATIONS,
    Conv3x3,
    NodeLinear,
    Stacked,
    check_pictures,
    exportable,
    full_precision,
    overwriting,
)
from aufast.models.pretrained import Pretrained
from aufast.models.resnet import WIDTHS, ResNet18
from aufast.nn import AdaptiveRoi

LEVELS = ("layer2", "layer3", "layer4")


@dataclass(frozen=True)
class _Variant:
    """What a row of MARGL Table 1 has."""

    levels: int  # 0, 1 or all three
    adaptive: bool = False
    intra: bool = False
    inter: bool = False


VARIANTS = {
    "resnet18": _Variant(0),
    "roi": _Variant(1),
    "aroi": _Variant(1, adaptive=True),
    "maroi": _Variant(3, adaptive=True),
    "aroi-intra": _Variant(1, adaptive=True, intra=True),
    "maroi-intra": _Variant(3, adaptive=True, intra=True),
    "margl": _Variant(3, adaptive=True, intra=True, inter=True),
}


@dataclass(frozen=True)
class MARGLConfig:
    """What MARGL and its variants are built from.

    Args:
        variant: "margl" or a row of MARGL Table 1, see `VARIANTS`.
        aus: the action units, in the order of every output.
        image_size: side of the input, a multiple of 32.
        pixel_mean: of each colour in [0, 1], taken off by `to_input`; those of the ImageNet weights.
        pixel_std: what `to_input` divides by.
        backbone_width: channels of the backbone's first layer; ImageNet weights fit 64.
        roi_sizes: k of the initial k×k boxes, in pixels of layer2, layer3 and layer4.
        single_level: the level that one-level variants use.
        crop_size: side of the crops.
        squeeze: channels after each level's 1×1 convolution.
        crop_from: "squeezed" crops the map after that convolution, "backbone" the one before it.
        scale_weight_std: standard deviation of the initial weights of the layer that gives the scale factors.
        scale_bias: its initial bias; 1 starts from the initial boxes.
        regional_channels: width of the regional networks.
        regional_norm: batch normalisation after their convolutions.
        regional_activation: after that.
        graph_layers: GCN layers.
        graph_width: their width.
        graph_activation: σ of eq. (5).
        graph_normalization: "symmetric", `D^-1/2 A D^-1/2`, or "row", `D^-1 A`; D holds row sums.
        head: "per-au", an output for each AU from its own node, or "joint", from all nodes of the level.
    """

    variant: str = "margl"
    aus: tuple[int, ...] = AU_SETS["bp4d"]
    image_size: int = 192
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    backbone_width: int = 64
    roi_sizes: tuple[float, float, float] = (10, 5, 2)
    single_level: str = "layer3"
    crop_size: int = 6
    squeeze: int = 128
    crop_from: str = "squeezed"
    scale_weight_std: float = 0.0
    scale_bias: float = 1.0
    regional_channels: int = 128
    regional_norm: bool = True
    regional_activation: str = "relu"
    graph_layers: int = 1
    graph_width: int = 128
    graph_activation: str = "relu"
    graph_normalization: str = "symmetric"
    head: str = "per-au"

    def __post_init__(self) -> None:
        check = Checker(self)
        check.choice("variant", VARIANTS)
        check.aus()
        check.image_size(32)
        check.integers(
            "backbone_width", "crop_size", "squeeze", "regional_channels", "graph_layers", "graph_width"
        )
        check.number("scale_weight_std", least=0)
        check.number("scale_bias")
        check.flags("regional_norm")
        check.choice("single_level", LEVELS)
        check.choice("crop_from", ("squeezed", "backbone"))
        check.choice("regional_activation", ACTIVATIONS)
        check.choice("graph_activation", ACTIVATIONS)
        check.choice("graph_normalization", ("symmetric", "row"))
        check.choice("head", ("per-au", "joint"))
        check.triples("pixel_mean")
        check.triples("pixel_std", "roi_sizes", positive=True)


@exportable
class MARGLOutput(NamedTuple):
    """What MARGL returns for a batch of B images, L levels and m AUs."""

    probabilities: Tensor
    """(B, m): element-wise maximum of the global and the level probabilities."""
    levels: Tensor
    """(L, B, m) probabilities from each level's regions; L is 0 for "resnet18"."""
    global_: Tensor
    """(B, m) probabilities from the whole face."""
    rois: tuple[Tensor, ...]
    """L times (B, 2m, 4): boxes `(x1, y1, x2, y2)` in that level's pixels, the image-left half's m first."""
    level_logits: Tensor
    """(L, B, m)."""
    global_logits: Tensor
    """(B, m)."""


def relation_adjacency(
    labels: Tensor, mask: Tensor | None = None, *, aus: tuple[int, ...], threshold: float = 0.3
) -> Tensor:
    """The AU relation graph: `A0(i, j) = 1` where `p(y_i = 1 | y_j = 1) ≥ threshold`.

    The probability of a pair counts the frames in which both AUs are coded; a pair that never is has no edge.

    Args:
        labels: (n, m) training labels, 0 or 1 where coded.
        mask: (n, m) bool, True where coded; None means everywhere.
        aus: the m AU numbers.
        threshold: in [0, 1].

    Returns:
        (m, m) float32, not symmetric in general, with ones on the diagonal.

    Raises:
        TypeError: mask is not a bool tensor.
        ValueError: an AU never occurs (it is named), a coded label is not 0 or 1, or shapes disagree.

    Source: MARGL eq. (3).
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"relation_adjacency: labels must be a tensor (n, {len(aus)}), got {found}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"relation_adjacency: threshold must be in [0, 1], got {threshold}")
    occurs, coded = check_labels(labels, mask, (len(labels), len(aus)), aus)
    for au, count in zip(aus, occurs.sum(0).tolist(), strict=True):
        if count == 0:
            raise ValueError(f"relation_adjacency: AU {au} never occurs in labels")
    occurs, coded = occurs.double(), coded.double()
    together = occurs.T @ occurs  # (m, m): frames with y_i = 1 and y_j = 1
    given = coded.T @ occurs  # (m, m): frames with y_j = 1 in which i is coded
    # n_ij ≥ threshold·n_j, free of the rounding of a quotient that hits the threshold exactly.
    return ((together >= threshold * given - 1e-9) & (given > 0)).float()


class RegionalNetworks(Stacked):
    """An independent network for every ROI: two 3×3 convolutions and global average pooling.

    The R networks are R groups of one convolution: output channels `r·C … (r+1)·C - 1` are those of ROI r.

    Args:
        rois: R.
        in_channels: channels of a crop.
        channels: C.
        norm: batch normalisation after each convolution.
        activation: a name of `ACTIVATIONS`.
    """

    def __init__(
        self, rois: int, in_channels: int, channels: int, norm: bool, activation: str, factory: dict
    ):
        super().__init__()
        self.networks = rois
        options = {"groups": rois, "bias": not norm, **factory}
        self.conv1 = Conv3x3(rois * in_channels, rois * channels, **options)
        self.bn1 = nn.BatchNorm2d(rois * channels, **factory) if norm else nn.Identity()
        self.conv2 = Conv3x3(rois * channels, rois * channels, **options)
        self.bn2 = nn.BatchNorm2d(rois * channels, **factory) if norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (B, R, in_channels, h, w) to features (B, R, C)."""
        activation = overwriting(self.activation)
        x = activation(self.bn1(self.conv1(crops)))  # (B, R·C, h, w)
        x = activation(self.bn2(self.conv2(x)))
        return x.mean((2, 3)).unflatten(1, (self.networks, -1))  # (B, R, C)


class RelationGraph(nn.Module):
    """Graph convolution layers over the nodes of all levels, one set of weights for each half of the face.

    Args:
        layers: how many.
        in_features: width of the nodes' features.
        width: width after every layer.
        activation: a name of `ACTIVATIONS`.

    Source: MARGL eq. (5).
    """

    def __init__(self, layers: int, in_features: int, width: int, activation: str, factory: dict):
        super().__init__()
        widths = (in_features, *[width] * layers)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(2, before, after, **factory))
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.activation = ACTIVATIONS[activation]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every half's weights Xavier uniform."""
        for weight in self.weights:
            for half in weight:
                nn.init.xavier_uniform_(half)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Convolve node features (B, 2, n, in_features) on a normalised graph (n, n) to (B, 2, n, width)."""
        for weight in self.weights:
            x = self.activation(adjacency @ x @ weight)
        return x


class RoiLevel(nn.Module):
    """One level: boxes, crops, regional networks, and the head that reads its nodes."""

    def __init__(self, config: MARGLConfig, channels: int, node_width: int, factory: dict):
        super().__init__()
        m = len(config.aus)
        self.roi = AdaptiveRoi(
            channels,
            2 * m,
            config.squeeze,
            (config.crop_size, config.crop_size),
            adaptive=VARIANTS[config.variant].adaptive,
            crop_from=config.crop_from,
            scale_weight_std=config.scale_weight_std,
            scale_bias=config.scale_bias,
            **factory,
        )
        self.regional = RegionalNetworks(
            2 * m,
            self.roi.out_channels,
            config.regional_channels,
            config.regional_norm,
            config.regional_activation,
            factory,
        )
        self.head = (
            NodeLinear(m, node_width, **factory)
            if config.head == "per-au"
            else nn.Sequential(nn.Flatten(1), nn.Linear(m * node_width, m, **factory))
        )

    def forward(self, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """From a map (B, C, H, W) and boxes (B, 2m, 4) to node features (B, 2m, c) and the boxes used."""
        crops, boxes = self.roi(features, boxes)
        return self.regional(crops), boxes


class MARGL(Pretrained):
    """MARGL or one of its variants.

    Args:
        config: None means `MARGLConfig()`, the model of the paper for BP4D.

    Source: MARGL section 2.
    """

    config_class = MARGLConfig
    variants = tuple(VARIANTS)

    def __init__(
        self,
        config: MARGLConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config = MARGLConfig() if config is None else config
        variant = VARIANTS[config.variant]
        m = len(config.aus)
        names = {0: (), 1: (config.single_level,), 3: LEVELS}[variant.levels]
        self._levels = tuple(LEVELS.index(name) for name in names)
        node_width = config.graph_width if variant.intra else config.regional_channels
        # `backbone.fc` is the global head.
        self.backbone = ResNet18(m, config.backbone_width, **factory)
        # As the images are: a gradient then comes in its weight's own layout, which saves slow copies.
        self.backbone.to(memory_format=torch.channels_last)
        self.levels = nn.ModuleList(
            RoiLevel(config, config.backbone_width * WIDTHS[level + 1], node_width, factory)
            for level in self._levels
        )
        self.relations = None
        if variant.intra:
            self.relations = RelationGraph(
                config.graph_layers,
                config.regional_channels,
                config.graph_width,
                config.graph_activation,
                factory,
            )
            self.register_buffer("adjacency", torch.eye(m, **factory))
        self.register_buffer("normalized", None)  # Ã, where A0 does not change any more

    @property
    def graph(self) -> RelationGraph | None:
        """The relation graph; registered as `relations`, since an exported program calls itself `graph`."""
        return self.relations

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Side of each level's feature map, in the order of `levels` and `rois`."""
        return tuple(self.config.image_size // (8 << level) for level in self._levels)

    def set_adjacency(self, adjacency: Tensor) -> None:
        """Set the AU relation graph A0, which is the identity until then; it is saved with the weights.

        Args:
            adjacency: (m, m), not negative, from `relation_adjacency`.

        Raises:
            ValueError: the variant has no graph, or `adjacency` has a wrong shape, entry, or an empty row.
        """
        m = len(self.config.aus)
        if self.graph is None:
            raise ValueError(f"{self.name}: this variant has no relation graph to set")
        if adjacency.shape != (m, m):
            raise ValueError(f"{self.name}: adjacency must be ({m}, {m}), got {tuple(adjacency.shape)}")
        if not ((adjacency >= 0) & adjacency.isfinite()).all():
            raise ValueError(f"{self.name}: adjacency must hold finite numbers of at least 0")
        for au, total in zip(self.config.aus, adjacency.sum(1).tolist(), strict=True):
            if total == 0:
                raise ValueError(f"{self.name}: adjacency has an empty row for AU {au}")
        self.adjacency.copy_(adjacency)
        if self.normalized is not None:
            self.normalized.copy_(self._normalize())

    def normalized_adjacency(self) -> Tensor:
        """Ã (n, n) of the n = L·m nodes, those of the first level first: MARGL eq. (4), normalised."""
        return self._normalize() if self.normalized is None else self.normalized

    def _normalize(self) -> Tensor:
        levels, m = len(self.levels), len(self.config.aus)
        same_level = torch.eye(levels, dtype=self.adjacency.dtype, device=self.adjacency.device)
        same_au = torch.eye(m, dtype=self.adjacency.dtype, device=self.adjacency.device)
        A = torch.kron(same_level, self.adjacency)  # (n, n): A0 in the diagonal blocks
        if VARIANTS[self.name].inter:
            A = A + torch.kron(1 - same_level, same_au)  # I in all others
        degree = A.sum(1)  # (n,)
        if self.config.graph_normalization == "row":
            return A / degree[:, None]
        return A * degree.rsqrt() * degree.rsqrt()[:, None]

    def initial_rois(self, centers: Tensor) -> tuple[Tensor, ...]:
        """The k×k boxes around the AU centres, before they are adapted.

        Args:
            centers: (B, 2, m, 2), as in `forward`.

        Returns:
            For each level (B, 2m, 4): `(x1, y1, x2, y2)` in that level's pixels, image-left half first.
        """
        boxes = []
        for level, side in zip(self._levels, self.level_sizes, strict=True):
            # Boxes are continuous: the middle of pixel x lies at x + 1/2.
            points = (centers.flatten(1, 2) + 0.5) * (side / self.config.image_size)  # (B, 2m, 2)
            half = self.config.roi_sizes[level] / 2
            boxes.append(torch.cat([points - half, points + half], dim=-1))  # (B, 2m, 4)
        return tuple(boxes)

    def forward(self, images: Tensor, centers: Tensor | None = None) -> MARGLOutput:
        """Recognise action units.

        Args:
            images: (B, 3, S, S), S being `config.image_size`, in the model's dtype.
            centers: (B, 2, m, 2) AU centres (x, y) in input pixels, the middle of pixel x at x, float32 or
                float64, the image-left half first; "resnet18" needs none.

        Returns:
            Probabilities, boxes and logits.

        Raises:
            TypeError, ValueError: an argument of wrong rank, size, dtype or device.
        """
        check_pictures(self, "images", images, "B")
        # The backbone and the crops are fastest with the channels innermost.
        global_map = self.backbone(images.contiguous(memory_format=torch.channels_last))
        global_logits = full_precision(global_map.logits)  # (B, m)
        if self.levels:
            self._check_centers(images, centers)
            nodes, rois = self._regions(global_map.levels[1:], centers)  # (B, 2, L, m, c)
            level_logits = self._relate(nodes)  # (L, B, m)
        else:
            rois, level_logits = (), global_logits.new_zeros(0, *global_logits.shape)
        global_, levels = global_logits.sigmoid(), level_logits.sigmoid()
        probabilities = torch.cat([global_[None], levels]).amax(0)  # (B, m)
        return MARGLOutput(probabilities, levels, global_, rois, level_logits, global_logits)

    def _regions(self, maps: tuple[Tensor, ...], centers: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        features, rois = [], []
        for index, level, boxes in zip(self._levels, self.levels, self.initial_rois(centers), strict=True):
            found, boxes = level(maps[index], boxes)  # (B, 2m, c), (B, 2m, 4)
            features.append(found.unflatten(1, (2, -1)))  # (B, 2, m, c)
            rois.append(boxes)
        return torch.stack(features, dim=2), tuple(rois)

    def _relate(self, nodes: Tensor) -> Tensor:
        if self.graph is not None:
            related = self.graph(nodes.flatten(2, 3), self.normalized_adjacency())  # (B, 2, L·m, width)
            nodes = related.unflatten(2, (len(self.levels), -1))  # (B, 2, L, m, width)
        face = nodes.mean(1)  # (B, L, m, width): the average of both halves
        logits = [level.head(face[:, index]) for index, level in enumerate(self.levels)]
        return full_precision(torch.stack(logits))  # (L, B, m)

    def _check_centers(self, images: Tensor, centers: Tensor | None) -> None:
        wanted = f"a float32 or float64 tensor of shape ({len(images)}, 2, {len(self.config.aus)}, 2)"
        if not isinstance(centers, Tensor):
            raise TypeError(f"{self.name}: centers must be {wanted}, got {type(centers).__name__}")
        if centers.shape != (len(images), 2, len(self.config.aus), 2):
            raise ValueError(f"{self.name}: centers must be {wanted}, got shape {tuple(centers.shape)}")
        if centers.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{self.name}: centers must be {wanted}, got {centers.dtype}")
        if centers.device != images.device:
            raise ValueError(f"{self.name}: centers are on {centers.device}, but images on {images.device}")
