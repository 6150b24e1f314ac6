"""Layers with parameters around the operators; each stands alone in another project's model."""

from aufast.nn.adaptive import AdaptiveGraphGRU, agcrn_state_dict
from aufast.nn.graph import GraphConv, GraphGRU
from aufast.nn.region import PatchBatchNorm, RegionConv, RegionLayer
from aufast.nn.roi import AdaptiveRoi, RoiCrop

__all__ = [
    "AdaptiveGraphGRU",
    "AdaptiveRoi",
    "GraphConv",
    "GraphGRU",
    "PatchBatchNorm",
    "RegionConv",
    "RegionLayer",
    "RoiCrop",
    "agcrn_state_dict",
]
