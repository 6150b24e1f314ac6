"""The definitions compute in the dtypes of their arguments, also inside an autocast region."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(definition: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside `definition`: it would round the coordinates of regions to low precision."""

    @wraps(definition)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        values = (*args, *kwargs.values())
        device = next(value.device.type for value in values if isinstance(value, torch.Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return definition(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return definition(*args, **kwargs)

    return outside
