"""From pixels to what a model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    from aufast.models.aar import AARConfig
    from aufast.models.margl import MARGLConfig


def to_input(pixels: np.ndarray | Tensor, config: MARGLConfig | AARConfig) -> Tensor:
    """Scale RGB pixels to [0, 1] and normalise them as a model expects.

    Args:
        pixels: (..., S, S, 3) uint8, S being `config.image_size`: an image, a batch or a clip.
        config: of the model; `pixel_mean` and `pixel_std` are used.

    Returns:
        (..., 3, S, S) float32, `(pixels / 255 - mean) / std`, on the device of `pixels`.

    Raises:
        TypeError: `pixels` are not uint8.
        ValueError: they have another shape.
    """
    if not isinstance(pixels, Tensor):
        import numpy as np

        pixels = torch.from_numpy(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8:
        kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(f"to_input: pixels must be an uint8 array or tensor, got {kind}")
    side = config.image_size
    if pixels.shape[-3:] != (side, side, 3):
        raise ValueError(
            f"to_input: pixels must have shape (..., {side}, {side}, 3), got {tuple(pixels.shape)}"
        )
    mean, std = (torch.tensor(v, device=pixels.device) for v in (config.pixel_mean, config.pixel_std))
    return ((pixels.float() / 255 - mean) / std).movedim(-1, -3).contiguous()  # (..., 3, S, S)
