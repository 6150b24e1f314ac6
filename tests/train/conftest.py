"""Data that every run of these tests trains on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aufast.data import Recipe, prepare_dataset, synthesize


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six synthetic subjects with a video of 24 frames each, two subjects in each part of BP4D's folds."""
    folder = tmp_path_factory.mktemp("train")
    synthesize(folder / "synthetic", Recipe(subjects=6, videos=1, frames=24, size=64, seed=3))
    prepare_dataset(folder / "synthetic", folder / "packed", size=40)
    return folder / "packed"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are faster on one thread, and their numbers the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
