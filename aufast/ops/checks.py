"""Argument checks: one sentence that names the operator, the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, regions and states for arguments of `dtype`: never below float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Shapes:
    """Binds the letters of one call's shapes to sizes and says clearly where two arguments disagree."""

    def __init__(self, operator: str):
        self.operator = operator
        self.sizes: dict[str, int] = {}

    def bind(self, name: str, tensor: Tensor, *axes: str | int, like: Tensor | None = None) -> None:
        """Check that `tensor` has these axes, floating numbers, and the dtype and device of `like`.

        Args:
            name: of the argument.
            tensor: its value.
            axes: a letter binds or must equal an earlier size; an integer is that size; "..." takes any axes.
            like: another argument, whose dtype and device must be equal.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{self.operator}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            wanted = "float16, bfloat16, float32 or float64"
            raise TypeError(f"{self.operator}: {name} must be {wanted}, got {tensor.dtype}")
        shape, leading = tensor.shape, axes[0] == "..."
        if leading:
            axes = axes[1:]
            shape = shape[max(tensor.dim() - len(axes), 0) :]
        fits = len(shape) == len(axes)
        if fits:
            for axis, size in zip(axes, shape, strict=True):
                expected = axis if isinstance(axis, int) else self.sizes.setdefault(axis, size)
                fits = fits and expected == size
        if not fits:
            wanted = ", ".join([*["..."] * leading, *map(self._describe, axes)])
            raise ValueError(f"{self.operator}: {name} must have shape ({wanted}), got {tuple(tensor.shape)}")
        if like is not None:
            self.same(name, tensor, like)

    def same(self, name: str, tensor: Tensor, like: Tensor, dtype: bool = True) -> None:
        """Check that `tensor` lives with `like`, the operator's first argument, in the same dtype."""
        if tensor.device != like.device:
            raise ValueError(
                f"{self.operator}: {name} is on {tensor.device}, but the input is on {like.device}"
            )
        if dtype and tensor.dtype != like.dtype:
            raise TypeError(f"{self.operator}: {name} is {tensor.dtype}, but the input is {like.dtype}")

    def _describe(self, axis: str | int) -> str:
        return f"{axis}={self.sizes[axis]}" if axis in self.sizes else str(axis)


def output_size(operator: str, name: str, value: object) -> tuple[int, int]:
    """Check an output size `(h, w)` of non-negative integers."""
    try:
        height, width = value
        # A size may be symbolic while PyTorch traces; `int` would freeze it.
        fits = all(isinstance(n, (int, torch.SymInt)) and n >= 0 for n in (height, width))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{operator}: {name} must be two non-negative integers (h, w), got {value!r}")
    return height, width


NORMALIZATIONS = {"global": 0, "softmax": 1}
NORMALIZATION_NAMES = {code: name for name, code in NORMALIZATIONS.items()}


def normalization_code(operator: str, normalization: str) -> int:
    """The integer by which the raw operators know a normalisation."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"{operator}: normalization must be 'global' or 'softmax', got {normalization!r}")
    return NORMALIZATIONS[normalization]
