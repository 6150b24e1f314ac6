"""State dicts in two layouts: networks of one kind stacked in one tensor, or each under a key of its own.

The models hold their AU branches, patches, regional networks and per-AU outputs stacked. Written down the
plain way, as `Pretrained.reference` does, each is a module of a list: `branches.conv2.weight` becomes
`branches.0.conv2.weight`, `branches.1.conv2.weight` and so on, the same numbers cut along the first axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
from torch import Tensor, nn

from aufast.models.layers import Stacked
from aufast.nn import RegionConv


def _stacks(model: nn.Module) -> Iterator[tuple[str, Stacked | RegionConv, str]]:
    """The stacked modules of a model: name, module, and the name of each of its tensors."""
    for name, module in model.named_modules():
        if isinstance(module, (Stacked, RegionConv)):
            for key in module.state_dict():
                yield name, module, key


def _count(module: Stacked | RegionConv) -> int:
    return module.grid**2 if isinstance(module, RegionConv) else module.networks


def separate(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every network its own keys.

    Args:
        model: whose layout `state` has.
        state: its state dict.

    Returns:
        The state dict of `model.reference()`; the tensors are views.
    """
    state = dict(state)
    for name, module, key in _stacks(model):
        count = _count(module)
        stacked = state.pop(f"{name}.{key}")
        if stacked.dim() == 0:  # the counter of batches
            parts = [stacked.clone() for _ in range(count)]
        elif isinstance(module, RegionConv):
            parts = stacked.flatten(0, 1).unbind()
        else:
            parts = stacked.chunk(count)
        state |= {f"{name}.{index}.{key}": part for index, part in enumerate(parts)}
    return state


def stack_(model: nn.Module, state: MutableMapping[str, Tensor], prefix: str = "") -> None:
    """Turn keys of separate networks into the model's own, in place; what is in its own layout stays.

    A network of which a part is missing is left as it is, for the check of keys to name it.

    Args:
        model: whose layout is wanted.
        state: a state dict in either layout.
        prefix: of the model's keys in it.
    """
    for name, module, key in _stacks(model):
        keys = [f"{prefix}{name}.{index}.{key}" for index in range(_count(module))]
        if not all(part in state for part in keys):
            continue
        parts = [state.pop(part) for part in keys]
        if parts[0].dim() == 0:
            whole = parts[0]
        elif isinstance(module, RegionConv):
            whole = torch.stack(parts).unflatten(0, (module.grid, module.grid))
        else:
            whole = torch.cat(parts)
        state[f"{prefix}{name}.{key}"] = whole
