"""What autocast means for the operators: products in low precision, regions and states in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from aufast.ops.checks import accumulation_dtype


def cast_products(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, cast float32 and lower to autocast's dtype, as `torch.matmul` does; else nothing."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def keep_float(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """Take coordinates or a state in the accumulation dtype of `like`: float32 for low precision."""
    if not isinstance(tensor, Tensor) or not isinstance(like, Tensor) or not tensor.is_floating_point():
        return tensor
    if tensor.dtype in (torch.float16, torch.bfloat16) or like.dtype == torch.float64:
        return tensor.to(accumulation_dtype(like.dtype))
    return tensor
