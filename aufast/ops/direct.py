"""The short way of a call that was checked before.

Checking a call and going through the dispatcher's autograd take longer than a small kernel does. A call in
eager mode whose tensors have the shapes, dtypes and devices of one that passed needs neither:

    call = signature(name, options, *tensors)
    if (run := passed.get(call)) is not None:
        return run(*arguments)
    ...  # checks, the choice of a backend
    remember(call, chosen)

Where gradients are wanted the short way records them itself, by the formula that the dispatcher would use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from aufast.ops import backends

_MOST = 4096  # signatures kept; a program with more varied shapes starts anew
passed: dict[tuple[Any, ...] | None, Callable[..., Any]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)
KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Found once: each look-up less is a hundredth of a small call.
_compiling = torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state
_transforming = torch._C._are_functorch_transforms_active
_autocasting = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_grad_enabled = torch.is_grad_enabled
_kernels: dict[str, Callable[..., Any]] = {}
_recording: dict[str, Callable[..., Any]] = {}


def usual() -> bool:
    """Whether nothing stands between a call and its kernel: no tracing, transform, autocast or mode."""
    return not (
        _compiling()
        or _tracing()
        or _transforming()
        or forward_ad._current_level >= 0
        or _autocasting()
        or _dispatch_modes()
        or _function_modes()
        or backends._explaining
    )


def signature(name: str, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Any, ...] | None:
    """What decides whether a call passes and who computes it; None where only the long way is right.

    Args:
        name: of the operator.
        options: the other arguments, hashable.
        tensors: None for one that is left out.
    """
    if not usual():
        return None
    recording = _grad_enabled()
    wanted = False
    parts: list[Any] = [name, options, backends._selected]
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
        elif type(tensor) not in _PLAIN:
            return None
        else:
            parts += (tensor.shape, tensor.dtype, tensor.device)
            wanted = wanted or (recording and tensor.requires_grad)
    parts.append(wanted)  # last: `remember` reads it
    return tuple(parts)


def _plain(gradient: Tensor | None) -> bool:
    """Whether a gradient is one tensor and not a batch of them, as `is_grads_batched` makes."""
    if gradient is None:
        return True
    return type(gradient) is Tensor and torch._C._dispatch_keys(gradient).has(torch._C.DispatchKey.CPU)


def define(
    name: str,
    forward: OpOverload,
    derivative: OpOverload,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Make the short way of an operator known; the last three are what `registration.register` takes."""
    kernel, derivative_kernel = forward.redispatch, derivative.redispatch  # found once

    def differentiate(*arguments: Any) -> Any:
        return derivative_kernel(KERNEL, *arguments)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = kernel(KERNEL, *arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            short = usual() and all(map(_plain, grads))
            return backward(differentiate if short else derivative, ctx, *grads)

    _kernels[name] = partial(kernel, KERNEL)
    _recording[name] = Recorded.apply


def remember(signature: tuple[Any, ...] | None, chosen: str) -> None:
    """Note that a call with this signature passed, if its kernel is the compiled one for the CPU."""
    if signature is None or chosen != "cpu":
        return
    if len(passed) >= _MOST:
        passed.clear()
    passed[signature] = (_recording if signature[-1] else _kernels)[signature[0]]
