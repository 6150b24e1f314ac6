"""Where the time and memory of `aufast label` go.

    python -m benchmarks.labelling [time | memory] [--save RECORD.json]

The video is generated: 640×480, the real photograph's head and shoulders going round in a circle.

`time` labels it with both models at their full size and prints for each

- what a frame costs in the labeller's model part alone, beside what `make bench` times of the same batch,
- the seconds of each stage while all run, and the whole run beside the slowest of them.

`memory` labels 2,000 and 20,000 of these frames with a small model, their landmarks coming from a file, each
video in a process of its own, and prints the highest resident memory of the program and of its decoder.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aufast.faces import FaceDetector
from aufast.label import LabelConfig, Labeler, label_files
from aufast.label.files import Source
from aufast.label.video import Frame
from aufast.models import create_model
from benchmarks import models
from benchmarks.harness import THREADS
from benchmarks.memory import resident

FRAMES = {"margl": 240, "aar": 96}
LENGTHS = (2_000, 20_000)
BATCH = 16
ROUNDS = {"margl": 12, "aar": 6}
STAGES = ("decode", "faces", "model", "write")
AT_MOST = {"model_over_bench": 1.1, "run_over_slowest": 1.15, "memory_ratio": 1.1}  # the targets


def place(k: int) -> tuple[int, int]:
    """Where the upper left corner of the photograph's part lies in frame k."""
    return round(130 + 100 * np.cos(k / 15)), round(110 + 90 * np.sin(k / 15))


def wandering(count: int, height: int = 480, width: int = 640) -> Iterator[np.ndarray]:
    """Frames with the photograph's face going round in a circle."""
    from skimage import data

    # Head and shoulders: further down the detector takes a part of the suit for a face now and then.
    part = data.astronaut()[:250, 40:400]
    for k in range(count):
        x, y = place(k)
        frame = np.full((height, width, 3), 100, np.uint8)
        frame[y : y + len(part), x : x + part.shape[1]] = part
        yield frame


