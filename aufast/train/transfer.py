"""Weights of one AU set for a model of another: DISFA's AAR starts from BP4D's (AAR section IV-A)."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from aufast.models import AAR, MARGL

# Where a tensor holds a part for every AU along its first axis: all AUs in order, once, or once for each half
# of the face. What no pattern names belongs to no AU.
_ONCE = re.compile(
    r"frame\.(branches|head)\.|head\.(weight|bias)$|relations\.\d+\.[UQ]$"
    r"|backbone\.fc\.|levels\.\d+\.head\.(weight|bias)$"
)
_HALVES = re.compile(r"levels\.\d+\.(roi\.scale|regional)\.")
# MARGL's graph comes from the labels; a joint head reads all AUs at once, so that none of it can be shared.
_OWN = re.compile(r"adjacency$|levels\.\d+\.head\.1\.")


def start_from(model: MARGL | AAR, source: MARGL | AAR, shared: bool) -> list[str]:
    """Copy a trained model's weights into a fresh one.

    Args:
        model: the fresh one; keeps its own where the source has none.
        source: the trained one, of the same system and sizes.
        shared: whether the AU sets may differ. AUs of both keep their weights, whatever their order.

    Returns:
        Lines that say what came from where.

    Raises:
        ValueError: another system or other sizes, other AUs although `shared` is False, or none in common.
    """
    if type(model) is not type(source):
        raise ValueError(f"initial weights are of {source.name}, which is no {type(model).__name__}")
    new, old = model.config.aus, source.config.aus
    if new != old and not shared:
        raise ValueError(
            f"initial weights are for AUs {old}, the model is for {new}; "
            "initial_aus=shared takes what both have"
        )
    common = [au for au in new if au in old]
    if not common:
        raise ValueError(f"initial weights are for AUs {old}, of which the model has none: {new}")
    places = torch.tensor([new.index(au) for au in common]), torch.tensor([old.index(au) for au in common])
    theirs, kept = source.state_dict(), []
    with torch.no_grad():
        for key, own in model.state_dict().items():
            value = theirs.get(key)
            if value is None or (_OWN.search(key) and new != old):
                kept.append(key)
            elif not _copy(own, value, key, places, len(new), len(old)):
                raise ValueError(
                    f"initial weights: {key} has shape {tuple(value.shape)}, the model's {tuple(own.shape)}"
                )
    fresh = [au for au in new if au not in old]
    lines = [f"from the initial weights: all that belongs to no AU, and AU {_list(common)}"]
    if fresh:
        lines.append(f"fresh: AU {_list(fresh)}")
    if kept:
        lines.append(f"fresh, because the initial weights have none: {len(kept)} tensors, such as {kept[0]}")
    return lines


def _copy(own: Tensor, value: Tensor, key: str, places: tuple[Tensor, Tensor], new: int, old: int) -> bool:
    """Copy a tensor, or the parts of it that belong to common AUs; False where the sizes do not fit."""
    halves = 2 if _HALVES.match(key) else 1
    if own.dim() == 0 or not (_ONCE.match(key) or halves == 2):
        if own.shape != value.shape:
            return False
        own.copy_(value)
        return True
    if len(own) % (halves * new) or len(value) % (halves * old):
        return False
    own, value = own.view(halves, new, -1, *own.shape[1:]), value.view(halves, old, -1, *value.shape[1:])
    if own.shape[2:] != value.shape[2:]:
        return False
    own[:, places[0]] = value[:, places[1]].to(own.dtype)
    return True


def _list(aus: list[int]) -> str:
    return ", ".join(map(str, aus))
