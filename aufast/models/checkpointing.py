"""Gradient checkpointing that leaves the running statistics of batch normalisation alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


@contextmanager
def _spare_statistics(module: nn.Module) -> Iterator[None]:
    """Let updates of running statistics go to copies: the second run of a forward pass must not count."""
    own = [(part, dict(part._buffers)) for part in module.modules() if part._buffers]
    for part, buffers in own:
        part._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for part, buffers in own:
            part._buffers.update(buffers)


def recomputed(module: nn.Module, function: Callable[..., Result], *inputs: Tensor) -> Result:
    """Run a part of a module whose activations are computed again in the backward pass and not kept.

    Under `torch.compile` the part runs as it is: the compiler decides there what to keep.

    Args:
        module: whose batch normalisations `function` may update.
        function: a part of its forward pass.
        inputs: of `function`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _spare_statistics(module)),
    )
