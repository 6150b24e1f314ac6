"""One HTML page a video: timelines, a strip of frames, the chosen frame with its overlay. Works offline."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aufast.aus import AU_NAMES
from aufast.label.config import LabelConfig
from aufast.label.finding import Seen
from aufast.label.pictures import overlay

FRAMES = 120  # pictures a page holds at most; longer videos keep every second one, every fourth, ...
POINTS = 4000  # points of a timeline at most; of longer videos a point is the largest value of its frames
_THUMB = 64  # pixels high
_TEMPLATE = Path(__file__).with_name("report.html")


class ReportPage:
    """Collects what the page shows, in memory that does not grow with the video. Needs the extra `report`.

    Args:
        path: the file to write.
        aus: the model's AUs.
        config: of the run.
        title: of the page.
        facts: short phrases under the title.
    """

    def __init__(self, path: Path, aus: Sequence[int], config: LabelConfig, title: str, facts: Sequence[str]):
        try:
            from plotly.offline import get_plotlyjs
        except ImportError as error:
            raise ImportError("--report needs plotly: pip install 'aufast[report]'") from error
        self._script = get_plotlyjs()
        self._path, self._aus, self._config = path, aus, config
        self._title, self._facts = title, list(facts)
        self._frames: list[dict[str, Any]] = []
        self._every = 1  # frames between two pictures
        self._points: list[_Point] = []
        self._step = 1  # frames of a point
        self._count = 0

    def add(self, seen: Seen) -> None:
        """Take a frame."""
        self._count += 1
        if seen.index % self._every == 0:
            self._frames.append(self._picture(seen))
            if len(self._frames) > FRAMES:
                self._every *= 2
                self._frames = [frame for frame in self._frames if frame["index"] % self._every == 0]
        values = {f.face_id: f.probabilities for f in seen.faces if f.probabilities is not None}
        point = _Point(seen.index // self._step, seen.index, seen.time, values)
        if self._points and self._points[-1].bin == point.bin:
            self._points[-1].merge(point)
        else:
            self._points.append(point)
        if len(self._points) > POINTS:
            self._step *= 2
            points, self._points = self._points, []
            for point in points:
                point.bin //= 2
                if self._points and self._points[-1].bin == point.bin:
                    self._points[-1].merge(point)
                else:
                    self._points.append(point)

    def _picture(self, seen: Seen) -> dict[str, Any]:
        from PIL import Image

        image = Image.fromarray(seen.image)
        image.thumbnail((4 * _THUMB, _THUMB))
        when = "" if seen.time is None else f", {seen.time:.2f} s"
        faces = [
            {"id": face.face_id, "p": [round(float(p), 3) for p in face.probabilities]}
            for face in seen.faces
            if face.probabilities is not None
        ]
        return {
            "index": seen.index,
            "time": seen.time,
            "name": f"frame {seen.index + 1}{when}",
            "faces": faces,
            "thumb": _jpeg(image, 60),
            "picture": _jpeg(Image.fromarray(overlay(seen, self._aus, self._config)), 75),
        }

    def close(self) -> None:
        """Write the page."""
        if not self._points:
            return
        timed = all(p.time is not None for p in self._points) and all(
            f["time"] is not None for f in self._frames
        )
        ids = sorted({name for point in self._points for name in point.values})
        facts = [*self._facts, f"{self._count:,} frames"]
        if self._step > 1:
            facts.append(f"each point is the largest of {self._step} frames")
        if self._every > 1:
            facts.append(f"one frame in {self._every} is shown")
        data = {
            "facts": facts,
            "aus": list(self._aus),
            "names": [AU_NAMES[au] for au in self._aus],
            "threshold": self._config.threshold,
            "axis": "seconds" if timed else "frame",
            "times": [round(p.time, 4) if timed else p.index + 1 for p in self._points],
            "faces": [{"id": name, "p": self._timeline(name)} for name in ids],
            "frames": [{**f, "x": round(f["time"], 4) if timed else f["index"] + 1} for f in self._frames],
        }
        # Within a script element only `</` could end it, and JSON may write it as `<\/`.
        encoded = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
        page = _TEMPLATE.read_text(encoding="utf-8")
        filled = {"title": html.escape(self._title), "plotly": self._script, "data": encoded}
        with open(self._path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            for k, part in enumerate(page.split("{{")):
                name, _, rest = part.partition("}}") if k else ("", "", part)
                file.write(filled[name] + rest if k else rest)

    def _timeline(self, face_id: int) -> list[list[float | None]]:
        """A face's probabilities, a list an AU; None where it is not there."""
        nothing = np.full(len(self._aus), np.nan)
        table = np.array([point.values.get(face_id, nothing) for point in self._points])  # (n, m)
        return [[None if math.isnan(v) else round(float(v), 3) for v in column] for column in table.T]


class _Point:
    """The largest probabilities of some frames in a row."""

    def __init__(self, bin: int, index: int, time: float | None, values: dict[int, np.ndarray]):
        self.bin, self.index, self.time, self.values = bin, index, time, values

    def merge(self, other: _Point) -> None:
        for name, p in other.values.items():
            self.values[name] = np.maximum(self.values[name], p) if name in self.values else p


def _jpeg(image, quality: int) -> str:
    """An image as a data address."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
