"""The short way of a call that was checked before and asks for no gradient.

Checking a call and going through autograd take longer than a small kernel does. A call whose tensors have the
shapes, dtypes and devices of one that passed, in eager mode and with nothing to differentiate, needs neither:

    call = signature(name, options, *tensors)
    if call is not None and call in passed:
        return operator.redispatch(KERNEL, *arguments)
    ...  # checks, the choice of a backend
    remember(call, chosen)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from aufast.ops import backends

_MOST = 4096  # signatures kept; a program with more varied shapes starts anew
passed: set[tuple[Any, ...]] = set()
_PLAIN = (Tensor, torch.nn.Parameter)
KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def signature(name: str, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Any, ...] | None:
    """What decides whether a call passes and who computes it; None where only the long way is right.

    Args:
        name: of the operator.
        options: the other arguments, hashable.
        tensors: None for one that is left out.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or backends._explaining
    ):
        return None
    recording = torch.is_grad_enabled()
    parts: list[Any] = [name, options, backends._selected]
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        elif type(tensor) not in _PLAIN or (recording and tensor.requires_grad):
            return None
        else:
            parts += (tensor.shape, tensor.dtype, tensor.device)
    return tuple(parts)


def remember(signature: tuple[Any, ...] | None, chosen: str) -> None:
    """Note that a call with this signature passed, if its kernel is the compiled one for the CPU."""
    if signature is None or chosen != "cpu":
        return
    if len(passed) >= _MOST:
        passed.clear()
    passed.add(signature)
