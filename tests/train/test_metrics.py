"""F1-frame against hand counts, a loop over frames, and itself under every way to split the frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from aufast.train import F1Frame

AUS = (1, 2, 4)


def counted(probabilities, labels, mask=None, aus=AUS, threshold=0.5):
    metric = F1Frame(aus, threshold)
    metric.update(probabilities, labels, mask)
    return metric.compute()


def slow_f1(probabilities, labels, mask, threshold):
    """(f1 in percent, tp, fp, fn) of one AU from precision and recall as AAR section IV-A defines them."""
    tp = fp = fn = 0
    for p, y, coded in zip(probabilities, labels, mask, strict=True):
        if coded:
            predicted = p >= threshold
            tp += predicted and y == 1
            fp += predicted and y == 0
            fn += (not predicted) and y == 1
    if tp + fp + fn == 0:
        return math.nan, tp, fp, fn
    if tp == 0:
        return 0.0, tp, fp, fn
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return 100 * 2 * precision * recall / (precision + recall), tp, fp, fn


def random_frames(seed, frames, m, coded=0.8):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (frames, m)).astype(np.float64)
    mask = rng.random((frames, m)) < coded
    # Probabilities on a grid of quarters, so that some lie exactly on a threshold.
    return rng.integers(0, 5, (frames, m)) / 4, np.where(mask, labels, 9), mask


def test_hand_counts():
    probabilities = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.2, 0.3], [0.2, 0.7, 0.1], [0.6, 0.4, 0.0]])
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
    result = counted(probabilities, labels)
    assert result.true_positives == (2, 0, 0)
    assert result.false_positives == (1, 1, 0)
    assert result.false_negatives == (1, 1, 0)
    assert result.frames == (4, 4, 4)
    assert result.f1[0] == pytest.approx(200 / 3) and result.f1[1] == 0 and math.isnan(result.f1[2])
    assert result.undefined == (4,)
    assert result.mean == pytest.approx(100 / 3)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_slow_loop(seed, threshold):
    probabilities, labels, mask = random_frames(seed, 40, 3)
    result = counted(*map(torch.from_numpy, (probabilities, labels, mask)), threshold=threshold)
    expected = [slow_f1(*(a[:, j] for a in (probabilities, labels, mask)), threshold) for j in range(3)]
    np.testing.assert_allclose(result.f1, [row[0] for row in expected], rtol=1e-12)
    counts = zip(result.true_positives, result.false_positives, result.false_negatives, strict=True)
    assert list(counts) == [row[1:] for row in expected]
    assert result.frames == tuple(mask.sum(0))
    assert result.mean == pytest.approx(np.nanmean([row[0] for row in expected]), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 30), max_size=6))
def test_any_split_gives_the_same_result(seed, cuts):
    frames = [torch.from_numpy(a) for a in random_frames(seed, 30, 3)]
    whole = counted(*frames)
    bounds = [0, *sorted(cuts), 30]
    parts, batches = [], F1Frame(AUS)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        shard = [a[start:stop] for a in frames]
        batches.update(*shard)
        parts.append(F1Frame(AUS))
        parts[-1].update(*shard)
    merged = F1Frame(AUS)
    for part in parts:
        merged.merge(part)
    assert repr(batches.compute()) == repr(merged.compute()) == repr(whole)


def test_clips_are_frames():
    probabilities, labels, mask = (torch.from_numpy(a) for a in random_frames(1, 24, 3))
    clips = counted(*(a.reshape(2, 4, 3, 3) for a in (probabilities, labels, mask)))
    assert clips == counted(probabilities, labels, mask)
    one_frame = counted(probabilities[0], labels[0], mask[0])
    assert one_frame.frames == tuple(mask[0].int().tolist())


def test_masked_frames_never_count():
    probabilities = torch.tensor([[0.9, 0.2, 0.6], [math.nan, 7.0, -1.0], [0.2, 0.9, 0.2]])
    labels = torch.tensor([[1.0, 0, 1], [9, -1, math.nan], [1, 1, 0]])
    mask = torch.tensor([[True] * 3, [False] * 3, [False] * 3])
    assert repr(counted(probabilities, labels, mask)) == repr(counted(probabilities[:1], labels[:1]))


def test_nothing_seen_is_undefined():
    metric = F1Frame(AUS)
    metric.update(torch.zeros(0, 3), torch.zeros(0, 3))
    result = metric.compute()
    assert result.undefined == AUS and math.isnan(result.mean) and result.frames == (0, 0, 0)


def test_reset_forgets():
    metric = F1Frame(AUS)
    metric.update(torch.ones(2, 3), torch.ones(2, 3))
    metric.reset()
    assert metric.compute().frames == (0, 0, 0)


def test_half_precision_on_the_threshold_is_predicted():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert counted(torch.full((1, 3), 0.5, dtype=dtype), torch.ones(1, 3)).f1 == (100, 100, 100)


def test_a_batch_that_raises_counts_nothing():
    metric = F1Frame(AUS)
    with pytest.raises(ValueError, match="nan for AU 4"):
        metric.update(torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, math.nan]]), torch.ones(2, 3))
    assert metric.compute().frames == (0, 0, 0)


def test_table_is_readable():
    table = counted(
        torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    ).table()
    assert table.splitlines() == [
        "   AU  F1 (%)        TP        FP        FN    frames",
        "    1    66.7         1         1         0         2  inner brow raiser",
        "    2     0.0         0         0         1         2  outer brow raiser",
        "    4       -         0         0         0         2  brow lowerer",
        " mean    33.3",
        "undefined and not in the mean (never present, never predicted): AU 4",
    ]


def reduce_shard(rank, world, address, queue):
    """One process: count every world-th frame, sum over the processes, report what it then has."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    frames = [torch.from_numpy(a)[rank::world] for a in random_frames(11, 25, 3)]
    metric = F1Frame(AUS)
    metric.update(*frames)
    metric.all_reduce()
    try:
        metric.all_reduce()
        again = "no error"
    except RuntimeError as error:
        again = str(error)
    queue.put((repr(metric.compute()), again))
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_sum_to_the_whole(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(reduce_shard, (3, f"file://{tmp_path}/rendezvous", queue), nprocs=3)
    answers = [queue.get() for _ in range(3)]
    whole = counted(*(torch.from_numpy(a) for a in random_frames(11, 25, 3)))
    assert [answer[0] for answer in answers] == [repr(whole)] * 3
    assert all("already summed" in answer[1] for answer in answers)


def test_all_reduce_without_processes_changes_nothing():
    metric = F1Frame(AUS)
    metric.update(torch.ones(2, 3), torch.ones(2, 3))
    metric.all_reduce()
    metric.update(torch.ones(1, 3), torch.ones(1, 3))
    assert metric.compute().true_positives == (3, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"value nan for AU 2, expected one in \[0, 1\]",
         lambda: counted(torch.tensor([[0.1, math.nan, 0.2]]), torch.zeros(1, 3))),
        (ValueError, r"value -3.5 for AU 1",
         lambda: counted(torch.tensor([[-3.5, 0.1, 0.2]]), torch.zeros(1, 3))),
        (ValueError, r"labels has the value 9.0 for AU 4, expected 0 or 1; a missing label must be",
         lambda: counted(torch.zeros(1, 3), torch.tensor([[0, 0, 9.0]]))),
        (ValueError, r"labels has shape \(2, 3\), expected \(1, 3\)",
         lambda: counted(torch.zeros(1, 3), torch.zeros(2, 3))),
        (ValueError, r"probabilities has shape \(1, 4\), expected \(..., 3\)",
         lambda: counted(torch.zeros(1, 4), torch.zeros(1, 4))),
        (TypeError, r"probabilities must be a floating tensor, got torch.int64",
         lambda: counted(torch.zeros(1, 3).long(), torch.zeros(1, 3))),
        (TypeError, r"probabilities must be a floating tensor, got ndarray",
         lambda: counted(np.zeros((1, 3)), torch.zeros(1, 3))),
        (TypeError, r"mask must be a bool tensor.*got torch.uint8",
         lambda: counted(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.uint8))),
        (ValueError, r"labels is on meta",
         lambda: counted(torch.zeros(1, 3), torch.zeros(1, 3, device="meta"))),
        (ValueError, r"at least one AU and none twice, got \(\)", lambda: F1Frame(())),
        (ValueError, r"none twice, got \(1, 1\)", lambda: F1Frame((1, 1))),
        (ValueError, r"threshold is 50, expected a probability", lambda: F1Frame(AUS, 50)),
        (ValueError, r"threshold is nan", lambda: F1Frame(AUS, math.nan)),
        (ValueError, r"other has aus \(1, 2\) and threshold 0.5, expected \(1, 2, 4\)",
         lambda: F1Frame(AUS).merge(F1Frame((1, 2)))),
        (ValueError, r"threshold 0.4", lambda: F1Frame(AUS).merge(F1Frame(AUS, 0.4))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
