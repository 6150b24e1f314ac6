"""The losses of MARGL and AAR, on logits and with missing labels masked.

The papers write them on probabilities. On logits, ``log p`` is ``logsigmoid(x)`` and ``log(1 - p)`` is
``logsigmoid(-x)``, which stay finite where p rounds to 0 or 1. A missing label drops out: each AU's loss is
the mean over the frames in which that AU is coded. Without missing labels that is exactly the paper's
formula, and an AU coded in no frame of the batch adds 0. Half precision, also under autocast, is widened to
float32 first.

A step may see its batch in parts, over processes or one after another. A mean of the parts' means would
weigh a label by how many others its part happens to hold. So each loss takes the counts to divide by: with
those of the whole batch, the parts' losses, and their gradients, add up to the whole batch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aufast.labels import check_labels, check_mask
from aufast.train.weights import AARWeights


def margl_loss(
    level_logits: Tensor | Sequence[Tensor],
    global_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """MARGL's loss: weighted cross entropy of the global and of each regional prediction, MARGL eq. (6).

    ``L = L_0(P_g) + Σ_k L_k(P_k)`` with ``L_k = -(1/C) Σ_i w_i [y_i log p_i + (1 - y_i) log(1 - p_i)]``,
    averaged over the batch.

    Args:
        level_logits: (L, B, m) floating, or L tensors (B, m), one a level; L = 0 leaves the global term.
        global_logits: (B, m) floating.
        labels: (B, m) occurrence, 0 or 1 where coded.
        weights: (m,) w of `class_weights` with kind "margl"; ones for no weighting.
        mask: (B, m) bool, True where the AU is coded; None when every label is.
        counts: (m,) coded frames of the whole batch, where this is a part of one; None counts them here.

    Returns:
        scalar, float32, or float64 for float64 logits.

    Raises:
        TypeError: logits or weights are not floating, or mask is not bool.
        ValueError: a shape or device does not fit, or an unmasked label is neither 0 nor 1.
    """
    _check_logits(global_logits, "global_logits", ndim=2)
    for level, logits in enumerate(level_logits):
        _check_logits(logits, f"level_logits[{level}]", ndim=2)
        if logits.shape != global_logits.shape:
            shapes = f"{tuple(logits.shape)}, expected global_logits' {tuple(global_logits.shape)}"
            raise ValueError(f"level_logits[{level}] has shape {shapes}")
    occurs, coded = _check_targets(global_logits, labels, mask)
    w = _check_weight(weights, "weights", global_logits)
    v = torch.ones_like(w)
    frames = _check_counts(counts, coded)
    losses = [_weighted_bce(logits, occurs, coded, w, v, frames) for logits in (global_logits, *level_logits)]
    return torch.stack(losses).sum() / len(w)


def occurrence_loss(
    logits: Tensor,
    labels: Tensor,
    weights: AARWeights,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """AAR's occurrence loss Lu, of frame logits eq. (4) and of spatio-temporal logits eq. (14).

    ``Lu = -(1/t) Σ_i Σ_j w_j [v_j p_ij log p̂_ij + (1 - p_ij) log(1 - p̂_ij)]``

    Args:
        logits: (..., m) floating, a frame for each leading index.
        labels: (..., m) occurrence, 0 or 1 where coded.
        weights: `class_weights` with kind "aar", or `AARWeights.uniform` for the variant ``b-net``.
        mask: (..., m) bool, True where the AU is coded and the frame is no padding; None when all are.
        counts: (m,) coded frames of the whole batch, where this is a part of one; None counts them here.

    Returns:
        scalar, float32, or float64 for float64 logits.

    Raises:
        TypeError: logits or weights are of the wrong type, or mask is not bool.
        ValueError: a shape or device does not fit, or an unmasked label is neither 0 nor 1.
    """
    _check_logits(logits, "logits", ndim=None)
    if not isinstance(weights, AARWeights):
        raise TypeError(f"weights must be AARWeights, got {type(weights).__name__}")
    occurs, coded = _check_targets(logits, labels, mask)
    w, v = _check_weight(weights.w, "weights.w", logits), _check_weight(weights.v, "weights.v", logits)
    return _weighted_bce(logits, occurs, coded, w, v, _check_counts(counts, coded))


def attention_loss(
    attention: Tensor, targets: Tensor, mask: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Attention regression loss La, the mean squared difference to the predefined maps, AAR eq. (3).

    Args:
        attention: (..., m, H, W) floating, learned maps in [0, 1].
        targets: (..., m, H, W) floating, predefined maps of eq. (1) and (2).
        mask: (..., m) bool, False for maps to leave out (padding, no landmarks); None to count all.
        count: scalar, the maps of the whole batch, where this is a part of one; None counts them here.

    Returns:
        scalar, float32, or float64 for float64 maps; 0 when no map counts.

    Raises:
        TypeError: attention or targets is not floating, or mask is not bool.
        ValueError: a shape or device does not fit.
    """
    for name, maps in (("attention", attention), ("targets", targets)):
        if not isinstance(maps, Tensor) or not maps.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {_kind(maps)}")
    if attention.ndim < 3 or attention.shape != targets.shape:
        shapes = f"attention {tuple(attention.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"attention and targets must have the same shape (..., m, H, W), got {shapes}")
    if attention.device != targets.device:
        raise ValueError(f"targets is on {targets.device}, expected {attention.device}")
    difference = _widen(attention) - _widen(targets)
    if mask is not None:
        check_mask(mask, attention.shape[:-2], attention.device)
        # Replaced before the square, so that padding (NaN too) has an exactly zero gradient.
        difference = torch.where(mask[..., None, None], difference, 0)
    if count is None:
        count = attention.shape[:-2].numel() if mask is None else mask.sum()
    count = torch.as_tensor(count, device=attention.device)
    return difference.square().sum() / (count * attention.shape[-2:].numel()).clamp(min=1)


