"""Labelling many inputs: shards, resuming, sidecars, progress and the summary."""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

import aufast
from aufast.faces import find_landmark_model
from aufast.faces.align import BORDER, ENLARGE
from aufast.files import file_sum
from aufast.label.config import AGAIN, FINE, LIMITS, STATUSES, InputError, LabelConfig
from aufast.label.files import OutputError, Outputs, Source, find_inputs, in_shard, output_name, writing
from aufast.label.given import faces_file, has_boxes, shared_faces
from aufast.label.labeler import Labeler, Outcome
from aufast.label.pictures import OverlayPicture, OverlayVideo
from aufast.label.report import ReportPage
from aufast.label.tables import SUFFIXES, Sink, open_table
from aufast.models.pretrained import CONFIG, WEIGHTS
from aufast.typed import from_json

FORMAT_VERSION = 1


@dataclass
class Summary:
    """What a run did.

    Attributes:
        inputs: by status, in the order of `STATUSES`.
        kept: how many of them an earlier run had finished.
        troubled: path, status and sentence of every input that is neither "ok" nor "no_face".
        others: files in folders that are neither image nor video by their ending.
        frames: labelled in this run.
        seconds: of this run, by stage and in all.
    """

    inputs: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    troubled: list[tuple[str, str, str]] = field(default_factory=list)
    others: int = 0
    frames: int = 0
    seconds: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        """For people, without a final line break."""
        states = ", ".join(f"{self.inputs[s]} {s}" for s in STATUSES if self.inputs[s])
        earlier = f", {self.kept} of them by an earlier run" if self.kept else ""
        lines = [f"{sum(self.inputs.values())} inputs: {states or 'none'}{earlier}"]
        if self.others:
            lines.append(f"{self.others} other files in the folders were left alone")
        lines += [f"{status}: {path!r}: {sentence}" for path, status, sentence in self.troubled]
        whole = self.seconds["all"]
        if self.frames:
            lines.append(
                f"{self.frames:,} frames in {whole:.1f} s, {self.frames / whole:.1f} frames/s; of a second:"
            )
            for name in ("decode", "faces", "model", "write"):
                lines.append(f"  {name:<7} {self.seconds[name] / whole:5.2f} s")
        return "\n".join(lines)


