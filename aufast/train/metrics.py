"""F1-frame: the measure of both papers, from integer counts that are exact under any split of the frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aufast.aus import AU_NAMES
from aufast.labels import check_labels


@dataclass(frozen=True)
class F1Result:
    """F1-frame of each AU and their mean.

    Args:
        aus: the m AU numbers.
        f1: m values in percent; NaN where undefined: no positive and no predicted positive frame.
        mean: mean of the defined values in percent; NaN when none is.
        true_positives: m counts of frames.
        false_positives: m counts of frames.
        false_negatives: m counts of frames.
        frames: m counts of coded frames.
    """

    aus: tuple[int, ...]
    f1: tuple[float, ...]
    mean: float
    true_positives: tuple[int, ...]
    false_positives: tuple[int, ...]
    false_negatives: tuple[int, ...]
    frames: tuple[int, ...]

    @property
    def undefined(self) -> tuple[int, ...]:
        """The AUs whose F1 is undefined, which the mean leaves out."""
        return tuple(au for au, f1 in zip(self.aus, self.f1, strict=True) if f1 != f1)

    @classmethod
    def pooled(cls, results: Sequence[F1Result]) -> F1Result:
        """F1-frame of all frames of several results together.

        Args:
            results: at least one, of the same AUs and of different frames.

        Returns:
            what one metric would have found that had seen them all.

        Raises:
            ValueError: there is none, or their AUs differ.
        """
        if not results or any(result.aus != results[0].aus for result in results):
            raise ValueError(f"results must be of the same AUs, got {[result.aus for result in results]}")
        names = ("true_positives", "false_positives", "false_negatives", "frames")
        rows = [[sum(c) for c in zip(*(getattr(r, n) for r in results), strict=True)] for n in names]
        return _from_counts(results[0].aus, rows)

    def table(self) -> str:
        """Return a table for people, one line an AU, the mean last.

        Returns:
            lines of text without a final newline.
        """
        lines = [f"{'AU':>5} {'F1 (%)':>7} {'TP':>9} {'FP':>9} {'FN':>9} {'frames':>9}"]
        counts = (self.true_positives, self.false_positives, self.false_negatives, self.frames)
        for au, f1, *row in zip(self.aus, self.f1, *counts, strict=True):
            lines.append(
                f"{au:>5} {_percent(f1):>7} "
                + " ".join(f"{count:>9}" for count in row)
                + f"  {AU_NAMES.get(au, '')}".rstrip()
            )
        lines.append(f"{'mean':>5} {_percent(self.mean):>7}")
        if self.undefined:
            names = ", ".join(f"AU {au}" for au in self.undefined)
            lines.append(f"undefined and not in the mean (never present, never predicted): {names}")
        return "\n".join(lines)


class F1Frame:
    """Frame-based F1 of each AU over all frames seen, ``F1 = 2PR / (P + R)`` in percent (AAR section IV-A).

    Args:
        aus: the m AU numbers, in the order of the columns.
        threshold: an AU is predicted where its probability is at least this, in [0, 1].

    Raises:
        ValueError: aus is empty or names an AU twice, or threshold is outside [0, 1].
    """

    def __init__(self, aus: Sequence[int], threshold: float = 0.5) -> None:
        self.aus = tuple(aus)
        self.threshold = float(threshold)
        if not self.aus or len(set(self.aus)) != len(self.aus):
            raise ValueError(f"aus must name at least one AU and none twice, got {self.aus}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected a probability in [0, 1]")
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        # rows: true positives, false positives, false negatives, coded frames
        self._counts = torch.zeros(4, len(self.aus), dtype=torch.int64)
        self._reduced = False

    def update(self, probabilities: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Count a batch of frames; a batch that raises counts nothing.

        Args:
            probabilities: (..., m) floating in [0, 1], one frame a leading index; anything where masked.
            labels: (..., m) occurrence, 0 or 1 where coded, on the same device.
            mask: (..., m) bool, True where the AU is coded and the frame is no padding; None when all are.

        Raises:
            TypeError: probabilities is not a floating tensor, or mask is not bool.
            ValueError: a shape or device does not fit, an unmasked probability is NaN or outside [0, 1], or
                an unmasked label is neither 0 nor 1.
            RuntimeError: the counts were already summed over all processes.
        """
        self._check_local()
        if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
            kind = probabilities.dtype if isinstance(probabilities, Tensor) else type(probabilities).__name__
            raise TypeError(f"probabilities must be a floating tensor, got {kind}")
        m = len(self.aus)
        if probabilities.ndim == 0 or probabilities.shape[-1] != m:
            raise ValueError(f"probabilities has shape {tuple(probabilities.shape)}, expected (..., {m})")
        if isinstance(labels, Tensor) and labels.device != probabilities.device:
            raise ValueError(
                f"labels is on {labels.device}, expected {probabilities.device} of the probabilities"
            )
        occurs, coded = check_labels(labels, mask, probabilities.shape, self.aus)
        wrong = coded & ~((probabilities >= 0) & (probabilities <= 1))  # NaN fails both comparisons
        if wrong.any():
            position = tuple(wrong.nonzero()[0].tolist())
            found = f"{probabilities[position].item():g} for AU {self.aus[position[-1]]}"
            raise ValueError(f"probabilities has the value {found}, expected one in [0, 1]")
        predicted = coded & (probabilities >= self.threshold)
        frames = torch.stack(
            [occurs & predicted, predicted & ~occurs, occurs & ~predicted, coded]
        )  # (4, ..., m)
        self._counts += frames.reshape(4, -1, m).sum(1).cpu()  # (4, m)

    def merge(self, other: F1Frame) -> None:
        """Add another metric's frames to this one's.

        Args:
            other: a metric with the same aus and threshold; it is left as it is.

        Raises:
            ValueError: aus or threshold differ.
            RuntimeError: the counts of one of the two were already summed over all processes.
        """
        if (other.aus, other.threshold) != (self.aus, self.threshold):
            found = f"aus {other.aus} and threshold {other.threshold}"
            raise ValueError(f"other has {found}, expected {self.aus} and {self.threshold}")
        self._check_local()
        other._check_local()
        self._counts += other._counts

    def all_reduce(self) -> None:
        """Sum the counts over all processes of torch.distributed, in place; without a process group, nothing.

        Every process must call it, once, after its last update, and each frame must have been counted in one
        process only: a DistributedSampler that pads its last batch counts some frames twice.

        Raises:
            RuntimeError: it was already called; a second sum would count every frame once per process again.
        """
        self._check_local()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        # NCCL moves only CUDA tensors; every other backend takes the counts where they are.
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        counts = self._counts.to(device)
        torch.distributed.all_reduce(counts)
        self._counts = counts.cpu()
        self._reduced = True

    def compute(self) -> F1Result:
        """Return F1-frame of all frames so far.

        Returns:
            the result, with NaN for AUs that are undefined.
        """
        return _from_counts(self.aus, self._counts.tolist())

    def _check_local(self) -> None:
        if self._reduced:
            raise RuntimeError("the counts are already summed over all processes: call reset() to start anew")


def _from_counts(aus: tuple[int, ...], counts: Sequence[Sequence[int]]) -> F1Result:
    """The result of true positives, false positives, false negatives and coded frames, each of m AUs."""
    tp, fp, fn, frames = map(tuple, counts)
    f1 = tuple(map(_f1, tp, fp, fn))
    return F1Result(aus, f1, mean_defined(f1), tp, fp, fn, frames)


def mean_defined(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where all are."""
    defined = [value for value in values if value == value]
    return sum(defined) / len(defined) if defined else float("nan")


def _f1(tp: int, fp: int, fn: int) -> float:
    """2PR / (P + R) in percent, without its 0/0 where only one of precision and recall is undefined."""
    return 200 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")


def _percent(value: float) -> str:
    return f"{value:.1f}" if value == value else "-"
