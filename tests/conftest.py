"""Fixtures and rules that every test shares."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Read once, at the first call: a workspace kept between calls would hide what `poisoned_empty` shows.
os.environ["AUFAST_FRESH_WORKSPACE"] = "1"

# The same examples on every run: a failure in a change is that change's.
settings.register_profile("aufast", deadline=None, derandomize=True)
settings.load_profile("aufast")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, PyTorch sees none here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill uninitialised memory with NaN (integers: their maximum): an element left unwritten is seen.

    Holds for every allocation that PyTorch makes, those of compiled kernels too. A file uses it for all its
    tests with `pytestmark = pytest.mark.usefixtures("poisoned_empty")`.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
