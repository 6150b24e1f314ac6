"""What a model is shown of aligned faces: one crop and one mirror, of a frame or of a whole clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aufast.faces import mirror_landmarks


@dataclass(frozen=True)
class Cropping:
    """How aligned faces are cut, mirrored and resized.

    In training, a square of a side from `smallest` to `largest`, anywhere in the face, mirrored every other
    time, and resized to `size`. In test, the centre square of side `size`, as it is.

    Args:
        size: side of the model's input in pixels.
        smallest: least side of a training crop.
        largest: greatest side of a training crop.
        mirror: whether training mirrors.

    Raises:
        ValueError: the sides are not in order.
    """

    size: int
    smallest: int
    largest: int
    mirror: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.largest or self.size < 1:
            raise ValueError(
                f"sides must be positive and smallest <= largest, got size {self.size}, smallest "
                f"{self.smallest}, largest {self.largest}"
            )

    def __call__(
        self, images: np.ndarray, landmarks: np.ndarray, generator: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cut frames, all of them alike.

        Args:
            images: uint8 (..., S, S, 3), a face or a clip of one face.
            landmarks: floating (..., 49, 2), (x, y) in its pixels.
            generator: draws the training crop; None cuts the test crop.

        Returns:
            images uint8 (..., size, size, 3) and landmarks float32 (..., 49, 2) in their pixels. Some may
            lie outside after the crop.

        Raises:
            ValueError: a crop is larger than the face.
        """
        face = images.shape[-2]
        widest = self.size if generator is None else self.largest
        if widest > face:
            raise ValueError(f"a crop of {widest} pixels does not fit a face of {face}")
        if generator is None:
            side, mirrored = self.size, False
            left = top = (face - side) // 2
        else:
            side = int(generator.integers(self.smallest, self.largest + 1))
            left, top = generator.integers(0, face - side + 1, 2).tolist()
            mirrored = self.mirror and bool(generator.integers(2))
        # In NumPy: torch would start its threads for each of these small copies.
        cut = images[..., top : top + side, left : left + side, :]
        points = np.asarray(landmarks, np.float32) - np.array([left, top], np.float32)
        if mirrored:
            cut, points = cut[..., ::-1, :], mirror_landmarks(points, side)
        # Copied, because the pixels are mapped from disk and not to be written to.
        pixels = torch.from_numpy(np.array(cut, order="C"))
        if side != self.size:
            pixels = _resize(pixels, self.size)
            points = (points + 0.5) * (self.size / side) - 0.5  # pixel edges stay edges, not centres
        return pixels, torch.from_numpy(points)


# MARGL trains on 192 of 200 "with common augmentation"; how much the crops may vary in size is not said.
MARGL_CROPPING = Cropping(size=192, smallest=184, largest=200)
AAR_CROPPING = Cropping(size=176, smallest=176, largest=176)


def _resize(images: Tensor, size: int) -> Tensor:
    """Bilinear, uint8 (..., S, S, 3) to (..., size, size, 3)."""
    stacked = images.reshape(-1, *images.shape[-3:]).movedim(-1, 1)  # (n, 3, S, S), channels last in memory
    resized = F.interpolate(stacked, (size, size), mode="bilinear", align_corners=False)
    return resized.movedim(1, -1).reshape(*images.shape[:-3], size, size, 3).contiguous()


def runs(numbers: np.ndarray, max_gap: int) -> list[tuple[int, int]]:
    """Stretches of frames that follow one another.

    Args:
        numbers: (n,) increasing frame numbers.
        max_gap: frames that may be missing inside a stretch.

    Returns:
        (start, stop) of each, indices into `numbers`, together all of 0 to n.

    Raises:
        ValueError: max_gap is negative.
    """
    if max_gap < 0:
        raise ValueError(f"max_gap must be at least 0, got {max_gap}")
    if not len(numbers):
        return []
    cuts = np.flatnonzero(np.diff(numbers) > max_gap + 1) + 1
    edges = [0, *cuts.tolist(), len(numbers)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def training_windows(length: int, clip: int) -> int:
    """How many clips an epoch takes from a stretch: the whole ones that fit, at least one."""
    return max(1, length // clip)


def training_start(length: int, clip: int, k: int, offset: float) -> int:
    """Where clip k of a stretch starts; `offset` in [0, 1) moves all of them through the frames left over."""
    spare = max(0, length - clip * training_windows(length, clip))
    return int(offset * (spare + 1)) + k * clip
