"""Occurrence labels: 0 or 1 where a coder decided, and a mask where nobody did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_labels(
    labels: Tensor, mask: Tensor | None, shape: Sequence[int], aus: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Check occurrence labels and their mask, and return both as bool.

    A missing label has no value of its own here: data sets mark it 9 or -1, and such a code taken for a label
    gives a plausible wrong number. So it must be masked, and every unmasked label must be 0 or 1.

    Args:
        labels: (..., m), any real dtype, 0 or 1 where ``mask`` is True, anything (NaN too) where it is False.
        mask: (..., m) bool, True where the AU is coded, or None when every label is.
        shape: the shape that labels must have.
        aus: the m AU numbers, to name the culprit; without them its column is named.

    Returns:
        (occurs, coded), both (..., m) bool; occurs is False where a label is missing.

    Raises:
        TypeError: labels is not a tensor, or mask is not a bool tensor.
        ValueError: a shape is wrong, mask lives on another device, or an unmasked label is neither 0 nor 1.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.shape != torch.Size(shape):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {tuple(shape)}")
    if mask is None:
        coded = torch.ones_like(labels, dtype=torch.bool)
    else:
        coded = check_mask(mask, shape, labels.device)
    occurs = coded & (labels == 1)
    wrong = coded & ~occurs & (labels != 0)
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        name = f"column {position[-1]}" if aus is None else f"AU {aus[position[-1]]}"
        raise ValueError(
            f"labels has the value {labels[position].item()} for {name}, expected 0 or 1; "
            "a missing label must be False in mask"
        )
    return occurs, coded


def check_mask(mask: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return ``mask`` when it is a bool tensor of this shape on this device.

    Args:
        mask: (...) bool, True where there is something to count.
        shape: the shape it must have.
        device: the device it must be on.

    Returns:
        ``mask`` itself.

    Raises:
        TypeError: it is not a bool tensor.
        ValueError: its shape or device differs.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where there is a label, got {kind}")
    if mask.shape != torch.Size(shape):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(shape)}")
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}, expected {device}")
    return mask