def label_files(
    paths: Sequence[str],
    out: str | os.PathLike,
    config: LabelConfig,
    shard: tuple[int, int] = (0, 1),
) -> Summary:
    """Label files and folders into an output folder. A run that was stopped goes on.

    Every input gets a sidecar `NAME-HASH.json` and, where it has frames, its tables; HASH is of the input's
    content, the model and the settings, so what is finished is recognised and never labelled twice. One that
    cannot be labelled stops nothing.

    Args:
        paths: images, videos, and folders of them.
        out: made where it does not exist.
        config: what to do.
        shard: i and N: this run takes the i-th of N parts, from 0.

    Returns:
        What was done.

    Raises:
        ValueError: no input, a wrong shard, or a model that cannot be loaded.
        OutputError: `out` cannot be written.
        ImportError: a library that the settings need is missing.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard must be i/N with 0 <= i < N, got {index}/{count}")
    out = Path(out)
    found, others = find_inputs(paths, out)
    if not found:
        raise ValueError(f"no image or video in {', '.join(map(repr, paths)) or 'an empty list'}")
    run = _Run(out, config, Summary(others=others))
    if config.faces is not None:
        run.shared_faces = shared_faces(config.faces, found)
    mine = [path for path in found if in_shard(path, shard)]
    name = "run.jsonl" if count == 1 else f"run-{index}-of-{count}.jsonl"
    with writing(str(out / name)):
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / name, "w", encoding="utf-8", buffering=1)
    start = time.perf_counter()
    with log:
        try:
            for k, path in enumerate(mine, 1):
                run.one(path, _Progress(k, len(mine), path), log)
        finally:
            run.labeler.close()
    run.summary.seconds["all"] = time.perf_counter() - start
    return run.summary


class _Progress:
    """A line on standard error: rewritten on a terminal, written now and then elsewhere."""

    def __init__(self, index: int, count: int, path: str):
        self._what = f"{index} of {count}: {os.path.basename(path)!r}"
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else 10.0
        self._start = self._last = time.monotonic()

    def __call__(self, frames: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._write(f"{self._what}: {frames:,} frames, {frames / (now - self._start):.1f} frames/s")

    def end(self, outcome: Outcome, kept: bool) -> None:
        """The last line of an input."""
        frames = outcome.frames["decoded"]
        state = f"{outcome.status}{', by an earlier run' if kept else ''}, {frames:,} frames"
        if frames and not kept:
            state += f", {frames / max(outcome.seconds['all'], 1e-6):.1f} frames/s"
        self._write(f"{self._what}: {state}")
        if self._terminal:
            sys.stderr.write("\n")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r{line}\033[K" if self._terminal else line + "\n")
        sys.stderr.flush()


class _Run:
    def __init__(self, out: Path, config: LabelConfig, summary: Summary):
        self.out, self.config, self.summary = out, config, summary
        self.labeler = Labeler(config)
        # Loads the model and a detector: a bad file is told before anything is written.
        self.aus = self.labeler.aus
        self.labeler.stage()
        folder = Path(config.model)
        self.model_sum = file_sum(folder / WEIGHTS)
        self.model_config_sum = file_sum(folder / CONFIG)
        self.shared_faces: dict[str, str] = {}  # inputs that have no file of faces to themselves

    @functools.cached_property
    def landmarks_sum(self) -> str:
        """SHA-256 of the landmark model."""
        return file_sum(find_landmark_model(self.config.landmarks)[0])

    def one(self, path: str, progress: _Progress, log: IO[str]) -> None:
        """Label an input, or find that it is labelled."""
        outputs, kept = None, None
        try:
            with Source(path) as source:
                sums = {"input": source.sum(), **self._faces_sums(path)}
                model = [self.model_sum, self.model_config_sum, self.config.fingerprint()]
                outputs = Outputs(self.out, output_name(path, *sums.values(), *model))
                kept = _finished(outputs.sidecar, self.config)
                outcome = kept or self._label(source, sums, outputs, progress)
        except InputError as error:  # there is no content to name an output by
            outcome = Outcome(error.status, str(error))
        progress.end(outcome, kept is not None)
        self._note(path, outcome, outputs, kept is not None, log)

    def _label(self, source: Source, sums: dict[str, str], outputs: Outputs, progress: _Progress) -> Outcome:
        try:
            sinks = functools.partial(self._sinks, source.path, outputs)
            outcome = self.labeler.label(source, sinks, progress)
            outputs.commit(self._sidecar(source, sums, outcome))
            return outcome
        except (OutputError, ImportError):
            raise
        except Exception as error:
            # A mistake of this program: the run goes on without a sidecar, and the next one tries again.
            return Outcome.unexpected(error)
        finally:
            outputs.discard()

    def _sinks(self, path: str, outputs: Outputs, image: bool) -> list[Sink]:
        config, aus = self.config, self.aus
        sinks = [open_table(f, outputs.path(SUFFIXES[f]), aus, config, path) for f in config.formats]
        if config.overlay:
            kind, suffix = (OverlayPicture, ".png") if image else (OverlayVideo, ".mp4")
            sinks.append(kind(outputs.path(f".overlay{suffix}"), aus, config))
        if config.report:
            facts = [f"model {self.labeler.recognizer.model.name}", f"aufast {aufast.__version__}"]
            sinks.append(ReportPage(outputs.path(".html"), aus, config, os.path.basename(path), facts))
        return sinks

    def _faces_sums(self, path: str) -> dict[str, str]:
        """SHA-256 of what the faces of an input come from: a file of them, a landmark model, or both."""
        if self.config.faces is None:
            return {"landmark_model": self.landmarks_sum}
        file = faces_file(self.config.faces, path)
        if not os.path.isfile(file):
            raise InputError("undecodable", f"there is no file of faces {str(file)!r}")
        if path in self.shared_faces:
            raise InputError(
                "undecodable",
                f"the file of faces {str(file)!r} would also be that of {self.shared_faces[path]!r}; "
                "give each its own, in a folder named as the input's or with the input's ending, .mp4.csv",
            )
        try:
            sums = {"faces": file_sum(file)}
        except OSError as error:
            raise InputError(
                "undecodable", f"the file of faces {str(file)!r}: {error.strerror or error}"
            ) from error
        return {**sums, "landmark_model": self.landmarks_sum} if has_boxes(file) else sums

    def _sidecar(self, source: Source, sums: dict[str, str], outcome: Outcome) -> dict[str, Any]:
        model = self.labeler.recognizer.model
        return {
            "format_version": FORMAT_VERSION,
            "input": {"path": source.path, "sha256": sums["input"], "bytes": source.size},
            "faces_sha256": sums.get("faces"),
            "landmark_model_sha256": sums.get("landmark_model"),
            **asdict(outcome),
            "model": {
                "name": model.name,
                "folder": self.config.model,
                "sha256": self.model_sum,
                "config_sha256": self.model_config_sum,
            },
            "aus": list(self.aus),
            "config": {**asdict(self.config), "formats": list(self.config.formats)},
            "config_sha256": self.config.fingerprint(),
            "alignment": {"enlarge": ENLARGE, "border": BORDER, "size": model.config.image_size},
            "versions": _versions(),
        }

    def _note(self, path: str, outcome: Outcome, outputs: Outputs | None, kept: bool, log: IO[str]) -> None:
        summary = self.summary
        summary.inputs[outcome.status] += 1
        summary.kept += kept
        if outcome.status not in FINE:
            summary.troubled.append((path, outcome.status, outcome.sentence))
        if not kept:
            summary.frames += outcome.frames["decoded"]
            summary.seconds.update(outcome.seconds)
        whole = outcome.seconds.get("all", 0.0)
        line = {
            "path": path,
            "status": outcome.status,
            "sentence": outcome.sentence,
            "sidecar": None if outputs is None else outputs.sidecar.name,
            "kept": kept,
            "frames": outcome.frames["decoded"],
            "seconds": round(whole, 3),
            "frames_per_second": round(outcome.frames["decoded"] / whole, 2) if whole else None,
        }
        with writing(log.name):
            log.write(json.dumps(line) + "\n")


def _finished(sidecar: Path, config: LabelConfig) -> Outcome | None:
    """What an earlier run wrote, where that is final: what is not whole may be so within other limits."""
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        outcome = from_json(Outcome, {name: facts[name] for name in Outcome.__dataclass_fields__})
        whole = all((sidecar.parent / name).is_file() for name in facts["outputs"])
        limits = all(facts["config"].get(name) == getattr(config, name) for name in LIMITS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = whole and outcome.status in STATUSES and outcome.frames.keys() >= {"decoded", "failed"}
    again = outcome.status in AGAIN or (outcome.status not in FINE and not limits)
    return outcome if whole and not again else None


def _versions() -> dict[str, str]:
    versions = {"aufast": aufast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "dlib", "av", "pillow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
