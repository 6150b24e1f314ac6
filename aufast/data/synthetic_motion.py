"""How a synthetic face moves: AUs that come and go together, blinks, pose and light. All of it is invented.

Each AU follows a smooth Gaussian process; it occurs while its process is above the level that its rate asks
for (a Gaussian copula: rates are exact in the mean, and the correlations below say which AUs go together).
Rates are those of AAR's Table I. The correlations are not measured: they have the sign and the order of what
is known of spontaneous expressions, such as AU 6 with 12, or 1 with 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from aufast.aus import AU_NAMES, OCCURRENCE_RATES
from aufast.data.synthetic_face import effective

Array = np.ndarray

CORRELATIONS: dict[tuple[int, int], float] = {
    (1, 2): 0.75, (1, 4): 0.2, (4, 7): 0.4, (4, 9): 0.5, (6, 7): 0.6, (6, 10): 0.65, (6, 12): 0.8,
    (7, 10): 0.55, (7, 12): 0.5, (9, 10): 0.4, (10, 12): 0.7, (12, 14): 0.25, (12, 15): -0.3, (12, 24): -0.2,
    (14, 17): 0.2, (14, 24): 0.2, (15, 17): 0.5, (15, 23): 0.2, (17, 23): 0.35, (17, 24): 0.45, (23, 24): 0.4,
    (12, 25): 0.3, (25, 26): 0.7, (24, 25): -0.5,
}  # fmt: skip
SMOOTHING = 12.0  # standard deviation of the processes' kernel, in frames
PERSONAL = 0.15  # share of the variance that belongs to the person: some never frown
SPEECH = (25, 26)  # move, unlabelled, where the labels leave room for them
BLUR = 0.2  # half the width of an onset, in standard deviations of the process


@dataclass(frozen=True, eq=False)
class Motion:
    """One video's movements, n frames.

    Attributes:
        strength: (n, 15) of each AU in the order of AU_NAMES, 0 to 1, as shown.
        occurs: bool (n, 15).
        blink: (n,), 0 to 1.
        yaw, pitch, roll: (n,) radians.
        shift: (n, 2) pixels.
        gaze: (n, 2).
        occluder: (n, 2) where something covers the face, in its own frame; NaN where nothing does.
    """

    strength: Array
    occurs: Array
    blink: Array
    yaw: Array
    pitch: Array
    roll: Array
    shift: Array
    gaze: Array
    occluder: Array


def rates_of(dataset: str) -> dict[int, float]:
    """Occurrence rates as fractions: the data set's own, and the AUs of speech where it has none of them."""
    rates = {au: percent / 100 for au, percent in OCCURRENCE_RATES[dataset].items()}
    if not set(SPEECH) & set(rates):
        rates.update({au: OCCURRENCE_RATES["disfa"][au] / 100 for au in SPEECH})
    return rates


def mixing(aus: Sequence[int]) -> Array:
    """(m, m) factor L of the correlation matrix of these AUs, made positive where the pairs disagree."""
    matrix = np.eye(len(aus))
    place = {au: k for k, au in enumerate(aus)}
    for (first, second), value in CORRELATIONS.items():
        if first in place and second in place:
            matrix[place[first], place[second]] = matrix[place[second], place[first]] = value
    values, vectors = np.linalg.eigh(matrix)
    factor = vectors * np.sqrt(np.maximum(values, 1e-3))
    return factor / np.sqrt((factor**2).sum(axis=1, keepdims=True))


def smooth_noise(generator: np.random.Generator, frames: int, columns: int, deviation: float) -> Array:
    """(frames, columns) of a stationary Gaussian process of unit variance."""
    reach = int(3 * deviation)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    kernel /= np.sqrt((kernel**2).sum())
    noise = generator.normal(size=(frames + 2 * reach, columns))
    return np.stack([np.convolve(column, kernel, "valid") for column in noise.T], axis=1)


def draw_motion(
    generator: np.random.Generator,
    frames: int,
    rates: dict[int, float],
    person: Array,
    occluders: bool = True,
) -> Motion:
    """One video.

    Args:
        generator: of random numbers.
        frames: n.
        rates: fraction of frames in which each AU occurs; AUs not named do not move.
        person: (15,) standard normal, the same in all videos of a person.
        occluders: whether something may pass before the face.
    """
    aus = tuple(rates)
    columns = [list(AU_NAMES).index(au) for au in aus]
    factor = mixing(aus)
    own = person[columns] @ factor.T
    process = smooth_noise(generator, frames, len(aus), SMOOTHING) @ factor.T  # (n, m)
    process = np.sqrt(PERSONAL) * own + np.sqrt(1 - PERSONAL) * process
    level = np.array([NormalDist().inv_cdf(1 - rates[au]) for au in aus])
    above = process - level
    onset = np.clip((above + BLUR) / (2 * BLUR), 0, 1)
    onset = onset * onset * (3 - 2 * onset)  # (n, m), half at the moment the label changes
    apex = 0.75 + 0.25 * np.clip(above, 0, 1)
    strength, occurs = np.zeros((frames, len(AU_NAMES))), np.zeros((frames, len(AU_NAMES)), bool)
    strength[:, columns] = onset * apex * generator.uniform(0.85, 1, len(aus))
    shown = effective(strength)
    occurs[:, columns] = (above > 0) & (shown[:, columns] >= strength[:, columns] / 2)

    slow = smooth_noise(generator, frames, 7, 20.0)
    return Motion(
        strength=strength,
        occurs=occurs,
        blink=_blinks(generator, frames),
        yaw=0.10 * slow[:, 0],
        pitch=0.06 * slow[:, 1],
        roll=0.06 * slow[:, 2],
        shift=2.0 * slow[:, 3:5],
        gaze=1.2 * slow[:, 5:7],
        occluder=_occluder(generator, frames) if occluders else np.full((frames, 2), np.nan),
    )


def _blinks(generator: np.random.Generator, frames: int) -> Array:
    """(n,) lid closure: five frames every eighty or so."""
    blink = np.zeros(frames)
    at = int(generator.integers(0, 80))
    while at < frames:
        shape = np.array([0.4, 0.9, 1.0, 0.8, 0.3])[: frames - at]
        blink[at : at + len(shape)] = shape
        at += int(generator.integers(40, 120))
    return blink


def _occluder(generator: np.random.Generator, frames: int) -> Array:
    """(n, 2) of something that passes before one part of the face, in a third of the videos."""
    path = np.full((frames, 2), np.nan)
    if generator.uniform() < 1 / 3 and frames > 30:
        length = int(generator.integers(12, 25))
        start = int(generator.integers(0, frames - length))
        side = generator.choice([-1.0, 1.0])
        target = np.array([(side * 38, -45), (side * 8, 44)][generator.integers(2)], float)
        into = np.clip(2.5 * (1 - np.abs(np.linspace(-1, 1, length))), 0, 1)[:, None]
        path[start : start + length] = target + (1 - into) * (side * 130, 20)
    return path
