"""The targets of the project: what the fused CPU operators must reach, medians of one run, two threads."""

from __future__ import annotations

from dataclasses import dataclass

# Whose times are "ours". The inputs are on the CPU.
BACKENDS = ("cpu",)


@dataclass(frozen=True)
class Bar:
    """One target.

    Attributes:
        operator, case, mode, dtype: the run it is about; mode "memory" compares peaks instead of times.
        against: provider whose time (or peak) is divided by ours; "fma" for the fraction of the FMA ceiling;
            "float32" for our own float32 time divided by ours.
        at_least: the ratio or the fraction.
    """

    operator: str
    case: str
    mode: str
    against: str
    at_least: float
    dtype: str = "float32"


def _roi_crop() -> list[Bar]:
    bars = []
    for level, merged, stn in (("layer2", 3.5, 100), ("layer3", 4.5, 40), ("layer4", 3, 15)):
        bars += [
            Bar("roi_crop", f"{level}-nchw", "fwd", "merged", merged),
            Bar("roi_crop", f"{level}-nchw", "fwd", "stn", stn),
            Bar("roi_crop", f"{level}-channels_last", "fwd", "merged", 8),
            Bar("roi_crop", f"{level}-nchw", "fwd+bwd", "merged", 5),
            Bar("roi_crop", f"{level}-channels_last", "fwd+bwd", "merged", 8),
        ]
    return bars


def _bfloat16() -> list[Bar]:
    """Where the CPU has AVX512-BF16."""
    runs = [("graph_conv", case, mode) for case in ("batch48", "batch768") for mode in ("fwd", "fwd+bwd")]
    runs += [("graph_gru", "B8", "fwd"), ("graph_gru", "B8", "fwd+bwd"), ("graph_gru", "B32", "fwd")]
    return [Bar(*run, "float32", 1.6, dtype="bfloat16") for run in runs]


BARS = [
    *_roi_crop(),
    Bar("graph_conv", "batch48", "fwd", "reference", 3),
    Bar("graph_conv", "batch48", "fwd+bwd", "reference", 3),
    Bar("graph_conv", "batch768", "fwd", "fma", 0.50),
    Bar("graph_conv", "batch768", "fwd+bwd", "fma", 0.40),
    Bar("graph_gru", "B1", "fwd", "reference", 30),
    Bar("graph_gru", "B1", "fwd", "compiled", 3),
    Bar("graph_gru", "B8", "fwd", "reference", 9),
    Bar("graph_gru", "B8", "fwd", "fma", 0.45),
    Bar("graph_gru", "B32", "fwd", "fma", 0.52),
    Bar("graph_gru", "B1", "fwd+bwd", "reference", 22),
    Bar("graph_gru", "B1", "fwd+bwd", "hoisted", 4),
    Bar("graph_gru", "B8", "fwd+bwd", "reference", 12),
    Bar("graph_gru", "B8", "fwd+bwd", "fma", 0.35),
    Bar("graph_gru", "B8", "memory", "reference", 4),
    Bar("region_conv", "8x8", "fwd", "loop", 2.2),
    Bar("region_conv", "8x8", "fwd", "grouped", 3),
    *_bfloat16(),
]
