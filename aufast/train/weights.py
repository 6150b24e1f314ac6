"""Class weights against imbalance: rare AUs count more, and for AAR rare occurrences too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from aufast.labels import check_labels


@dataclass(frozen=True, eq=False)
class AARWeights:
    """The two weights of AAR's occurrence loss, AAR eq. (5).

    Args:
        w: (m,) floating, the weight of each AU; `class_weights` gives weights that sum to 1.
        v: (m,) floating, the weight of an occurrence relative to a non-occurrence of the same AU.

    Raises:
        ValueError: w and v are not two vectors of the same length.
    """

    w: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        if self.w.ndim != 1 or self.w.shape != self.v.shape:
            shapes = f"{tuple(self.w.shape)} and {tuple(self.v.shape)}"
            raise ValueError(f"w and v must be vectors of the same length, got {shapes}")

    @classmethod
    def uniform(cls, m: int) -> AARWeights:
        """No weighting, w_j = 1/m and v_j = 1: the variant ``b-net`` (AAR section IV-C).

        Args:
            m: the number of AUs.

        Returns:
            weights in float64.
        """
        return cls(torch.full((m,), 1 / m, dtype=torch.float64), torch.ones(m, dtype=torch.float64))

    def to(self, device: torch.device | str) -> AARWeights:
        """Return the same weights on a device.

        Args:
            device: where the logits live.

        Returns:
            weights on that device.
        """
        return AARWeights(self.w.to(device), self.v.to(device))


def occurrence_rates(labels: Tensor, mask: Tensor | None = None, *, aus: Sequence[int]) -> Tensor:
    """Fraction of the coded training frames in which each AU occurs, n_j / n.

    Args:
        labels: (..., m) occurrence, 0 or 1 where coded; any real dtype.
        mask: (..., m) bool, True where the AU is coded; None when every label is. A masked frame counts in
            neither n_j nor n.
        aus: the m AU numbers.

    Returns:
        (m,) float64 in [0, 1].

    Raises:
        TypeError: labels is not a tensor, or mask is not a bool tensor.
        ValueError: a shape does not fit, an unmasked label is neither 0 nor 1, or an AU is coded in no frame.
    """
    m = len(aus)
    frames = labels.shape[:-1] if isinstance(labels, Tensor) else ()
    occurs, coded = check_labels(labels, mask, (*frames, m), aus)
    n = coded.reshape(-1, m).sum(0)  # (m,)
    n_occ = occurs.reshape(-1, m).sum(0)  # (m,)
    if (n == 0).any():
        raise ValueError(f"{_names(aus, n == 0)} coded in no frame of labels, so there is no occurrence rate")
    return n_occ.double() / n


@overload
def class_weights(rates: Tensor, *, aus: Sequence[int], kind: Literal["margl"]) -> Tensor: ...
@overload
def class_weights(rates: Tensor, *, aus: Sequence[int], kind: Literal["aar"]) -> AARWeights: ...
def class_weights(rates: Tensor, *, aus: Sequence[int], kind: Literal["margl", "aar"]) -> Tensor | AARWeights:
    """Class weights of one of the two systems from the occurrence rates of its training set.

    MARGL, below eq. (6): ``w_i = (1/r_i) C / Σ_k (1/r_k)``, whose mean is 1.
    AAR eq. (5): ``w_j = (1/r_j) / Σ_k (1/r_k)``, whose sum is 1, and ``v_j = (n - n_j) / n_j``, which is
    ``(1 - r_j) / r_j``: 0 for an AU that always occurs.

    Args:
        rates: (m,) occurrence rates as fractions in (0, 1], from `occurrence_rates` or a published table.
        aus: the m AU numbers.
        kind: "margl" or "aar".

    Returns:
        for "margl" the (m,) tensor w, for "aar" an `AARWeights`; float64, on the device of rates.

    Raises:
        TypeError: rates is not a floating tensor.
        ValueError: rates is not (m,), a rate is 0 (the AU never occurs), NaN or above 1, or kind is unknown.
    """
    if not isinstance(rates, Tensor) or not rates.is_floating_point():
        what = rates.dtype if isinstance(rates, Tensor) else type(rates).__name__
        raise TypeError(f"rates must be a floating tensor, as occurrence_rates returns it, got {what}")
    if rates.shape != (len(aus),):
        raise ValueError(f"rates has shape {tuple(rates.shape)}, expected ({len(aus)},) for {len(aus)} AUs")
    if kind not in ("margl", "aar"):
        raise ValueError(f'kind is {kind!r}, expected "margl" or "aar"')
    never = rates == 0
    if never.any():
        raise ValueError(f"{_names(aus, never)} never present in the training labels, so 1/r is infinite")
    outside = ~((rates > 0) & (rates <= 1))  # true for NaN
    if outside.any():
        found = rates[outside].tolist()
        raise ValueError(
            f"rates must be fractions in (0, 1], {_names(aus, outside)} out of range with {found}"
        )
    rates = rates.double()
    w = (1 / rates) / (1 / rates).sum()
    return w * len(aus) if kind == "margl" else AARWeights(w, (1 - rates) / rates)


def _names(aus: Sequence[int], chosen: Tensor) -> str:
    """The chosen AUs as the subject of a sentence: "AU 2 is", "AU 2 and AU 4 are"."""
    names = [f"AU {au}" for au, is_chosen in zip(aus, chosen.tolist(), strict=True) if is_chosen]
    return " and ".join(names) + (" is" if len(names) == 1 else " are")
