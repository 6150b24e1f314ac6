"""Work over processes: results, errors, a worker that is lost, and one line of progress."""

from __future__ import annotations

import math
import os

import pytest

from aufast.data.parallel import run_all


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_progress(workers: int, capfd: pytest.CaptureFixture) -> None:
    assert sorted(run_all(math.sqrt, [1, 4, 9, 16], workers, "roots")) == [1, 2, 3, 4]
    assert capfd.readouterr().err.splitlines()[-1].startswith("roots: 4 of 4 in ")
    assert list(run_all(math.sqrt, [], workers, "roots")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through(workers: int) -> None:
    with pytest.raises(ValueError):
        list(run_all(math.sqrt, [1, -1, 4], workers, "roots"))


def test_a_lost_process_is_said() -> None:
    with pytest.raises(ChildProcessError, match="leaving: a process was ended from outside"):
        list(run_all(os._exit, [1, 1], 2, "leaving"))
