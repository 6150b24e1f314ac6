"""The losses against the papers' formulas, written on probabilities with a loop over frames and AUs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aufast.train import AARWeights, attention_loss, attention_network_loss, margl_loss, occurrence_loss


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_margl(level_logits, global_logits, labels, w, mask):
    """MARGL eq. (6), each AU averaged over the frames in which it is coded."""
    frames, m = labels.shape
    loss = 0.0
    for logits in [global_logits, *level_logits]:
        for i in range(m):
            terms = []
            for b in range(frames):
                if mask[b, i]:
                    p, y = sigmoid(logits[b, i]), labels[b, i]
                    terms.append(y * math.log(p) + (1 - y) * math.log(1 - p))
            if terms:
                loss -= w[i] * sum(terms) / len(terms) / m
    return loss


def slow_occurrence(logits, labels, w, v, mask):
    """AAR eq. (4), each AU averaged over the frames in which it is coded."""
    frames, m = labels.shape
    loss = 0.0
    for j in range(m):
        terms = []
        for i in range(frames):
            if mask[i, j]:
                p, y = sigmoid(logits[i, j]), labels[i, j]
                terms.append(v[j] * y * math.log(p) + (1 - y) * math.log(1 - p))
        if terms:
            loss -= w[j] * sum(terms) / len(terms)
    return loss


@pytest.fixture
def batch():
    """Logits of the global head and 3 levels (7 frames, 4 AUs), labels, a mask without column 2, w and v."""
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 3, (4, 7, 4)))
    labels = torch.from_numpy(rng.integers(0, 2, (7, 4)))
    mask = torch.from_numpy(rng.random((7, 4)) < 0.6)
    mask[:, 2] = False
    w = torch.from_numpy(rng.uniform(0.2, 2, 4))
    v = torch.from_numpy(rng.uniform(0.2, 9, 4))
    return logits, labels, mask, w, v


@pytest.mark.parametrize("masked", [False, True], ids=["all coded", "some missing"])
def test_margl_loss_is_eq_6(batch, masked):
    logits, labels, mask, w, _ = batch
    given = mask if masked else None
    mask = mask if masked else torch.ones_like(mask)
    expected = slow_margl(logits[1:].numpy(), logits[0].numpy(), labels.numpy(), w.numpy(), mask.numpy())
    for levels in (logits[1:], list(logits[1:])):
        loss = margl_loss(levels, logits[0], labels, w, given)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_margl_loss_unmasked_is_the_plain_batch_mean(batch):
    logits, labels, _, w, _ = batch
    p, y = logits.sigmoid(), labels.double()
    terms = w * (y * p.log() + (1 - y) * (1 - p).log())
    assert margl_loss(logits[1:], logits[0], labels, w).item() == pytest.approx(
        -terms.mean((1, 2)).sum().item(), rel=1e-12
    )


def test_margl_loss_without_levels_is_the_global_term(batch):
    logits, labels, _, w, _ = batch
    expected = slow_margl([], logits[0].numpy(), labels.numpy(), w.numpy(), np.ones((7, 4), bool))
    assert margl_loss(logits[:0], logits[0], labels, w).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True], ids=["all coded", "some missing"])
def test_occurrence_loss_is_eq_4(batch, masked):
    logits, labels, mask, w, v = batch
    given = mask if masked else None
    mask = mask if masked else torch.ones_like(mask)
    expected = slow_occurrence(logits[0].numpy(), labels.numpy(), w.numpy(), v.numpy(), mask.numpy())
    assert occurrence_loss(logits[0], labels, AARWeights(w, v), given).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_occurrence_loss_of_b_net_is_the_plain_cross_entropy(batch):
    logits, labels, *_ = batch
    expected = torch.nn.functional.binary_cross_entropy(logits[0].sigmoid(), labels.double())
    torch.testing.assert_close(
        occurrence_loss(logits[0], labels, AARWeights.uniform(4)), expected, rtol=1e-12, atol=0
    )


def test_clips_are_frames(batch):
    logits, labels, mask, w, v = batch
    weights = AARWeights(w, v)
    clips = occurrence_loss(
        logits[0, :6].reshape(2, 3, 4), labels[:6].reshape(2, 3, 4), weights, mask[:6].reshape(2, 3, 4)
    )
    torch.testing.assert_close(clips, occurrence_loss(logits[0, :6], labels[:6], weights, mask[:6]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16], ids=str)
def test_label_dtype_does_not_matter(batch, dtype):
    logits, labels, mask, w, v = batch
    weights = AARWeights(w, v)
    assert torch.equal(
        occurrence_loss(logits[0], labels.to(dtype), weights, mask),
        occurrence_loss(logits[0], labels, weights, mask),
    )


@pytest.mark.parametrize("missing", [9.0, -1.0, 1.0, math.nan])
def test_what_is_masked_never_counts(batch, missing):
    logits, labels, mask, w, v = batch
    weights = AARWeights(w, v)
    clean = logits[0].clone().requires_grad_()
    expected = occurrence_loss(clean, labels, weights, mask)
    expected.backward()

    dirty = torch.where(mask, logits[0], math.nan).requires_grad_()
    loss = occurrence_loss(dirty, torch.where(mask, labels.double(), missing), weights, mask)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(dirty.grad, clean.grad)
    assert torch.equal(dirty.grad != 0, mask)


def test_attention_loss_is_eq_3():
    rng = np.random.default_rng(5)
    attention, targets = rng.random((2, 3, 5, 4, 6)), rng.random((2, 3, 5, 4, 6))
    mask = rng.random((2, 3, 5)) < 0.5
    total, masked_total, count = 0.0, 0.0, 0
    for index in np.ndindex(attention.shape):
        square = (attention[index] - targets[index]) ** 2
        total += square
        if mask[index[:3]]:
            masked_total, count = masked_total + square, count + 1
    attention, targets, mask = map(torch.from_numpy, (attention, targets, mask))
    assert attention_loss(attention, targets).item() == pytest.approx(total / attention.numel(), rel=1e-12)
    assert attention_loss(attention, targets, mask).item() == pytest.approx(masked_total / count, rel=1e-12)

    keep = mask[..., None, None]
    dirty = torch.where(keep, attention, math.nan).requires_grad_()
    loss = attention_loss(dirty, torch.where(keep, targets, math.nan), mask)
    loss.backward()
    assert torch.equal(loss, attention_loss(attention, targets, mask))
    assert torch.equal(dirty.grad != 0, keep.expand_as(dirty))


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_attention_network_loss_is_eq_6(batch, factor):
    logits, labels, mask, w, v = batch
    weights = AARWeights(w, v)
    rng = np.random.default_rng(8)
    attention, targets = (torch.from_numpy(rng.random((7, 4, 3, 3))) for _ in range(2))
    loss = attention_network_loss(
        logits[0], attention, targets, labels, weights, mask, attention_weight=factor
    )
    expected = (
        occurrence_loss(logits[0], labels, weights, mask) + factor * (attention - targets).square().mean()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    default = attention_network_loss(logits[0], attention, targets, labels, weights, mask)
    at_two = attention_network_loss(logits[0], attention, targets, labels, weights, mask, attention_weight=2)
    assert torch.equal(default, at_two)


def test_attention_mask_is_not_the_label_mask(batch):
    logits, labels, mask, w, v = batch
    weights, attention, targets = AARWeights(w, v), torch.ones(7, 4, 2, 2), torch.zeros(7, 4, 2, 2)
    attention_mask = torch.zeros(7, 4, dtype=torch.bool)
    loss = attention_network_loss(logits[0], attention, targets, labels, weights, mask, attention_mask)
    torch.testing.assert_close(loss, occurrence_loss(logits[0], labels, weights, mask))


def test_gradients(batch):
    logits, labels, mask, w, v = batch
    logits = logits.clone().requires_grad_()
    weights = AARWeights(w, v)

    def occurrence(x):
        return occurrence_loss(x, labels, weights, mask)

    def margl(x):
        return margl_loss(x[1:], x[0], labels, w, mask)

    for function, x in ((occurrence, logits[0]), (margl, logits)):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))
    attention = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a: attention_loss(a, targets, torch.eye(2, 3, dtype=torch.bool)), (attention,)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_widened(batch, dtype):
    logits, labels, mask, w, v = batch
    logits, weights = logits.to(dtype), AARWeights(w, v)
    exact = logits.double()
    maps = torch.rand(2, 4, 44, 44).to(dtype)
    # What autocast would do to a product of vectors is the trap: it must not change a bit.
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            occurrence = occurrence_loss(logits[0], labels, weights, mask)
            margl = margl_loss(logits[1:], logits[0], labels, w, mask)
            attention = attention_loss(maps, torch.zeros_like(maps))
        assert occurrence.dtype == margl.dtype == attention.dtype == torch.float32
        assert occurrence.item() == pytest.approx(
            occurrence_loss(exact[0], labels, weights, mask).item(), rel=1e-6
        )
        assert margl.item() == pytest.approx(
            margl_loss(exact[1:], exact[0], labels, w, mask).item(), rel=1e-6
        )
        assert attention.item() == pytest.approx(maps.double().square().mean().item(), rel=1e-5)


def test_saturated_logits_stay_finite():
    logits = torch.tensor([[200.0, -200.0, math.inf, -math.inf]], requires_grad=True)
    right = occurrence_loss(logits, torch.tensor([[1, 0, 1, 0]]), AARWeights.uniform(4))
    assert right.item() == 0
    wrong = occurrence_loss(logits[:, :2], torch.tensor([[0, 1]]), AARWeights.uniform(2))
    wrong.backward()
    assert wrong.item() == 200
    assert logits.grad.tolist() == [[0.5, -0.5, 0, 0]]


@pytest.mark.parametrize("case", ["no frame", "no label"])
def test_nothing_coded_is_zero_with_zero_gradient(case):
    frames = 0 if case == "no frame" else 5
    logits = torch.randn(frames, 3, requires_grad=True)
    labels = torch.full((frames, 3), 9)
    mask = torch.zeros(frames, 3, dtype=torch.bool)
    attention = torch.rand(frames, 3, 2, 2, requires_grad=True)
    loss = margl_loss([logits], logits, labels, torch.ones(3), mask) + attention_network_loss(
        logits, attention, attention.detach() + 1, labels, AARWeights.uniform(3), mask, mask
    )
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any() and not attention.grad.any()
    assert attention_loss(attention[:0], attention[:0]).item() == 0


LOGITS, LABELS, MAPS = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"labels has the value 9.0 for column 1, expected 0 or 1",
         lambda: occurrence_loss(LOGITS, torch.tensor([[0, 1, 0], [0, 9.0, 1]]), AARWeights.uniform(3))),
        (ValueError, r"labels has the value nan for column 0",
         lambda: margl_loss([LOGITS], LOGITS, torch.full((2, 3), math.nan), torch.ones(3))),
        (ValueError, r"labels has the value 0.5",
         lambda: occurrence_loss(LOGITS, LABELS + 0.5, AARWeights.uniform(3))),
        (ValueError, r"labels has shape \(2, 4\), expected \(2, 3\)",
         lambda: occurrence_loss(LOGITS, torch.zeros(2, 4), AARWeights.uniform(3))),
        (TypeError, r"labels must be a tensor, got list",
         lambda: occurrence_loss(LOGITS, [[0, 0, 0]] * 2, AARWeights.uniform(3))),
        (TypeError, r"mask must be a bool tensor.*torch.float32",
         lambda: occurrence_loss(LOGITS, LABELS, AARWeights.uniform(3), torch.ones(2, 3))),
        (ValueError, r"mask has shape \(3,\), expected \(2, 3\)",
         lambda: occurrence_loss(LOGITS, LABELS, AARWeights.uniform(3), torch.ones(3, dtype=torch.bool))),
        (TypeError, r"weights must be AARWeights, got Tensor",
         lambda: occurrence_loss(LOGITS, LABELS, torch.ones(3))),
        (ValueError, r"weights.w has shape \(4,\), expected \(3,\)",
         lambda: occurrence_loss(LOGITS, LABELS, AARWeights.uniform(4))),
        (TypeError, r"weights must be a floating tensor, got AARWeights",
         lambda: margl_loss([LOGITS], LOGITS, LABELS, AARWeights.uniform(3))),
        (TypeError, r"logits must be a floating tensor, got torch.int64",
         lambda: occurrence_loss(LOGITS.long(), LABELS, AARWeights.uniform(3))),
        (ValueError, r"level_logits\[1\] has shape \(1, 3\), expected global_logits' \(2, 3\)",
         lambda: margl_loss([LOGITS, LOGITS[:1]], LOGITS, LABELS, torch.ones(3))),
        (ValueError, r"global_logits has shape \(3,\), expected \(B, m\)",
         lambda: margl_loss([], LOGITS[0], LABELS[0], torch.ones(3))),
        (ValueError, r"same shape \(..., m, H, W\), got attention \(3, 4, 4\) and targets \(3, 4, 5\)",
         lambda: attention_loss(torch.ones(3, 4, 4), torch.ones(3, 4, 5))),
        (TypeError, r"targets must be a floating tensor, got torch.int64",
         lambda: attention_loss(torch.ones(3, 4, 4), torch.ones(3, 4, 4).long())),
        (ValueError, r"attention has shape \(1, 3, 4, 4\), expected frame_logits' \(2, 3\) and then H, W",
         lambda: attention_network_loss(LOGITS, MAPS, MAPS, LABELS, AARWeights.uniform(3))),
        (ValueError, r"labels is on meta",
         lambda: occurrence_loss(LOGITS, LABELS.to("meta"), AARWeights.uniform(3))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_losses_of_parts_add_up_to_the_batch(batch):
    """With the whole batch's counts, whatever the parts hold; a mean of the parts' means would not."""
    logits, labels, mask, w, v = batch
    weights = AARWeights(w, v)
    attention, targets = torch.rand(2, 7, 4, 3, 3, dtype=torch.float64)
    parts, counts = (slice(0, 2), slice(2, 7)), mask.sum(0)
    whole = margl_loss(logits[1:], logits[0], labels, w, mask)
    summed = sum(margl_loss(logits[1:, p], logits[0, p], labels[p], w, mask[p], counts) for p in parts)
    torch.testing.assert_close(summed, whole)
    means = sum(margl_loss(logits[1:, p], logits[0, p], labels[p], w, mask[p]) for p in parts) / 2
    assert abs(means - whole) > 1e-3
    whole = attention_network_loss(logits[0], attention, targets, labels, weights, mask, mask)
    pieces = [[x[p] for x in (logits[0], attention, targets, labels, mask)] for p in parts]
    summed = sum(
        attention_network_loss(x, a, t, y, weights, k, k, counts=counts, attention_count=mask.sum())
        for x, a, t, y, k in pieces
    )
    torch.testing.assert_close(summed, whole)


def test_counts_of_another_length_are_refused(batch):
    logits, labels, mask, w, v = batch
    with pytest.raises(ValueError, match=r"counts must be a tensor \(4,\), got \(3,\)"):
        occurrence_loss(logits[0], labels, AARWeights(w, v), mask, torch.ones(3))
