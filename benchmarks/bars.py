"""The targets of the project: what the fused operators must reach, medians of one run.

On a CPU with two threads; on a GPU, where the targets are for an H200.
"""

from __future__ import annotations

from dataclasses import dataclass

# Whose times are "ours", by the kind of record; on a GPU also replayed as a CUDA graph. A target is about the
# first that a record has.
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton", "cuda+graph", "triton+graph")}


@dataclass(frozen=True)
class Bar:
    """One target.

    Attributes:
        operator, case, mode, dtype: the run it is about; mode "memory" compares peaks instead of times.
        against: provider whose time (or peak) is divided by ours; "fma" and "copy" for the fraction of that
            ceiling; "float32" for our own float32 time divided by ours; "step" for steps of time a second.
        at_least: the ratio, the fraction or the rate.
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


def _gpu() -> list[Bar]:
    bars = []
    for level in ("layer2", "layer3", "layer4"):
        for layout in ("nchw", "channels_last"):
            name = f"{level}-{layout}"
            for dtype in ("float32", "bfloat16"):
                bars += [
                    Bar("roi_crop", name, "fwd", "copy", 0.70, dtype),
                    Bar("roi_crop", name, "fwd", "merged", 2, dtype),
                    Bar("roi_crop", name, "fwd", "roi_align", 1.5, dtype),
                    Bar("roi_crop", name, "bwd", "merged", 3, dtype),
                ]
    bars += [
        Bar("graph_conv", "batch48", "fwd", "reference", 3),
        Bar("graph_conv", "batch12288", "fwd", "cublas", 0.9),
    ]
    for batch in (1, 16, 256):
        name = f"B{batch}"
        bars += [Bar("graph_gru", name, "fwd", "step", 1 / 6e-6)] if batch <= 16 else []
        bars += [
            Bar("graph_gru", name, "fwd", "reference", 20),
            Bar("graph_gru", name, "fwd", "compiled", 5),
            Bar("graph_gru", name, "fwd", "graph", 3),
            Bar("graph_gru", name, "fwd", "cudnn", 1.5),
            Bar("graph_gru", name, "fwd+bwd", "reference", 15),
            Bar("graph_gru", name, "fwd+bwd", "compiled", 4),
        ]
    return bars


def _agcrn() -> list[Bar]:
    bars = [
        Bar("agcrn", "N307-B1", "fwd", "reference", 5),
        Bar("agcrn", "N883-B16", "memory", "reference", 5),
    ]
    for case in ("N307-B16", "N883-B16"):
        bars += [
            Bar("agcrn", case, "fwd", "reference", 2),
            Bar("agcrn", case, "fwd", "compiled", 1.2),
            Bar("agcrn", case, "fwd+bwd", "reference", 3),
            Bar("agcrn", case, "fwd+bwd", "compiled", 1.3),
        ]
    return bars


def _models() -> list[Bar]:
    """Both models; the plain form runs in float32 whatever ours does."""
    low = {"dtype": "bfloat16"}
    return [
        Bar("aar", "B1", "infer", "reference", 1.5),
        Bar("aar", "B1", "infer", "reference", 2.8, **low),
        Bar("aar", "B1", "infer", "compiled", 1.15),
        Bar("aar", "B1", "infer", "compiled", 1.15, **low),
        Bar("aar", "B1", "stem", "reference", 2.5),
        Bar("aar", "stage1", "train", "reference", 1.4),
        Bar("aar", "stage1", "memory", "reference", 1),
        Bar("aar", "stage2", "train graph", "reference", 10),
        Bar("margl", "B1", "infer", "reference", 1.8),
        Bar("margl", "B16", "infer", "reference", 1.35),
        Bar("margl", "B1", "infer", "reference", 2.5, **low),
        Bar("margl", "B16", "infer", "reference", 2.5, **low),
        Bar("margl", "B1", "after backbone", "reference", 3),
        Bar("margl", "B16", "after backbone", "reference", 2),
        Bar("margl", "B8", "train", "reference", 1.4),
        Bar("margl", "B8", "memory", "reference", 1),
    ]


STEPS = 48  # of graph_gru
CPU_BARS = [
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
    *_agcrn(),
    Bar("region_conv", "8x8", "fwd", "loop", 2.2),
    Bar("region_conv", "8x8", "fwd", "grouped", 3),
    *_bfloat16(),
    *_models(),
]

BARS = {"cpu": CPU_BARS, "cuda": _gpu()}
