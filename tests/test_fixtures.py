"""The shared fixtures do what they say."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_poisoned_memory_is_nan(poisoned_empty: None, dtype: torch.dtype) -> None:
    like = torch.ones(2, 3, dtype=dtype)
    for made in (
        torch.empty(4, dtype=dtype),
        torch.empty_like(like),
        like.new_empty(5),
        like.new_empty(2).resize_(7),
    ):
        assert made.isnan().all()


def test_poison_does_not_outlive_its_test() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