def encode(path: Path, frames: Iterable[np.ndarray]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.pix_fmt = "yuv420p"
        for k, image in enumerate(frames):
            if k == 0:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


# ---- time ------------------------------------------------------------------------------------------


def measure_time(folder: Path) -> dict[str, dict[str, float]]:
    found = {}
    for name, count in FRAMES.items():
        models.trained(name).save_pretrained(folder / name)
        encode(folder / "video.mp4", wandering(count))
        config = LabelConfig(str(folder / name), batch=BATCH)
        print(f"{name}: {count} frames of 640×480, batches of {BATCH}, {torch.get_num_threads()} threads")
        labeler = Labeler(config)
        found[name] = {"frames": count, **alone(labeler, name), **together(labeler, folder, count)}
        labeler.close()
    return found


def alone(labeler: Labeler, name: str) -> dict[str, float]:
    """Milliseconds a frame of the labeller's model part, and of `make bench`'s own call, taken in turns."""
    frames = (Frame(k, k / 30, image) for k, image in enumerate(wandering(BATCH)))
    seen = list(labeler.stage().run(frames))
    assert all(len(frame.faces) == 1 for frame in seen)
    recognizer = labeler.recognizer
    bench = models.work(models.Run(models.infer(name, BATCH), torch.float32, "cpu"))
    calls: dict[str, Callable[[], object]] = {
        "model_ms": lambda: recognizer.predict(seen),
        "bench_ms": bench,
    }
    times: dict[str, list[float]] = {key: [] for key in calls}
    for k in range(1 + ROUNDS[name]):
        for key, call in calls.items():
            recognizer.reset()
            start = time.perf_counter()
            call()
            times[key] += [1e3 * (time.perf_counter() - start) / BATCH] if k else []  # the first warms up
    found = {key: statistics.median(row) for key, row in times.items()}
    found["model_over_bench"] = found["model_ms"] / found["bench_ms"]
    print(
        f"  model alone {found['model_ms']:.1f} ms a frame, in `make bench` {found['bench_ms']:.1f} ms: "
        f"{found['model_over_bench']:.3f} × (at most {AT_MOST['model_over_bench']})"
    )
    return found


def together(labeler: Labeler, folder: Path, count: int) -> dict[str, Any]:
    """A whole run, and each stage while all run."""
    start = time.perf_counter()
    with Source(folder / "video.mp4") as source:
        outcome = labeler.label(source, lambda _: [])
    whole = time.perf_counter() - start
    assert outcome.with_face == count, outcome
    seconds = dict(outcome.seconds)
    seconds["faces"] /= labeler.config.workers  # summed over the threads
    stages = {part: 1e3 * seconds[part] / count for part in STAGES}
    ratio = whole / max(seconds[part] for part in STAGES)
    print(f"  all stages {1e3 * whole / count:10.1f} ms a frame, {count / whole:.1f} frames/s")
    for part, each in stages.items():
        print(f"    {part:<8} {each:10.1f} ms a frame, {seconds[part] / whole:6.1%}")
    print(f"  whole run / slowest stage: {ratio:.3f} × (at most {AT_MOST['run_over_slowest']})")
    return {
        "all_ms": 1e3 * whole / count,
        "frames_per_second": count / whole,
        "stages_ms": stages,
        "run_over_slowest": ratio,
    }


# ---- memory ----------------------------------------------------------------------------------------


def measure_memory(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    create_model("aar", aus=(1, 4, 12), image_size=32, width=2).save_pretrained(folder / "small")
    points = FaceDetector().detect(next(wandering(1)))[0].landmarks
    runs = []
    for count in LENGTHS:
        encode(folder / f"{count}.mp4", itertools.islice(itertools.cycle(wandering(94)), count))
        write_faces(folder / "faces", count, points)
        command = [sys.executable, "-m", "benchmarks.labelling", "one", str(folder), str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["frames"] == found["with_face"] == count, found
        found["together_mib"] = found["program_mib"] + found["decoder_mib"]
        runs.append(found)
        print(
            f"{count:>6} frames: {found['program_mib']:.1f} MiB at most, its decoder "
            f"{found['decoder_mib']:.1f}, together {found['together_mib']:.1f}; {found['seconds']:.0f} s"
        )
    ratio = runs[1]["together_mib"] / runs[0]["together_mib"]
    print(f"20,000 / 2,000 frames: {ratio:.3f} × (at most {AT_MOST['memory_ratio']})")
    return {"runs": runs, "memory_ratio": ratio}


def write_faces(folder: Path, count: int, points: np.ndarray) -> None:
    """The face's landmarks in every frame of a video, as `--faces` takes them."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{count}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frame", "face_id", *(f"{axis}{k}" for k in range(49) for axis in "xy")])
        for k in range(count):
            moved = points + np.subtract(place(k % 94), place(0))
            writer.writerow([k + 1, 0, *np.round(moved.ravel(), 2)])


def one(folder: Path, count: str) -> None:
    """Label one video in this process and print its peak memory, and its decoder's, as JSON."""
    torch.set_num_threads(1)
    config = LabelConfig(str(folder / "small"), faces=str(folder / "faces"))
    out = folder / f"out-{count}"
    with DecoderMemory() as decoder:
        summary = label_files([str(folder / f"{count}.mp4")], out, config)
    (sidecar,) = out.glob("*-*.json")
    found = {
        "frames": summary.frames,
        "with_face": json.loads(sidecar.read_text())["with_face"],
        "program_mib": resident("VmHWM") / 2**20,
        "decoder_mib": decoder.peak / 2**20,
        "seconds": summary.seconds["all"],
    }
    print(json.dumps(found))


class DecoderMemory:
    """The highest resident memory of any process that this one starts, read while it runs.

    What the system says of ended children counts their parent's memory too, which they share until they
    begin their own program.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DecoderMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            for children in Path("/proc/self/task").glob("*/children"):
                for process in children.read_text().split():
                    try:
                        own = Path(f"/proc/{process}/cmdline").read_bytes().find(b"decoder.py") > 0
                        self.peak = max(self.peak, resident("VmHWM", process) if own else 0)
                    except (OSError, RuntimeError):  # it has just ended
                        continue


# ---- the command -----------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["one"]:
        return one(Path(arguments[1]), arguments[2])
    measures = {"time": measure_time, "memory": measure_memory}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.labelling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("what", nargs="?", choices=[*measures], help="both where none is named")
    parser.add_argument(
        "--save", metavar="FILE", type=Path, help="a record, in which what is not measured stays"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in [options.what] if options.what else measures:
            found[kind] = measures[kind](Path(folder))
    if options.save:
        save(options.save, found)


def save(path: Path, found: dict[str, Any]) -> None:
    """Write a record; parts of an earlier one at the same place stay where they were not measured anew."""
    from benchmarks.gpu import about

    head = about("cpu")
    versions = {name: metadata.version(name) for name in ("dlib", "av", "numpy")}
    head["versions"] |= versions
    earlier = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: earlier[key] for key in ("time", "memory") if key in earlier}
    parts = {key: {"commit": head["commit"], "date": head["date"], **value} for key, value in found.items()}
    what = "aufast label on a generated 640x480 video, by python -m benchmarks.labelling"
    path.write_text(json.dumps({"about": what, **head, **kept, **parts}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
