"""From a data set on disk to packed faces: landmarks, alignment, arrays, hashes.

Every video becomes a folder that appears by a rename when it is whole. A run that was killed leaves whole
videos and a hidden folder; the next run keeps the former, removes the latter and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from aufast.data.check import read_dataset
from aufast.data.frames import iterate_frames
from aufast.data.packed import FORMAT_VERSION, INDEX, SUMS, VIDEO, VIDEOS, read_json
from aufast.data.parallel import run_all
from aufast.data.records import Video, some
from aufast.faces import FaceDetector, align_face
from aufast.files import file_sum, locked, sync_folder, write_whole, writing

SETTINGS = "settings.json"
_KEPT = "videos that are whole are kept, and the same command goes on"
Source = Literal["auto", "files", "dlib"]


@dataclass(frozen=True)
class Summary:
    """What `prepare_dataset` did.

    Attributes:
        out: the packed folder.
        synthetic: the faces were drawn.
        videos, frames: how many are packed.
        kept: how many of the videos an earlier run had packed.
        dropped: reason to how many frames were left out for it.
        notes: what the reader left out, and the frames of each reason, a sentence a video.
    """

    out: Path
    synthetic: bool
    videos: int
    frames: int
    kept: int
    dropped: dict[str, int]
    notes: tuple[str, ...]

    def text(self) -> str:
        """The summary for people, without a final line break."""
        kind = "synthetic frames" if self.synthetic else "frames"
        earlier = f", {self.kept} of them by an earlier run" if self.kept else ""
        lines = [f"{self.out}: {self.frames:,} {kind} of {self.videos} videos{earlier}"]
        lines += [f"left out {count:,} frames: {reason}" for reason, count in self.dropped.items()]
        return "\n".join([*lines, *self.notes])


def prepare_dataset(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    landmarks: Source = "auto",
    size: int = 200,
    workers: int = 1,
    **options: object,
) -> Summary:
    """Align and pack a data set.

    Frames without landmarks, with landmarks that no face can have, or with an unreadable image are left out
    and reported.

    Args:
        root: the data set's folder, or the JSON file of a table.
        out: the packed folder; made where it does not exist. A run that was stopped goes on.
        dataset: "bp4d", "disfa", "affwild2" or "table"; None looks.
        landmarks: "files" takes the data set's, "dlib" finds them, "auto" finds them for the videos that
            bring none.
        size: side of an aligned face in pixels.
        workers: processes, over videos.
        options: of the reader, such as `aus` or `camera`.

    Returns:
        What was done.

    Raises:
        ValueError: bad input, another process is at work on `out`, or `out` was made with other settings.
        OSError: `out` cannot be written; what is whole is kept.
    """
    if landmarks not in ("auto", "files", "dlib"):
        raise ValueError(f"landmarks must be auto, files or dlib, got {landmarks!r}")
    if size < 2:
        raise ValueError(f"size must be at least 2 pixels, got {size}")
    videos = read_dataset(root, dataset, **options)
    if landmarks == "files" and (without := [v.name for v in videos if v.landmarks is None]):
        raise ValueError(f"{root}: no landmark file for {without[0]} ({len(without)} videos in all)")
    out = Path(out)
    with writing(out, _KEPT):
        (out / VIDEOS).mkdir(parents=True, exist_ok=True)
    with writing(out, _KEPT), locked(out, "preparing"):
        settings = {
            "format_version": FORMAT_VERSION,
            "dataset": videos[0].dataset,
            "synthetic": videos[0].synthetic,
            "aus": list(videos[0].aus),
            "size": size,
            "landmarks": landmarks,
        }
        _keep_settings(out, settings)
        for stale in (out / VIDEOS).glob(".*"):
            shutil.rmtree(stale)
        jobs = [_Job(video, out / VIDEOS / video.name, size, landmarks) for video in videos]
        entries = {job.video.name: entry for job in jobs if (entry := _finished(job)) is not None}
        kept = len(entries)
        if kept < len(jobs):
            (out / INDEX).unlink(missing_ok=True)  # until it is whole again
        missing = [job for job in jobs if job.video.name not in entries]
        for entry in run_all(_pack, missing, workers, "packing videos"):
            entries[entry["name"]] = entry
        ordered = [entries[video.name] for video in videos]
        if not any(entry["frames"] for entry in ordered):
            raise ValueError(f"{root}: no frame could be packed; {_reasons(ordered)}")
        _write_index(out, settings, ordered)
    return _summary(out, videos, ordered, kept)


def _write_index(out: Path, settings: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    lines = [
        f"{value}  {VIDEOS}/{entry['name']}/{name}\n"
        for entry in entries
        for name, value in entry["sums"].items()
    ]
    write_whole(out / SUMS, "".join(lines).encode())
    write_whole(out / INDEX, _json({**settings, "videos": entries}))


def _summary(out: Path, videos: list[Video], entries: list[dict[str, Any]], kept: int) -> Summary:
    dropped: dict[str, int] = {}
    notes = [note for video in videos for note in video.notes]
    for entry in entries:
        for reason, numbers in entry["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + len(numbers)
            notes.append(f"{entry['name']}: left out frames {some(numbers)}: {reason}")
    packed = [entry for entry in entries if entry["frames"]]
    frames = sum(entry["frames"] for entry in packed)
    return Summary(out, videos[0].synthetic, len(packed), frames, kept, dropped, tuple(notes))


def _reasons(entries: list[dict[str, Any]]) -> str:
    return "; ".join(sorted({reason for entry in entries for reason in entry["dropped"]}))


# ---- one video -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    video: Video
    folder: Path
    size: int
    landmarks: str

    def fingerprint(self) -> str:
        """Of all that the packed folder depends on, but for the pixels.

        Landmark files count by name, size and time of change.
        """
        video = self.video
        digest = hashlib.sha256()
        for array in (video.numbers, video.labels, video.mask):
            digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
        files = [path.name for path in video.images] if video.images else [str(video.movie)]
        facts = [FORMAT_VERSION, video.subject, video.group, video.aus, self.size, self.landmarks, files]
        points = [(path.name, path.stat()) for path in video.landmark_files if self.landmarks != "dlib"]
        facts += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in points]
        digest.update(json.dumps([*facts, video.landmarks is None]).encode())
        return digest.hexdigest()


def _finished(job: _Job) -> dict[str, Any] | None:
    """The entry of a video that is packed and still the same; one that is not is removed."""
    if not job.folder.exists():
        return None
    try:
        entry = read_json(job.folder / VIDEO, "")
        if entry["fingerprint"] == job.fingerprint() and all(
            (job.folder / name).is_file() for name in entry["sums"]
        ):
            return entry
    except (ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(job.folder)
    return None


def _pack(job: _Job) -> dict[str, Any]:
    """Align one video into a hidden folder and give it its name."""
    video = job.video
    temporary = job.folder.with_name(f".{job.folder.name}.{os.getpid()}")
    with writing(job.folder, _KEPT):
        temporary.mkdir()
        try:
            entry = _fill(job, temporary)
            write_whole(temporary / VIDEO, _json(entry))
            sync_folder(temporary)
            os.replace(temporary, job.folder)
            sync_folder(job.folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return {**entry, "name": video.name}


def _fill(job: _Job, folder: Path) -> dict[str, Any]:
    """Write the arrays of a video; returns its entry of the index."""
    video, dropped = job.video, {}
    points = None
    if job.landmarks != "dlib" and video.landmarks is not None:
        points = video.landmarks(video.numbers)  # (n, 49, 2)
        known = np.isfinite(points).all(axis=(1, 2))
        if not known.all():
            dropped["no landmarks"] = video.numbers[~known].tolist()
        video, points = video.select(known), points[known]
    kept, landmarks = [], []
    with open(folder / "frames.npy", "wb") as file:
        _write_header(file, len(video), job.size)
        for k, image in enumerate(iterate_frames(video)):
            number = int(video.numbers[k])
            if isinstance(image, ValueError):
                dropped.setdefault("image cannot be read", []).append(number)
                continue
            found = points[k] if points is not None else _find_landmarks(image)
            if found is None:
                dropped.setdefault("dlib found no face", []).append(number)
                continue
            try:
                face = align_face(image, found, job.size)
            except ValueError:
                dropped.setdefault("landmarks no face can have", []).append(number)
                continue
            file.write(face.image.data)
            kept.append(k)
            landmarks.append(face.landmarks)
        file.seek(0)
        _write_header(file, len(kept), job.size)
        file.flush()
        os.fsync(file.fileno())
    arrays = {
        "landmarks": np.array(landmarks, np.float32).reshape(len(kept), 49, 2),
        "labels": video.labels[kept],
        "mask": video.mask[kept],
        "numbers": video.numbers[kept],
    }
    for name, array in arrays.items():
        with open(folder / f"{name}.npy", "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    return {
        "name": video.name,
        "subject": video.subject,
        "group": video.group,
        "frames": len(kept),
        "dropped": dropped,
        "fingerprint": job.fingerprint(),
        "sums": {f"{name}.npy": file_sum(folder / f"{name}.npy") for name in ("frames", *arrays)},
    }


def _write_header(file: BinaryIO, frames: int, size: int) -> None:
    """NumPy's header, which leaves room for the first number to grow, so it can be written again."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (frames, size, size, 3)}
    np.lib.format.write_array_header_1_0(file, header)


@lru_cache(maxsize=1)
def _detector() -> FaceDetector:
    return FaceDetector()


def _find_landmarks(image: np.ndarray) -> np.ndarray | None:
    """The largest face's 49 points by dlib."""
    faces = _detector().detect(image)
    return faces[0].landmarks if faces else None


# ---- files ---------------------------------------------------------------------------------------


def _keep_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS
    if not path.exists():
        write_whole(path, _json(settings))
    before = read_json(path, "")
    if different := [key for key, value in settings.items() if before.get(key) != value]:
        key = different[0]
        raise ValueError(
            f"{out}: was prepared with {key} {before.get(key)}, not {settings[key]}; use a new folder"
        )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
