"""Where the time and memory of `aufast label` go: `python -m benchmarks.labelling [time | memory]`.

`time` labels a generated 640×480 video, the real photograph's face wandering over it, with both models at
their full size (weights untrained: the cost is the same) and prints for each

- the model's part alone, through the labeller and as a bare forward pass of the same batches,
- the seconds of each stage while all run, and the whole run beside the slowest of them.

`memory` labels 2,000 and 20,000 small frames with a small model, landmarks of every tenth coming from a file,
each in a process of its own, and prints the peak resident memory of both runs: of the program, of its
decoder, and the sum.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from aufast.faces import FaceDetector, au_centers
from aufast.label import LabelConfig, Labeler, label_files
from aufast.label.files import Source
from aufast.label.finding import Seen
from aufast.label.video import Frame
from aufast.models import AAR, create_model, to_input

FRAMES = {"margl": 240, "aar": 64}
BATCH = 16


def wandering(count: int, height: int = 480, width: int = 640) -> Iterator[np.ndarray]:
    """Frames with the photograph's face going round in a circle."""
    from skimage import data

    # Head and shoulders: further down the detector takes a part of the suit for a face now and then.
    part = data.astronaut()[:250, 40:400]
    for k in range(count):
        x, y = round(130 + 100 * np.cos(k / 15)), round(110 + 90 * np.sin(k / 15))
        frame = np.full((height, width, 3), 100, np.uint8)
        frame[y : y + len(part), x : x + part.shape[1]] = part
        yield frame


def encode(path: Path, frames: Iterator[np.ndarray]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.pix_fmt = "yuv420p"
        for k, image in enumerate(frames):
            if k == 0:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def measure_time(folder: Path) -> None:
    for name, count in FRAMES.items():
        torch.manual_seed(0)
        create_model(name).save_pretrained(folder / name)
        encode(folder / "video.mp4", wandering(count))
        config = LabelConfig(str(folder / name), batch=BATCH)
        print(f"{name}: {count} frames of 640×480, batches of {BATCH}, {torch.get_num_threads()} threads")
        labeler = Labeler(config)
        stage = labeler.stage()
        seen = list(stage.run(Frame(k, k / 30, image) for k, image in enumerate(wandering(BATCH))))
        assert all(len(frame.faces) == 1 for frame in seen)
        through, bare = alone(labeler, seen)
        print(
            f"  model alone, one thread: {through:.1f} ms a frame, bare forward {bare:.1f} ms, "
            f"{through / bare:.3f} ×"
        )
        start = time.perf_counter()
        with Source(folder / "video.mp4") as source:
            outcome = labeler.label(source, lambda _: [])
        whole = time.perf_counter() - start
        assert outcome.with_face == count, outcome
        seconds = dict(outcome.seconds)
        seconds["faces"] /= config.workers  # summed over the threads
        print(f"  all stages   {1e3 * whole / count:7.1f} ms a frame, {count / whole:.1f} frames/s")
        for part in ("decode", "faces", "model", "write"):
            print(
                f"    {part:<8} {1e3 * seconds[part] / count:9.1f} ms a frame, {seconds[part] / whole:6.1%}"
            )
        slowest = max(seconds[part] for part in ("decode", "faces", "model", "write"))
        print(f"  whole run / slowest stage: {whole / slowest:.3f} ×")
        labeler.close()


def alone(labeler: Labeler, seen: list[Seen]) -> tuple[float, float]:
    """Milliseconds of processor time a frame of the labeller's model part, and of nothing but forward.

    On one thread, taken in turns, of each the best round: what else the machine does counts little.
    """
    recognizer = labeler.recognizer
    model = recognizer.model
    faces = [frame.faces[0].aligned for frame in seen]
    pixels = to_input(np.stack([face.image for face in faces]), model.config)
    centers = np.stack([au_centers(face.landmarks, model.config.aus) for face in faces])
    centers = torch.from_numpy(centers).float()
    bare = (lambda: model(pixels[None])) if isinstance(model, AAR) else (lambda: model(pixels, centers))
    times: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for _ in range(4):
            for run, row in ((lambda: recognizer.predict(seen), times[0]), (bare, times[1])):
                start = time.process_time()
                run()
                row.append(1e3 * (time.process_time() - start) / len(seen))
            recognizer.reset()
    torch.set_num_threads(threads)
    return tuple(min(row) for row in times)


# ---- memory ----------------------------------------------------------------------------------------


def measure_memory(folder: Path) -> None:
    torch.manual_seed(0)
    create_model("aar", aus=(1, 4, 12), image_size=32, width=2).save_pretrained(folder / "small")
    points = FaceDetector().detect(next(wandering(1)))[0].landmarks / 4
    peaks = []
    for count in (2_000, 20_000):
        small = (frame[::4, ::4] for frame in wandering(60))
        frames = list(small)
        encode(folder / f"{count}.mp4", (frames[k % 60] for k in range(count)))
        (folder / "faces").mkdir(exist_ok=True)
        with (folder / "faces" / f"{count}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["frame", "face_id", *(f"{a}{k}" for k in range(49) for a in "xy")])
            writer.writerows([k + 1, 0, *np.round(points.ravel(), 2)] for k in range(0, count, 10))
        command = [sys.executable, "-m", "benchmarks.labelling", "one", str(folder), str(count)]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
        )
        assert found["frames"] == count
        peaks.append(sum(found["peaks"]))
        program, decoder = (peak / 1024 for peak in found["peaks"])
        print(
            f"{count:>6} frames: {program:.1f} MiB at most, {decoder:.1f} MiB of the decoder, "
            f"{program + decoder:.1f} MiB together, {found['seconds']:.0f} s"
        )
    print(f"20,000 / 2,000 frames: {peaks[1] / peaks[0]:.3f} ×")


def one(folder: Path, count: str) -> None:
    """Label one video in this process and print its peak memory, and its decoder's, as JSON."""
    import resource

    torch.set_num_threads(1)
    config = LabelConfig(str(folder / "small"), faces=str(folder / "faces"))
    summary = label_files([str(folder / f"{count}.mp4")], folder / f"out-{count}", config)
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peaks = [resource.getrusage(kind).ru_maxrss for kind in kinds]
    print(json.dumps({"frames": summary.frames, "peaks": peaks, "seconds": summary.seconds["all"]}))


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["one"]:
        return one(Path(arguments[1]), arguments[2])
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments or ["time", "memory"]:
            {"time": measure_time, "memory": measure_memory}[kind](Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
