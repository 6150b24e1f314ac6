"""Class weights against the papers' formulas."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from aufast.aus import AU_SETS, OCCURRENCE_RATES
from aufast.train import AARWeights, class_weights, occurrence_rates
from aufast.train.loop import Trainer
from aufast.train.processes import Processes
from tests.train.runs import MAKERS

AUS = (1, 2, 4)


def test_rates_are_counted_over_coded_frames():
    labels = torch.tensor([[1, 0, 9], [1, 1, 0], [0, 9, 1], [0, 0, 1]])
    rates = occurrence_rates(labels, labels != 9, aus=AUS)
    assert rates.dtype == torch.float64
    assert rates.tolist() == [2 / 4, 1 / 3, 2 / 3]
    clips = labels.reshape(2, 2, 3)
    assert torch.equal(occurrence_rates(clips, clips != 9, aus=AUS), rates)


@pytest.mark.parametrize("missing", [9.0, -1.0, 1.0, math.nan])
def test_a_missing_label_is_no_occurrence(missing):
    labels = torch.tensor([[1.0, 0, 1], [0, 1, missing], [1, missing, 0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, True]])
    assert occurrence_rates(labels, mask, aus=AUS).tolist() == [2 / 3, 1 / 2, 1 / 2]


@pytest.mark.parametrize("dataset", AU_SETS)
def test_weights_are_the_formulas_of_both_papers(dataset):
    aus = AU_SETS[dataset]
    rates = np.array([OCCURRENCE_RATES[dataset][au] / 100 for au in aus])
    n = 1000.0
    n_occ = n * rates
    w = class_weights(torch.from_numpy(rates), aus=aus, kind="margl")
    np.testing.assert_allclose(w, [(1 / r) * len(aus) / sum(1 / rates) for r in rates], rtol=1e-12)
    aar = class_weights(torch.from_numpy(rates), aus=aus, kind="aar")
    np.testing.assert_allclose(aar.w, [(n / n_j) / sum(n / n_occ) for n_j in n_occ], rtol=1e-12)
    np.testing.assert_allclose(aar.v, (n - n_occ) / n_occ, rtol=1e-12)


def test_hand_computed_weights():
    rates = torch.tensor([0.5, 0.25, 0.125])
    assert class_weights(rates, aus=AUS, kind="margl").tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])
    weights = class_weights(rates, aus=AUS, kind="aar")
    assert weights.w.tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert weights.v.tolist() == [1, 3, 7]


def test_an_au_that_always_occurs_has_no_weight_for_occurrence():
    assert class_weights(torch.tensor([1.0, 0.5, 0.5]), aus=AUS, kind="aar").v.tolist() == [0, 1, 1]


def test_uniform_weights_are_those_of_b_net():
    weights = AARWeights.uniform(4)
    assert weights.w.tolist() == [0.25] * 4 and weights.v.tolist() == [1] * 4


def test_weights_are_frozen():
    with pytest.raises(AttributeError):
        AARWeights.uniform(2).w = torch.ones(2)


RATES = torch.tensor([0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"AU 2 is never present in the training labels",
         lambda: class_weights(occurrence_rates(torch.tensor([[1, 0, 1]]), aus=AUS), aus=AUS, kind="aar")),
        (ValueError, r"AU 1 and AU 4 are never present",
         lambda: class_weights(torch.tensor([0, 0.5, 0]), aus=AUS, kind="margl")),
        (ValueError, r"AU 4 is coded in no frame of labels",
         lambda: occurrence_rates(torch.ones(2, 3), torch.tensor([[True, True, False]] * 2), aus=AUS)),
        (ValueError, r"AU 1 and AU 2 and AU 4 are coded in no frame",
         lambda: occurrence_rates(torch.ones(0, 3), aus=AUS)),
        (ValueError, r"labels has the value 9 for AU 4, expected 0 or 1",
         lambda: occurrence_rates(torch.tensor([[0, 1, 9]]), aus=AUS)),
        (ValueError, r"labels has the value -1.0 for AU 1",
         lambda: occurrence_rates(torch.tensor([[0, 1, 0], [-1.0, 9, 0]]), aus=AUS)),
        (ValueError, r"labels has the value nan for AU 2",
         lambda: occurrence_rates(torch.tensor([[0, math.nan, 0]]), aus=AUS)),
        (ValueError, r"labels has shape \(2, 4\), expected \(2, 3\)",
         lambda: occurrence_rates(torch.ones(2, 4), aus=AUS)),
        (ValueError, r"labels has shape \(\), expected \(3,\)",
         lambda: occurrence_rates(torch.tensor(1), aus=AUS)),
        (TypeError, r"labels must be a tensor, got ndarray",
         lambda: occurrence_rates(np.ones((2, 3)), aus=AUS)),
        (TypeError, r"mask must be a bool tensor.*torch.int64",
         lambda: occurrence_rates(torch.ones(2, 3), torch.ones(2, 3).long(), aus=AUS)),
        (ValueError, r"rates must be fractions in \(0, 1\], AU 1 is out of range with \[21.0\]",
         lambda: class_weights(torch.tensor([21.0, 0.5, 0.5]), aus=AUS, kind="aar")),
        (ValueError, r"AU 2 is out of range with \[nan\]",
         lambda: class_weights(torch.tensor([0.5, math.nan, 0.5]), aus=AUS, kind="aar")),
        (ValueError, r"rates has shape \(2, 3\), expected \(3,\)",
         lambda: class_weights(torch.ones(2, 3), aus=AUS, kind="aar")),
        (TypeError, r"rates must be a floating tensor.*got dict",
         lambda: class_weights({1: 0.5}, aus=AUS, kind="aar")),
        (ValueError, r"kind is 'bw-net', expected", lambda: class_weights(RATES, aus=AUS, kind="bw-net")),
        (ValueError, r"same length, got \(3,\) and \(2,\)", lambda: AARWeights(torch.ones(3), torch.ones(2))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_weights_and_relations_see_the_training_part_alone(packed, tmp_path):
    """A label of the test part changes nothing; one of the training part does."""
    alone = Processes(0, 1, torch.device("cpu"))

    def learned(root):
        trainer = Trainer(MAKERS["margl"](root), tmp_path / "run", alone)
        return trainer.split, trainer.weights, trainer.model.adjacency

    split, weights, relations = learned(packed)
    for side, videos in (("test", split.test), ("train", split.train)):
        root = tmp_path / side
        shutil.copytree(packed, root)
        for video in videos:
            path = root / "videos" / video.name / "labels.npy"
            labels = np.load(path)
            labels[:, split.columns] = 0
            labels[: len(labels) // 2, split.columns[0]] = 1
            labels[len(labels) // 2 :, split.columns[1:]] = 1
            np.save(path, labels)
        _, now, related = learned(root)
        assert torch.equal(now, weights) == torch.equal(related, relations) == (side == "test")
