"""Which frames a run sees, in which order, and on which process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aufast.data import (
    FOLDS,
    PackedDataset,
    PackedVideo,
    check_disjoint,
    fold,
    official_split,
    subject_parts,
)
from aufast.train.config import DataConfig


@dataclass(frozen=True)
class Split:
    """The videos of a run.

    Attributes:
        packed: the data they are from.
        columns: of its labels, those of the model's AUs in the model's order.
        train: trained on.
        validation: choose the best checkpoint; empty where nothing does.
        test: held out.
    """

    packed: PackedDataset
    columns: Tensor
    train: list[PackedVideo]
    validation: list[PackedVideo]
    test: list[PackedVideo]

    def subjects(self) -> dict[str, list[str]]:
        """Who is in which part."""
        names = ("train", "validation", "test")
        return {name: sorted({video.subject for video in getattr(self, name)}) for name in names}


def make_split(config: DataConfig, aus: tuple[int, ...]) -> Split:
    """Open the data and divide its videos.

    Args:
        config: which data, and which part is tested.
        aus: of the model.

    Raises:
        ValueError: the data are not there, lack an AU of the model, or cannot be divided so.
    """
    packed = PackedDataset(config.root)
    columns = au_columns(packed, aus)
    if config.split == "groups":
        train, test = official_split(packed.videos, config.train_group, config.test_group)
    elif config.split == "subjects":
        train, test = fold(packed.videos, config.part, subject_parts(packed.videos))
    elif packed.dataset in FOLDS:
        train, test = fold(packed.videos, config.part, FOLDS[packed.dataset])
    else:
        raise ValueError(
            f'{packed.root}: {packed.dataset} has no published parts; data.split must be "groups" '
            'or "subjects"'
        )
    validation = list(test) if config.validation == "test" else []
    if config.validation == "subjects":
        train, validation = _hold_out(train, config.validation_subjects)
    check_disjoint(train, test)
    return Split(packed, columns, train, validation, test)


def au_columns(packed: PackedDataset, aus: tuple[int, ...]) -> Tensor:
    """Where a model's AUs lie in the labels of packed data."""
    if missing := [au for au in aus if au not in packed.aus]:
        raise ValueError(
            f"{packed.root}: labels AUs {packed.aus}, but the model is for {aus}: AU {missing[0]} is missing"
        )
    return torch.tensor([packed.aus.index(au) for au in aus])


def _hold_out(videos: list[PackedVideo], count: int) -> tuple[list[PackedVideo], list[PackedVideo]]:
    """Every k-th subject in order of name, so that women and men, early and late ones are among them."""
    subjects = sorted({video.subject for video in videos})
    if count >= len(subjects):
        raise ValueError(
            f"data.validation_subjects is {count}, but there are {len(subjects)} training subjects"
        )
    held = {subjects[(2 * k + 1) * len(subjects) // (2 * count)] for k in range(count)}
    inside = [video for video in videos if video.subject in held]
    return [video for video in videos if video.subject not in held], inside


class Batches(Sampler[list[int]]):
    """The indices of each batch of one process.

    A step takes the next `world · accumulate · batch` items of a permutation that depends on the seed and the
    epoch alone, and deals them out: batch k of a step is that of process k % world. So two processes see what
    one sees that accumulates two batches, and a run that is resumed goes on where it was. What is left at the
    end of an epoch is too little for a step and waits for another epoch's order.

    Args:
        items: of the dataset.
        batch, accumulate: of the stage.
        rank, world: of the process.
        seed: of the run.

    Raises:
        ValueError: there are fewer items than one step takes.
    """

    def __init__(self, items: int, batch: int, accumulate: int, rank: int, world: int, seed: int):
        self.items, self.batch, self.accumulate = items, batch, accumulate
        self.rank, self.world, self.seed = rank, world, seed
        self.steps = items // (batch * accumulate * world)
        if self.steps == 0:
            raise ValueError(
                f"a step takes {batch} × {accumulate} × {world} (batch, accumulate, processes) frames or "
                f"clips, but there are {items} to train on"
            )
        self.epoch, self.skip = 0, 0

    def set_epoch(self, epoch: int, skip: int) -> None:
        """Choose an epoch, and the steps of it that are already done."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return (self.steps - self.skip) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.items)
        parts = self.accumulate * self.world
        for step in range(self.skip, self.steps):
            step_items = order[step * parts * self.batch :][: parts * self.batch].reshape(parts, self.batch)
            yield from step_items[self.rank :: self.world].tolist()


def make_loader(
    dataset: Dataset, batches: Sampler[list[int]], loaders: int, device: torch.device
) -> DataLoader:
    """A loader of these batches; pinned memory where a GPU waits for them."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loaders,
        pin_memory=device.type == "cuda",
        persistent_workers=loaders > 0,
    )


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
