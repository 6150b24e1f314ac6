"""One input in, its labels out: the unit that a run, a Ray cluster or a script calls."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aufast.label.config import LIMITS, InputError, LabelConfig
from aufast.label.files import OutputError, Source, writing
from aufast.label.finding import AHEAD, FaceStage, Seen
from aufast.label.given import GivenFaces, faces_file
from aufast.label.recognizing import NOT_FINITE, Recognizer
from aufast.label.tables import Sink, columns, rows
from aufast.label.video import Frame, VideoReader
from aufast.models import load_model

OpenSinks = Callable[[bool], Sequence[Sink]]


@dataclass
class Outcome:
    """What became of an input.

    Attributes:
        status: one of `STATUSES`.
        sentence: why, where it is not "ok".
        frames: expected (None where the file does not say), decoded and failed.
        with_face: frames in which a face was labelled.
        faces: different face ids.
        warnings: sentences about what is odd.
        video: codec, container, time base and rotation of a video.
        seconds: by stage, and in all.
    """

    status: str = "ok"
    sentence: str = ""
    frames: dict[str, int | None] = field(
        default_factory=lambda: {"expected": None, "decoded": 0, "failed": 0}
    )
    with_face: int = 0
    faces: int = 0
    warnings: list[str] = field(default_factory=list)
    video: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def unexpected(cls, error: Exception) -> Outcome:
        """Of an input that a mistake of this program ended.

        Args:
            error: what was raised; its traceback is printed.

        Returns:
            "undecodable", with the error's name and message.
        """
        traceback.print_exception(error)
        return cls("undecodable", f"unexpected {type(error).__name__}: {error}", seconds={"all": 0.0})


class Labeler:
    """Labels images and videos. Can be pickled; the model and the detectors are loaded at the first use.

    As a callable it takes and returns columns, so it runs unchanged in Ray Data's `map_batches`.

    Args:
        config: what to do; its tables, overlays and report are the business of `aufast.label.run`.
    """

    def __init__(self, config: LabelConfig):
        self.config = config
        self._recognizer: Recognizer | None = None
        self._stage: FaceStage | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "_recognizer": None, "_stage": None}

    def close(self) -> None:
        """End the threads; the next use starts them again."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    @property
    def recognizer(self) -> Recognizer:
        """The model, loaded."""
        if self._recognizer is None:
            config = self.config
            self._recognizer = Recognizer(
                load_model(config.model),
                config.batch,
                config.device,
                config.dtype,
                keep_regions=config.overlay or config.report,
            )
        return self._recognizer

    @property
    def aus(self) -> tuple[int, ...]:
        """The model's action units."""
        return self.recognizer.model.config.aus

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Label the files of a batch.

        Args:
            batch: "path", an array of file names.

        Returns:
            A row for every frame and face, or one for an input without a frame, as columns: "path", "status",
            "sentence", and those of the OpenFace table.
        """
        names = ["path", "status", "sentence", *columns(self.aus, self.config)]
        table: list[list[Any]] = []
        for path in batch["path"]:
            kept: list[list[Any]] = []
            try:
                with Source(str(path)) as source:
                    outcome = self.label(source, lambda _, kept=kept: [_Rows(kept, self.aus, self.config)])
            except InputError as error:
                outcome = Outcome(error.status, str(error))
            except (OutputError, ImportError):
                raise
            except Exception as error:  # a mistake here must not cost the other files
                kept.clear()
                outcome = Outcome.unexpected(error)
            nothing = rows(Seen(-1, None, None), self.aus, self.config)
            table += [[str(path), outcome.status, outcome.sentence, *row] for row in kept or nothing]
        cells = list(zip(*table, strict=True)) or [()] * len(names)
        return {name: _column(name, values) for name, values in zip(names, cells, strict=True)}

    def label(
        self,
        source: Source,
        open_sinks: OpenSinks,
        progress: Callable[[int], None] = lambda frames: None,
    ) -> Outcome:
        """Label one image or video.

        Args:
            source: the open file.
            open_sinks: called with whether the input is an image once its first frame is labelled; gives what
                takes the frames. They are closed here.
            progress: called with the number of frames done.

        Returns:
            What became of it; a bad input raises nothing.

        Raises:
            OutputError: a sink cannot write.
        """
        start = time.perf_counter()
        outcome = Outcome()
        job = _Job(self, source, open_sinks, progress, outcome)
        try:
            job.run()
        except InputError as error:
            outcome.status, outcome.sentence = error.status, str(error)
        except MemoryError:
            outcome.status, outcome.sentence = "oom", "labelling it takes more memory than there is"
        finally:
            job.close()
        if outcome.status == "ok" and not outcome.with_face:
            outcome.status = "no_face"
            outcome.sentence = "no face can be labelled" if job.troubles else "no face was found"
        outcome.seconds["all"] = time.perf_counter() - start
        return outcome

    def stage(self) -> FaceStage:
        """The threads that find faces."""
        if self._stage is None:
            self._stage = FaceStage(self.config, self.recognizer.model.config.image_size)
        return self._stage


class _Job:
    """Labelling one input."""

    def __init__(self, labeler: Labeler, source: Source, open_sinks: OpenSinks, progress, outcome: Outcome):
        self.labeler, self.source, self.open_sinks = labeler, source, open_sinks
        self.progress, self.outcome = progress, outcome
        self.config = labeler.config
        self.sinks: list[Sink] | None = None
        self.ids: set[int] = set()
        self.troubles: dict[str, int] = {}
        self.not_finite = 0
        self.started = time.monotonic()
        self.writing = 0.0

    def run(self) -> None:
        image, animated = self.source.is_image(self.config.max_pixels)
        if animated:
            self.outcome.warnings.append("it is an animation; its first frame is labelled")
        given = self._given()
        if image:
            self._label(self._image(), given, image=True)
        else:
            limits = {name: getattr(self.config, name) for name in LIMITS}
            with VideoReader(self.source.file, **limits) as reader:
                try:
                    # Closed first, the reader ends the thread that waits for a frame.
                    self._label(reader, given, image=False, last=reader.close)
                finally:
                    self._note(reader)
        decoded = self.outcome.frames["decoded"]
        if given is not None and given.last > decoded:
            self.outcome.warnings.append(
                f"the file of faces goes on to frame {given.last}, the input ends with frame {decoded}"
            )
        if self.not_finite:
            self._lose(f"{NOT_FINITE} for {self.not_finite} faces")
        if self.source.is_changed():
            self._lose("the file was changed while it was read")

    def _note(self, reader: VideoReader) -> None:
        """Take over what the decoder found."""
        finding, outcome = reader.finding, self.outcome
        outcome.frames |= {"expected": finding.expected, "failed": finding.failed}
        outcome.video, outcome.seconds["decode"] = finding.video or None, finding.seconds
        outcome.warnings += finding.warnings
        if finding.status != "ok":
            outcome.status, outcome.sentence = finding.status, finding.sentence

    def _lose(self, sentence: str) -> None:
        outcome = self.outcome
        outcome.status = "partial" if outcome.status == "ok" else outcome.status
        outcome.sentence = "; ".join(filter(None, (outcome.sentence, sentence)))

    def _image(self) -> Iterator[Frame]:
        start = time.perf_counter()
        image = self.source.image(self.config.max_pixels)
        self.outcome.frames["expected"] = 1
        self.outcome.seconds["decode"] = time.perf_counter() - start
        yield Frame(0, 0.0, image)

    def _given(self) -> GivenFaces | None:
        if self.config.faces is None:
            return None
        return GivenFaces(faces_file(self.config.faces, self.source.path), self.config.one_based)

    def _label(
        self, frames: Iterable[Frame], given, image: bool, last: Callable[[], None] = lambda: None
    ) -> None:
        labeler, stage = self.labeler, self.labeler.stage()
        recognizer = labeler.recognizer
        recognizer.reset()
        stage.seconds = 0.0
        seen_frames = stage.run(frames, given)
        pending: list[Seen] = []
        faces = size = 0
        try:
            for seen in seen_frames:
                pending.append(seen)
                faces += sum(face.aligned is not None for face in seen.faces)
                size += 0 if seen.image is None else seen.image.nbytes
                # Frames without a face cost nothing, but they are not to be kept for ever.
                if faces >= recognizer.batch or len(pending) >= 4 * recognizer.batch or size >= AHEAD:
                    self._flush(pending, image)
                    pending, faces, size = [], 0, 0
            self._flush(pending, image)
        finally:
            last()
            seen_frames.close()
            self.outcome.seconds |= {
                "faces": stage.seconds,
                "model": recognizer.seconds,
                "write": self.writing,
            }

    def _flush(self, pending: list[Seen], image: bool) -> None:
        if not pending:
            return
        self.labeler.recognizer.predict(pending)
        start = time.perf_counter()
        with writing(f"the labels of {self.source.path}"):
            if self.sinks is None:
                self.sinks = list(self.open_sinks(image))
            for seen in pending:
                self._count(seen)
                for sink in self.sinks:
                    sink.add(seen)
        self.writing += time.perf_counter() - start
        self.progress(self.outcome.frames["decoded"])
        if self.config.timeout and time.monotonic() - self.started > self.config.timeout:
            raise InputError(
                "timeout", f"the time for it was up after {self.outcome.frames['decoded']} frames"
            )

    def _count(self, seen: Seen) -> None:
        self.outcome.frames["decoded"] += 1
        labelled = [face for face in seen.faces if face.probabilities is not None]
        self.outcome.with_face += bool(labelled)
        self.ids.update(face.face_id for face in labelled)
        for face in seen.faces:
            self.not_finite += face.trouble == NOT_FINITE
            if face.trouble:
                self.troubles[face.trouble] = self.troubles.get(face.trouble, 0) + 1

    def close(self) -> None:
        """Close what takes the frames and write down what was counted."""
        with writing(f"the labels of {self.source.path}"), contextlib.ExitStack() as stack:
            for sink in self.sinks or ():
                stack.callback(sink.close)
        self.outcome.faces = len(self.ids)
        self.outcome.warnings += [
            f"{count} faces are not labelled: {why}" for why, count in sorted(self.troubles.items())
        ]


class _Rows:
    """Keeps a table's rows in memory."""

    def __init__(self, kept: list[list[Any]], aus: Sequence[int], config: LabelConfig):
        self._kept, self._aus, self._config = kept, aus, config

    def add(self, seen: Seen) -> None:
        self._kept += rows(seen, self._aus, self._config)

    def close(self) -> None:
        pass


def _column(name: str, values: Sequence[Any]) -> np.ndarray:
    if name in ("path", "status", "sentence"):
        return np.array(values, dtype=object if not values else None)
    if name in ("frame", "face_id", "success") or name.endswith("_c"):
        return np.array(values, np.int64)
    return np.array([np.nan if value is None else value for value in values], np.float64)
