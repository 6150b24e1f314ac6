"""How the products of the kernels multiply float32."""

from __future__ import annotations

import torch


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot`: "tf32" where PyTorch may use it for float32, else "ieee".

    Low precision is not rounded by "tf32": it has as many mantissa bits as float16 and more than bfloat16.
    """
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
