"""Synthetic faces in the layout of BP4D or DISFA, so that everything runs with nobody's data.

The trees are marked by a file SYNTHETIC.json, and every record, report and packed set that comes of them says
synthetic. The subjects' names are BP4D's or DISFA's because the layout and the folds ask for them; the faces
are drawn and nobody's.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aufast.aus import AU_NAMES, AU_SETS
from aufast.data.canvas import Placement
from aufast.data.landmarks import write_landmarks
from aufast.data.parallel import run_all
from aufast.data.protocols import FOLDS
from aufast.data.records import MARKER
from aufast.data.synthetic_face import Identity, View, draw_identity, render
from aufast.data.synthetic_motion import Motion, draw_motion, rates_of
from aufast.files import Draft, remove_leftovers, writing

Array = np.ndarray
LAYOUTS = ("bp4d", "disfa")
JPEG_QUALITY = 92

# AUs that nobody could code with something before the brow and eye of one side, or before the mouth.
_UPPER, _LOWER = (1, 2, 4, 6, 7), (10, 12, 14, 15, 17, 23, 24, 25, 26)


@dataclass(frozen=True)
class Recipe:
    """What to generate.

    Args:
        layout: "bp4d" (tasks of JPEG frames, occurrence codes) or "disfa" (PNG frames, intensities).
        subjects: how many persons, dealt evenly over the three parts of the layout's folds.
        videos: of each person; DISFA has one.
        frames: of each video.
        size: side of a picture in pixels.
        seed: the same seed gives the same files, with any number of workers.
        occluders: whether something passes before the face now and then.

    Raises:
        ValueError: a number out of its range.
    """

    layout: str = "bp4d"
    subjects: int = 12
    videos: int = 2
    frames: int = 150
    size: int = 200
    seed: int = 0
    occluders: bool = True

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        people = sum(map(len, FOLDS[self.layout]))
        most = {"subjects": people, "videos": 8 if self.layout == "bp4d" else 1, "frames": 5000, "size": 2000}
        least = {"size": 64}
        for name, high in most.items():
            low = least.get(name, 1)
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")


def subject_names(recipe: Recipe) -> list[str]:
    """The subjects of a recipe: first of each part of the folds, then the second ones, and so on."""
    parts = FOLDS[recipe.layout]
    longest = max(map(len, parts))
    return [part[k] for k in range(longest) for part in parts if k < len(part)][: recipe.subjects]


def synthesize(root: str | os.PathLike[str], recipe: Recipe = Recipe(), workers: int = 1) -> Path:
    """Generate a data set.

    The folder appears under its name when it is whole.

    Args:
        root: a folder that does not exist yet, or is empty.
        recipe: what to generate.
        workers: processes.

    Returns:
        `root`.

    Raises:
        ValueError: the folder is not empty, or workers is below 1.
        OSError: it cannot be written.
    """
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root}: already exists; synthetic data goes to a new or an empty folder")
    with writing(root, "nothing of it is there"):
        root.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        with Draft(root, folder=True) as draft:
            _draw(draft.place, recipe, workers)
            draft.commit()
    return root


def _draw(work: Path, recipe: Recipe, workers: int) -> None:
    """All videos of a recipe, and then the file that says what they are."""
    jobs = [(work, recipe, s, v) for s in range(recipe.subjects) for v in range(recipe.videos)]
    for _ in run_all(_write_video, jobs, workers, f"drawing synthetic {recipe.layout}, videos"):
        pass
    about = {"synthetic": True, "about": "drawn faces, nobody's; no measurement on them is one of people"}
    (work / MARKER).write_text(json.dumps({**about, **vars(recipe)}, indent=2) + "\n", encoding="utf-8")


def draw_video(recipe: Recipe, subject: int, video: int) -> tuple[Motion, Iterator[tuple[Array, Array]]]:
    """One video of a recipe.

    Args:
        recipe: what to generate.
        subject: index of the person.
        video: index of the video.

    Returns:
        The motion, and an iterator that draws: a frame, uint8 (size, size, 3), with its landmarks (49, 2).
    """
    person = np.random.default_rng([recipe.seed, subject])
    identity = draw_identity(person)
    habits = person.normal(size=len(AU_NAMES))
    generator = np.random.default_rng([recipe.seed, subject, video + 1])
    motion = draw_motion(generator, recipe.frames, rates_of(recipe.layout), habits, recipe.occluders)
    return motion, _draw_frames(recipe, identity, motion, generator)


def _draw_frames(
    recipe: Recipe, identity: Identity, motion: Motion, generator: np.random.Generator
) -> Iterator[tuple[Array, Array]]:
    background = _background(generator, recipe.size)
    unit = recipe.size / 200
    scale = unit * generator.uniform(0.72, 0.86)
    light = generator.uniform(-0.22, 0.22), generator.uniform(-0.15, 0.1)
    gain = generator.uniform(0.85, 1.1)
    thing = generator.uniform(40, 220, 3)
    for k in range(recipe.frames):
        x, y = recipe.size / 2 + unit * motion.shift[k]
        placement = Placement(scale, float(motion.roll[k]), float(x), float(y + 4 * unit))
        view = View(placement, motion.yaw[k], motion.pitch[k], light, motion.blink[k], tuple(motion.gaze[k]))
        strengths = dict(zip(AU_NAMES, motion.strength[k].tolist(), strict=True))
        picture, landmarks = render(identity, strengths, view, background)
        if not np.isnan(motion.occluder[k, 0]):
            _cover(picture, placement, motion.occluder[k], thing)
        grain = generator.standard_normal((recipe.size, recipe.size), dtype=np.float32)
        picture = picture * np.float32(gain) + np.float32(2.0) * grain[..., None]
        yield np.clip(picture, 0, 255).astype(np.uint8), landmarks


def _background(generator: np.random.Generator, size: int) -> Array:
    """Two colours running into one another."""
    first, second = generator.uniform(40, 210, (2, 3))
    angle = generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    t = 0.5 + 0.6 * (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    return (first * (1 - t) + second * t).astype(np.float32)


def _cover(picture: Array, placement: Placement, place: Array, color: Array) -> None:
    """Something round before the face, in place."""
    x, y = placement.to_image(place)
    radius = 24 * placement.scale
    v, u = np.ogrid[: picture.shape[0], : picture.shape[1]]
    distance = np.hypot(u - x, v - y)
    cover = np.clip(radius - distance + 0.5, 0, 1).astype(np.float32)[..., None]
    shaded = (color * (1.1 - 0.5 * (distance / radius)[..., None].clip(0, 1))).astype(np.float32)
    picture += cover * (shaded - picture)


def hidden_aus(place: Array) -> tuple[int, ...]:
    """The AUs that an occluder at this place of the face hides from a coder."""
    if np.isnan(place[0]) or abs(place[0]) > 62:
        return ()
    return _UPPER if place[1] < 0 else _LOWER


def _write_video(job: tuple[Path, Recipe, int, int]) -> None:
    from PIL import Image

    root, recipe, subject, video = job
    name = subject_names(recipe)[subject]
    motion, frames = draw_video(recipe, subject, video)
    if recipe.layout == "bp4d":
        first = 1 + 37 * (subject + video)  # BP4D codes a part of each video, wherever it starts
        numbers = np.arange(first, first + recipe.frames)
        folder, title, suffix = root / "2D+3D" / name / f"T{video + 1}", f"{name}_T{video + 1}", "jpg"
        names = [f"{number:04d}" for number in numbers]
        _write_codes(root / "AUCoding" / "AU_OCC" / f"{title}.csv", numbers, motion)
    else:
        numbers = np.arange(1, recipe.frames + 1)
        folder, title, suffix = root / "Images" / name, name, "png"
        names = [str(number - 1) for number in numbers]
        _write_intensities(root / "ActionUnit_Labels" / name, name, numbers, motion)
    folder.mkdir(parents=True)
    points = []
    for stem, (frame, landmarks) in zip(names, frames, strict=True):
        points.append(landmarks)
        options = {"quality": JPEG_QUALITY} if suffix == "jpg" else {"compress_level": 1}
        Image.fromarray(frame).save(folder / f"{stem}.{suffix}", **options)
    (root / "Landmarks").mkdir(exist_ok=True)
    write_landmarks(root / "Landmarks" / f"{title}.csv", numbers, np.array(points))


def _write_codes(path: Path, numbers: Sequence[int], motion: Motion) -> None:
    """BP4D's CSV: columns 0 (the frame) to 99, 9 where an AU is not coded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {au: list(AU_NAMES).index(au) for au in AU_SETS["bp4d"]}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(range(100))
        for k, number in enumerate(numbers):
            hidden = hidden_aus(motion.occluder[k])
            codes = {au: int(motion.occurs[k, c]) for au, c in columns.items() if au not in hidden}
            writer.writerow([number, *(codes.get(au, 9) for au in range(1, 100))])


def _write_intensities(folder: Path, name: str, numbers: Sequence[int], motion: Motion) -> None:
    """DISFA's files: an intensity from 0 to 5 a frame, 2 and more where the AU occurs."""
    folder.mkdir(parents=True)
    for au in AU_SETS["disfa"]:
        column = list(AU_NAMES).index(au)
        strength, occurs = motion.strength[:, column], motion.occurs[:, column]
        levels = np.where(occurs, np.clip(np.ceil(5 * strength), 2, 5), (strength > 0.1).astype(int)).astype(
            int
        )
        lines = [f"{number},{level}" for number, level in zip(numbers, levels, strict=True)]
        (folder / f"{name}_au{au}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