def attention_network_loss(
    frame_logits: Tensor,
    attention: Tensor,
    targets: Tensor,
    labels: Tensor,
    weights: AARWeights,
    mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    attention_weight: float = 2.0,
    counts: Tensor | None = None,
    attention_count: Tensor | None = None,
) -> Tensor:
    """Full loss of AAR's adaptive attention regression network, ``L_AA = Lu⁽⁰⁾ + λa La``, AAR eq. (6).

    Args:
        frame_logits: (..., m) floating, logits of p̂⁽⁰⁾.
        attention: (..., m, H, W) floating, learned maps.
        targets: (..., m, H, W) floating, predefined maps.
        labels: (..., m) occurrence, 0 or 1 where coded.
        weights: `class_weights` with kind "aar".
        mask: (..., m) bool, True where the AU is coded; None when every label is.
        attention_mask: (..., m) bool, True for maps that count; None for all. It is not ``mask``: a frame
            without a label still has landmarks.
        attention_weight: λa.
        counts: (m,) coded frames of the whole batch, where this is a part of one; None counts them here.
        attention_count: scalar, the maps of the whole batch, likewise.

    Returns:
        scalar, float32, or float64 for float64 input.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape or device does not fit, or an unmasked label is neither 0 nor 1.
    """
    occurrence = occurrence_loss(frame_logits, labels, weights, mask, counts)
    regression = attention_loss(attention, targets, attention_mask, attention_count)
    if attention.shape[:-2] != frame_logits.shape:
        expected = f"frame_logits' {tuple(frame_logits.shape)} and then H, W"
        raise ValueError(f"attention has shape {tuple(attention.shape)}, expected {expected}")
    return occurrence + attention_weight * regression


def _weighted_bce(
    logits: Tensor, occurs: Tensor, coded: Tensor, w: Tensor, v: Tensor, frames: Tensor
) -> Tensor:
    """``Σ_j w_j / n_j`` times the sum over coded frames of ``-[v_j y log p + (1 - y) log(1 - p)]``."""
    # Masked logits are replaced before the logarithm, so that padding (NaN too) has an exactly zero gradient.
    logits = torch.where(coded, _widen(logits), 0)
    # y is 0 or 1, so one of the two terms vanishes: choose the other, rather than multiply 0 by infinity.
    log_p = F.logsigmoid(torch.where(occurs, logits, -logits))  # (..., m), of the true class
    log_likelihood = torch.where(occurs, v, 1) * log_p
    total = torch.where(coded, log_likelihood, 0).reshape(-1, len(w)).sum(0)  # (m,)
    return -(w * total / frames.clamp(min=1)).sum()


def _widen(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_logits(logits: Tensor, name: str, ndim: int | None) -> None:
    """A floating tensor whose last dimension is the AUs."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {_kind(logits)}")
    if logits.ndim == 0 or logits.shape[-1] == 0 or (ndim is not None and logits.ndim != ndim):
        expected = "(..., m)" if ndim is None else "(B, m)"
        raise ValueError(f"{name} has shape {tuple(logits.shape)}, expected {expected}")


def _check_targets(logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(occurs, coded) for these logits, both bool of their shape and on their device."""
    if isinstance(labels, Tensor) and labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device}, expected the logits' {logits.device}")
    return check_labels(labels, mask, logits.shape)


def _check_counts(counts: Tensor | None, coded: Tensor) -> Tensor:
    """The (m,) numbers of frames to average over: those coded here, unless given."""
    here = coded.reshape(-1, coded.shape[-1]).sum(0)  # (m,)
    if counts is None:
        return here
    if not isinstance(counts, Tensor) or counts.shape != here.shape:
        found = tuple(counts.shape) if isinstance(counts, Tensor) else _kind(counts)
        raise ValueError(f"counts must be a tensor ({len(here)},), got {found}")
    return counts.to(here.device)


def _check_weight(weight: Tensor, name: str, logits: Tensor) -> Tensor:
    """The (m,) weight in the dtype of the computation and on the logits' device."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {_kind(weight)}")
    if weight.shape != logits.shape[-1:]:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected ({logits.shape[-1]},)")
    return weight.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
