"""Packed faces as torch datasets: single frames, and clips of consecutive ones.

An item is a dict of tensors that the default collate stacks. Pixels stay uint8, channels last: normalising
them (`aufast.models.to_input`) is cheaper on whole batches, on the device. What is random depends on (seed,
epoch, index) alone, so any number of workers, and a run that was resumed, see the same items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aufast.data.clips import Cropping, runs, training_start, training_windows
from aufast.data.packed import PackedVideo

CLIP = 48
MAX_GAP = 10  # frames that may be missing within a clip; the papers do not say


class _Packed(Dataset):
    """What frames and clips share: the videos, the crop, and an epoch that workers see change."""

    def __init__(self, videos: Sequence[PackedVideo], cropping: Cropping, train: bool, seed: int):
        if not videos:
            raise ValueError("there is no video to take frames from")
        self.videos, self.cropping, self.train, self.seed = list(videos), cropping, train, seed
        # Shared memory: workers that live through the epochs hold a copy of this object, not of this number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops; call it before each epoch."""
        self._epoch.fill_(epoch)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(self._epoch), *key])

    def _rows(self, video: int, rows: slice, index: int) -> dict[str, Tensor]:
        """Frames of a video, cut alike, with their labels."""
        packed = self.videos[video]
        generator = self._generator(0, index) if self.train else None
        images, landmarks = self.cropping(packed.frames[rows], packed.landmarks[rows], generator)
        return {
            "images": images,  # (t, size, size, 3)
            "landmarks": landmarks,  # (t, 49, 2)
            "labels": torch.from_numpy(packed.labels[rows].copy()),  # (t, m)
            "mask": torch.from_numpy(packed.mask[rows].copy()),  # (t, m)
        }


class FrameDataset(_Packed):
    """Single frames.

    An item holds `image` uint8 (size, size, 3), `landmarks` float32 (49, 2) in its pixels, `labels` int8
    (m,), `mask` bool (m,), and `video` and `frame`, where it comes from.

    Args:
        videos: of a `PackedDataset`.
        cropping: `MARGL_CROPPING`, `AAR_CROPPING` or another.
        train: random crops and mirrors; otherwise the centre.
        seed: of what is random.

    Raises:
        ValueError: there is no video.
    """

    def __init__(self, videos: Sequence[PackedVideo], cropping: Cropping, train: bool, seed: int = 0):
        super().__init__(videos, cropping, train, seed)
        self._ends = np.cumsum([len(video) for video in self.videos])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        video = int(np.searchsorted(self._ends, index, side="right"))
        frame = index - int(self._ends[video] - len(self.videos[video]))
        item = {name: value[0] for name, value in self._rows(video, slice(frame, frame + 1), index).items()}
        item["image"] = item.pop("images")
        return {**item, "video": torch.tensor(video), "frame": torch.tensor(frame)}


class ClipDataset(_Packed):
    """Clips of consecutive frames.

    In training, each stretch of frames gives as many whole clips as fit into it, at a new offset each epoch.
    In test, its clips follow one another and hold every frame exactly once, so a model may carry its state
    from clip to clip (`first` is True where it must start anew). A clip that is short is filled up with its
    last frame, which `valid` and `mask` leave out.

    An item holds `images` uint8 (t, size, size, 3), `landmarks` float32 (t, 49, 2), `labels` int8 (t, m),
    `mask` bool (t, m), `valid` bool (t,), `first` bool, and `video` and `frame`, where it starts.

    Args:
        videos: of a `PackedDataset`.
        cropping: one crop and one mirror for a whole clip.
        train: random crops and mirrors; otherwise the centre.
        length: t, in frames.
        max_gap: frames that may be missing between two of a clip; a longer gap starts another stretch.
        seed: of what is random.

    Raises:
        ValueError: there is no video, or a length below 1.
    """

    def __init__(
        self,
        videos: Sequence[PackedVideo],
        cropping: Cropping,
        train: bool,
        length: int = CLIP,
        max_gap: int = MAX_GAP,
        seed: int = 0,
    ):
        super().__init__(videos, cropping, train, seed)
        if length < 1:
            raise ValueError(f"length must be at least 1 frame, got {length}")
        self.length = length
        # (video, start of the stretch, its end, which of its clips) of every item.
        self._clips = [
            (number, start, stop, k)
            for number, video in enumerate(self.videos)
            for start, stop in runs(video.numbers, max_gap)
            for k in range(self._count(stop - start))
        ]

    def _count(self, stretch: int) -> int:
        return training_windows(stretch, self.length) if self.train else -(-stretch // self.length)

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        video, start, stop, k = self._clips[index]
        if self.train:
            offset = self._generator(1, index - k).random()  # one offset for all clips of a stretch
            first = start + training_start(stop - start, self.length, k, offset)
        else:
            first = start + k * self.length
        last = min(first + self.length, stop)
        item = self._rows(video, slice(first, last), index)
        missing = self.length - (last - first)
        if missing:
            item = {
                name: torch.cat([value, value[-1:].expand(missing, *value.shape[1:])])
                for name, value in item.items()
            }
            item["mask"][-missing:] = False
        return {
            **item,
            "valid": torch.arange(self.length) < last - first,
            "first": torch.tensor(k == 0),
            "video": torch.tensor(video),
            "frame": torch.tensor(first),
        }
