"""Action units: their names, the set each dataset is trained on, and how often each occurs.

Names follow the Facial Action Coding System (Ekman, Friesen and Hager, 2002). Sets and occurrence rates are
those of AAR (IEEE Trans. Image Processing, 2023), section IV-A and Table I; the rates are taken over each
dataset's training frames.
"""

from __future__ import annotations

AU_NAMES: dict[int, str] = {
    1: "inner brow raiser",
    2: "outer brow raiser",
    4: "brow lowerer",
    6: "cheek raiser",
    7: "lid tightener",
    9: "nose wrinkler",
    10: "upper lip raiser",
    12: "lip corner puller",
    14: "dimpler",
    15: "lip corner depressor",
    17: "chin raiser",
    23: "lip tightener",
    24: "lip pressor",
    25: "lips part",
    26: "jaw drop",
}

AU_SETS: dict[str, tuple[int, ...]] = {
    "bp4d": (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24),
    "disfa": (1, 2, 4, 6, 9, 12, 25, 26),
    "gft": (1, 2, 4, 6, 10, 12, 14, 15, 23, 24),
    "affwild2": (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26),
}

# AAR Table I, percent of frames, in the order of AU_SETS.
OCCURRENCE_RATES: dict[str, dict[int, float]] = {
    name: dict(zip(AU_SETS[name], rates, strict=True))
    for name, rates in {
        "bp4d": (21.1, 17.1, 20.3, 46.2, 54.9, 59.4, 56.2, 46.6, 16.9, 34.4, 16.5, 15.2),
        "disfa": (5.0, 4.0, 15.0, 8.1, 4.3, 13.2, 27.8, 8.9),
        "gft": (3.7, 13.5, 3.7, 28.3, 24.6, 29.3, 3.1, 10.7, 25.0, 14.1),
        "affwild2": (11.9, 5.1, 16.0, 26.5, 39.9, 34.5, 24.3, 2.8, 3.1, 2.8, 62.8, 7.6),
    }.items()
}
