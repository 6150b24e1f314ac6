"""The definition of every operator in plain PyTorch: what the fused kernels must equal."""

from aufast.reference.graph_conv import graph_conv
from aufast.reference.graph_gru import graph_gru
from aufast.reference.region_conv import region_conv
from aufast.reference.roi_crop import roi_crop

__all__ = ["graph_conv", "graph_gru", "region_conv", "roi_crop"]
