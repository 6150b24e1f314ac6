"""The operators: one public function each, in front of the reference, C++, CUDA and Triton."""

from aufast.ops import backends as _backends
from aufast.ops.graph_conv import graph_conv
from aufast.ops.graph_gru import graph_gru
from aufast.ops.region_conv import region_conv
from aufast.ops.roi_align import roi_align_crop
from aufast.ops.roi_crop import roi_crop

_backends.load()

__all__ = ["graph_conv", "graph_gru", "region_conv", "roi_align_crop", "roi_crop"]
