"""What the tests of runs share: inputs, the command, and what a run leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from aufast.label import LabelConfig
from tests.label.clips import blank, encode, face, moving


def config(model: str, **options) -> LabelConfig:
    return LabelConfig(model, **{"workers": 1, **options})


def folder_of_inputs(root: Path) -> Path:
    """Two images and a video, and what is none of the run's business."""
    inputs = root / "inputs"
    (inputs / "more").mkdir(parents=True)
    Image.fromarray(face()).save(inputs / "face.png")
    Image.fromarray(blank()).save(inputs / "more" / "blank.JPG")
    encode(inputs / "clip.mp4", moving(8))
    (inputs / "notes.txt").write_text("not an input")
    (inputs / ".hidden.png").write_bytes(b"")
    return inputs


def tables(out: Path, suffix: str = ".csv") -> dict[str, bytes]:
    return {p.name.rsplit("-", 1)[0]: p.read_bytes() for p in sorted(out.glob(f"*{suffix}"))}


def log(out: Path, name: str = "run.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def whole(out: Path) -> None:
    """No unfinished file under a final name."""
    for sidecar in out.glob("*-*.json"):
        facts = json.loads(sidecar.read_text())
        for name in facts["outputs"]:
            assert (out / name).is_file()
        if sidecar.with_suffix(".csv").exists():
            lines = sidecar.with_suffix(".csv").read_text().splitlines()
            assert len(lines) == 1 + facts["frames"]["decoded"]


def run_cli(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "aufast.cli", "label", *arguments, "--workers", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def given_faces(tmp_path: Path, stem: str, frames: Iterable[int], step: int = 1) -> str:
    """A folder with the face's landmarks in each of these frames of a clip, so that no detector is needed."""
    from tests.label.test_faces import points, write_faces

    (tmp_path / "faces").mkdir(exist_ok=True)
    rows = [[k, 0, *(points(49) + [step * (k - 1), 0]).ravel()] for k in frames]
    write_faces(tmp_path / "faces" / f"{stem}.csv", rows, 98)
    return str(tmp_path / "faces")
