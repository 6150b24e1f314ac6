"""Runs over many inputs: resuming, shards, kills, outputs that cannot be written, numbers that hold."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from aufast.cli import main
from aufast.faces import FaceDetector, align_face, au_centers, crop_face
from aufast.label import FORMATS, LabelConfig, Labeler, label_files
from aufast.label.files import OutputError, Source, in_shard
from aufast.label.finding import FaceStage, Seen
from aufast.models import AAR, load_model, to_input
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


# ---- what a run does -----------------------------------------------------------------------------


def test_a_folder_is_labelled_and_labelled_once(tmp_path: Path, models: dict[str, str], capsys) -> None:
    inputs, out = folder_of_inputs(tmp_path), tmp_path / "inputs" / "out"
    summary = label_files([str(inputs)], out, config(models["aar"], formats=FORMATS[:3]))
    assert dict(summary.inputs) == {"ok": 2, "no_face": 1} and summary.others == 2
    assert len(list(out.glob("*"))) == 3 * 4 + 1, "three tables and a sidecar each, and the log"
    assert [line["status"] for line in log(out)] == ["ok", "ok", "no_face"]
    before = {p: p.stat().st_mtime_ns for p in out.glob("*-*")}
    again = label_files([str(inputs)], out, config(models["aar"], formats=FORMATS[:3]))
    assert again.kept == 3 and again.frames == 0 and "3 of them by an earlier run" in again.text()
    assert {p: p.stat().st_mtime_ns for p in out.glob("*-*")} == before
    assert re.search(r"clip.mp4': ok, 8 frames, [\d.]+ frames/s", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyError("a mistake"), "undecodable", "unexpected KeyError: 'a mistake'"),
        (MemoryError(), "oom", "labelling it takes more memory than there is"),
    ],
    ids=["mistake", "memory"],
)
def test_an_error_in_one_file_of_a_batch_costs_that_file(
    tmp_path: Path, models: dict[str, str], monkeypatch, error: Exception, status: str, sentence: str
) -> None:
    inputs, find = folder_of_inputs(tmp_path), FaceStage.run

    def failing(self, *args, **kwargs):
        monkeypatch.setattr(FaceStage, "run", find)
        raise error

    monkeypatch.setattr(FaceStage, "run", failing)
    table = Labeler(config(models["aar"]))({"path": np.array([str(inputs / "face.png")] * 2)})
    assert list(table["status"]) == [status, "ok"] and table["sentence"][0] == sentence


@pytest.mark.slow
def test_names_depend_on_all_that_the_numbers_depend_on(tmp_path: Path, models: dict[str, str]) -> None:
    out, image = tmp_path / "out", tmp_path / "a.png"
    Image.fromarray(blank()).save(image)

    def names(**options) -> int:
        label_files([str(image)], out, config(options.pop("model", models["aar"]), **options))
        return len(list(out.glob("a-*.json")))

    assert names() == 1 and names(batch=3) == 1 and names(timeout=9.0) == 1
    assert names(threshold=0.6) == 2 and names(model=models["margl"]) == 3
    Image.fromarray(blank()[1:]).save(image)
    assert names() == 4
    copy = tmp_path / "folder" / "a.png"
    copy.parent.mkdir()
    copy.write_bytes(image.read_bytes())
    label_files([str(copy)], out, config(models["aar"]))
    assert len(list(out.glob("a-*.json"))) == 4, "a copy is known by its content"


def test_the_sidecar_says_how_it_was_made(tmp_path: Path, models: dict[str, str]) -> None:
    import hashlib

    video = encode(tmp_path / "v.mp4", moving(4))
    label_files([str(video)], tmp_path / "out", config(models["aar"], threshold=0.4))
    facts = json.loads(next((tmp_path / "out").glob("v-*.json")).read_text())
    assert facts["input"]["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
    weights = Path(models["aar"], "model.safetensors").read_bytes()
    assert facts["model"]["sha256"] == hashlib.sha256(weights).hexdigest() and facts["model"]["name"] == "aar"
    assert facts["frames"] == {"expected": 4, "decoded": 4, "failed": 0}
    assert (facts["with_face"], facts["faces"], facts["status"]) == (4, 1, "ok")
    assert facts["video"]["codec"] == "h264" and facts["video"]["time_base"] == "1/15360"
    assert facts["config"]["threshold"] == 0.4 and facts["aus"] == [1, 4, 12]
    assert {"aufast", "python", "torch", "numpy", "dlib", "av"} <= facts["versions"].keys()
    assert facts["seconds"].keys() == {"all", "decode", "faces", "model", "write"}


@pytest.mark.parametrize("name", ["aar", "margl"])
def test_probabilities_are_the_models_own(name: str, tmp_path: Path, models: dict[str, str]) -> None:
    """Through decoding, detection and batches of three: those of one call on all the frames."""
    frames = moving(7)
    video = encode(tmp_path / "v.mkv", frames, "ffv1", "bgr0")  # lossless
    label_files([str(video)], tmp_path / "out", config(models[name], batch=3))
    with next((tmp_path / "out").glob("v-*.csv")).open() as file:
        found = np.array(
            [[float(v) for k, v in row.items() if k.endswith("_p")] for row in csv.DictReader(file)]
        )

    model, detector = load_model(models[name]), FaceDetector()
    size, aus = model.config.image_size, model.config.aus
    crops = [crop_face(align_face(f, detector.detect(f)[0].landmarks), size) for f in frames]
    pixels = to_input(np.stack([crop.image for crop in crops]), model.config)
    with torch.inference_mode():
        if isinstance(model, AAR):
            expected = model(pixels[None]).probabilities[0]
        else:
            centers = np.stack([au_centers(crop.landmarks, aus) for crop in crops])
            expected = model(pixels, torch.from_numpy(centers).float()).probabilities
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)
    assert found.std(axis=0).max() > 1e-5, "the model does look at the frames"


@pytest.mark.slow
def test_two_faces_are_two_streams(tmp_path: Path, models: dict[str, str]) -> None:
    """The state of one face is not that of another, and not that of another video."""
    double = [np.hstack([f, f]) for f in moving(5)]
    for name, frames in (("a", double), ("b", moving(5))):
        encode(tmp_path / f"{name}.mkv", frames, "ffv1", "bgr0")
    paths = [str(tmp_path / f"{name}.mkv") for name in "ab"]
    label_files(paths, tmp_path / "out", config(models["aar"], batch=4))
    rows = {p.name[0]: list(csv.DictReader(p.open())) for p in (tmp_path / "out").glob("*.csv")}
    assert len(rows["a"]) == 10 and len(rows["b"]) == 5
    for k, alone in enumerate(rows["b"]):
        pair = [row for row in rows["a"] if row["frame"] == str(k + 1)]
        assert [row["face_id"] for row in pair] == ["0", "1"]
        for row in pair:  # the detector's box may differ by a pixel beside another face
            assert float(row["AU01_p"]) == pytest.approx(float(alone["AU01_p"]), abs=0.02)


@pytest.mark.slow
def test_shards_make_the_whole(tmp_path: Path, models: dict[str, str]) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for k in range(9):
        Image.fromarray(blank()[k:]).save(inputs / f"{k}.png")
    paths = sorted(str(p) for p in inputs.iterdir())
    for path in paths:
        assert sum(in_shard(path, (k, 3)) for k in range(3)) == 1
    one = label_files([str(inputs)], tmp_path / "one", config(models["aar"]))
    parts = [label_files([str(inputs)], tmp_path / "three", config(models["aar"]), (k, 3)) for k in range(3)]
    assert sum(sum(part.inputs.values()) for part in parts) == sum(one.inputs.values()) == 9
    assert tables(tmp_path / "one") == tables(tmp_path / "three")
    assert sorted(p.name for p in (tmp_path / "three").glob("run*")) == [
        f"run-{k}-of-3.jsonl" for k in range(3)
    ]
    for wrong in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="shard must be"):
            label_files([str(inputs)], tmp_path / "one", config(models["aar"]), wrong)


# ---- what goes wrong -----------------------------------------------------------------------------


def run_cli(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "aufast.cli", "label", *arguments, "--workers", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path: Path, models: dict[str, str]) -> None:
    """Killed at several moments; at the end the tables are those of a run that was left alone."""
    inputs = folder_of_inputs(tmp_path)
    encode(inputs / "long.mp4", moving(150))
    label_files([str(inputs)], tmp_path / "alone", config(models["aar"], overlay=True))
    arguments = (str(inputs), "--model", models["aar"], "--out", str(tmp_path / "out"), "--overlay")
    (tmp_path / "out").mkdir()
    unfinished = 0
    for moment in (0.3, 1.0, 2.0):
        process = run_cli(*arguments)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").glob(".*.tmp")) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.kill()
        process.communicate()
        unfinished += bool(list((tmp_path / "out").glob(".*.tmp")))
        whole(tmp_path / "out")
    assert unfinished, "at least one was killed at work"
    out, _ = run_cli(*arguments).communicate()
    assert "4 inputs: 3 ok, 1 no_face" in out
    assert tables(tmp_path / "out") == tables(tmp_path / "alone")
    assert not list((tmp_path / "out").glob(".*.tmp")), "what the killed ones left is gone"
    whole(tmp_path / "out")


@pytest.mark.slow
def test_no_decoder_outlives_a_killed_run(tmp_path: Path, models: dict[str, str]) -> None:
    video = encode(tmp_path / "v.mp4", moving(400))
    process = run_cli(str(video), "--model", models["aar"], "--out", str(tmp_path / "out"))
    children: list[int] = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        time.sleep(0.05)
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(word) for word in text.split()]
    process.kill()
    process.communicate()
    assert children
    while any(Path(f"/proc/{child}/fd/0").exists() for child in children):
        assert time.monotonic() < deadline, "the decoder ends when nobody reads"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_one_sentence(tmp_path: Path, models: dict[str, str]) -> None:
    """A limit on the size of files stands for the disk's end."""
    Image.fromarray(face()).save(tmp_path / "a.png")
    video = encode(tmp_path / "v.mp4", moving(30))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

    arguments = (
        str(tmp_path / "a.png"),
        str(video),
        "--model",
        models["aar"],
        "--out",
        str(tmp_path / "out"),
    )
    process = run_cli(*arguments, "--format", "pyfeat", preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 1
    assert re.search(
        r"^aufast: the labels of .*v\.mp4 cannot be written: File too large; finished files are", err, re.M
    )
    assert "Traceback" not in err
    assert tables(tmp_path / "out").keys() == {"a"} and not list((tmp_path / "out").glob(".*"))
    assert label_files(
        [str(tmp_path / "a.png")], tmp_path / "out", config(models["aar"], formats=("pyfeat",))
    ).kept


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, models: dict[str, str]) -> None:
    Image.fromarray(face()).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file/run.jsonl cannot be written: "):
        label_files([str(tmp_path / "a.png")], tmp_path / "file", config(models["aar"]))
    (tmp_path / "locked").mkdir(mode=0o555)
    model = shutil.copytree(models["aar"], tmp_path / "model")
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.name.startswith(("pytest-", "test_")):
            folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:  # the root user may write everywhere, so become nobody for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(
            (OutputError, ValueError), match="cannot be written: Permission denied|Permission"
        ):
            label_files(
                [str(tmp_path / "a.png")], tmp_path / "locked", config(str(model), faces=str(tmp_path))
            )
    finally:
        os.seteuid(user)
    assert not list((tmp_path / "locked").iterdir())


def test_18_a_file_that_may_not_be_read(tmp_path: Path, models: dict[str, str]) -> None:
    from aufast.label import InputError
    from aufast.label.video import open_regular

    path = tmp_path / "secret.png"
    Image.fromarray(face()).save(path)
    path.chmod(0)
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.name.startswith(("pytest-", "test_")):
            folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(InputError, match="Permission denied"):
            open_regular(path)
    finally:
        os.seteuid(user)


def test_18_a_folder_without_inputs(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="no image or video in .*folder.mp4"):
        label_files([str(tmp_path / "folder.mp4")], tmp_path / "out", config(models["aar"]))


def test_33_a_file_that_grows_while_it_is_read(tmp_path: Path, models: dict[str, str]) -> None:
    path = encode(tmp_path / "v.mkv", moving(6))

    class Growing:
        def add(self, seen: Seen) -> None:
            with path.open("ab") as file:
                file.write(b"more")

        def close(self) -> None:
            pass

    with Source(path) as source:
        outcome = Labeler(config(models["aar"])).label(source, lambda _: [Growing()])
    assert (outcome.status, outcome.sentence) == ("partial", "the file was changed while it was read")
    assert outcome.frames["decoded"] == 6


def test_an_input_that_goes_away_or_is_replaced(tmp_path: Path, models: dict[str, str], monkeypatch) -> None:
    """What was hashed is what is labelled: the file is opened once, whatever becomes of its name."""
    for name in ("a.png", "b.png", "plain.png"):
        Image.fromarray(face()).save(tmp_path / name)
    encode(tmp_path / "v.mp4", moving(4))
    encode(tmp_path / "w.mp4", moving(4))
    read = Source.sum

    def sum(source: Source) -> str:
        found = read(source)
        name = Path(source.path).name
        if name in ("a.png", "v.mp4"):
            Path(source.path).unlink()
        elif name in ("b.png", "w.mp4"):
            (tmp_path / "new").write_bytes(b"something else")
            (tmp_path / "new").replace(source.path)
        return found

    monkeypatch.setattr(Source, "sum", sum)
    summary = label_files([str(tmp_path)], tmp_path / "out", config(models["aar"]))
    assert dict(summary.inputs) == {"ok": 5}
    found = tables(tmp_path / "out")
    assert found["a"] == found["b"] == found["plain"] and found["v"] == found["w"]
    for sidecar in (tmp_path / "out").glob("[ab]-*.json"):
        size = (tmp_path / "plain.png").stat().st_size
        assert json.loads(sidecar.read_text())["input"]["bytes"] == size


def test_an_input_that_is_gone_before_its_turn(tmp_path: Path, models: dict[str, str], monkeypatch) -> None:
    from aufast.label import run

    inputs, find = folder_of_inputs(tmp_path), run.find_inputs

    def find_inputs(paths, out):
        found = find(paths, out)
        (inputs / "face.png").unlink()
        return found

    monkeypatch.setattr(run, "find_inputs", find_inputs)
    summary = label_files([str(inputs)], tmp_path / "out", config(models["aar"]))
    assert dict(summary.inputs) == {"ok": 1, "undecodable": 1, "no_face": 1}
    assert "face.png': there is no such file" in summary.text()


def test_limits_that_ended_an_input_are_not_final(tmp_path: Path, models: dict[str, str]) -> None:
    """Within other limits it is tried again; what is whole is kept within any."""
    Image.fromarray(blank()).save(tmp_path / "a.png")
    paths, out = [str(tmp_path / "a.png")], tmp_path / "out"
    small, large = (config(models["aar"], max_pixels=n) for n in (100, 10**6))
    assert dict(label_files(paths, out, small).inputs) == {"too_large": 1}
    assert label_files(paths, out, small).kept == 1, "the same limits give the same"
    again = label_files(paths, out, large)
    assert dict(again.inputs) == {"no_face": 1} and again.kept == 0
    assert label_files(paths, out, small).kept == 1
    assert len(list(out.glob("a-*.json"))) == 1


def test_another_landmark_model_makes_other_files(tmp_path: Path, models: dict[str, str]) -> None:
    """Unless landmarks are given, which need none."""
    import hashlib

    from aufast.faces import find_landmark_model
    from tests.label.test_faces import points, write_faces

    original, other = find_landmark_model()[0], tmp_path / "other.dat"
    other.write_bytes(original.read_bytes() + b"one byte more")
    Image.fromarray(face()).save(tmp_path / "a.png")
    paths, out = [str(tmp_path / "a.png")], tmp_path / "out"
    assert label_files(paths, out, config(models["aar"])).kept == 0
    assert label_files(paths, out, config(models["aar"], landmarks=str(original))).kept == 1
    assert label_files(paths, out, config(models["aar"], landmarks=str(other))).kept == 0
    sums = {json.loads(p.read_text())["landmark_model_sha256"] for p in out.glob("a-*.json")}
    assert sums == {hashlib.sha256(p.read_bytes()).hexdigest() for p in (original, other)}
    (tmp_path / "faces").mkdir()
    for values, kept in ((points(49).ravel(), 1), ((100, 60, 180, 140), 0)):
        write_faces(tmp_path / "faces" / "a.csv", [[1, 0, *values]], len(values))
        options = {"faces": str(tmp_path / "faces")}
        assert label_files(paths, out, config(models["aar"], **options)).kept == 0
        assert label_files(paths, out, config(models["aar"], landmarks=str(other), **options)).kept == kept


def test_an_input_whose_decoder_hangs_does_not_stop_the_run(
    tmp_path: Path, models: dict[str, str], monkeypatch
) -> None:
    from aufast.label import video

    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(3600)\n")
    monkeypatch.setattr(video, "_DECODER", tmp_path / "hangs.py")
    inputs, out = folder_of_inputs(tmp_path), tmp_path / "out"
    summary = label_files([str(inputs)], out, config(models["aar"], stall=0.5))
    assert dict(summary.inputs) == {"ok": 1, "timeout": 1, "no_face": 1}
    assert "clip.mp4': the decoder gave nothing for 0.5 s after 0 frames" in summary.text()
    monkeypatch.undo()
    again = label_files([str(inputs)], out, config(models["aar"]))
    assert dict(again.inputs) == {"ok": 2, "no_face": 1} and again.kept == 2


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_overlay_videos_keep_time_stamps_with_every_encoder(codec: str, tmp_path: Path, monkeypatch) -> None:
    """PyAV's own build has no libx264 where its licence is not wanted."""
    import av

    from aufast.label import pictures

    monkeypatch.setattr(pictures, "_CODECS", (codec,))
    times = [0.0, 1 / 30, 0.25, 0.3, 1.3, 61.0]
    sink = pictures.OverlayVideo(tmp_path / "o.mp4", (1, 12), LabelConfig("unused", overlay=True))
    for k, (when, image) in enumerate(zip(times, moving(6), strict=True)):
        sink.add(Seen(k, when, image))
    sink.close()
    with av.open(str(tmp_path / "o.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [float(f.pts * f.time_base) for f in frames] == pytest.approx(times, abs=1e-4)
    for found, image in zip(frames, moving(6), strict=True):
        picture = found.to_ndarray(format="rgb24")[:, :480]  # 240 x 320, drawn at 360 x 480
        expected = np.asarray(Image.fromarray(image).resize((480, 360), Image.Resampling.BILINEAR))
        assert np.abs(picture.astype(int) - expected).mean() < 8


@pytest.mark.slow
def test_time_runs_out(tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows until then are kept, and the next run tries again."""
    from aufast.label import labeler

    video, out = encode(tmp_path / "v.mp4", moving(40)), tmp_path / "out"
    clock = itertools.count(0, 1000)  # every look at the clock is long after the one before
    with monkeypatch.context() as patch:
        now = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
        patch.setattr(labeler, "time", now)
        summary = label_files([str(video)], out, config(models["aar"], timeout=2500.0, batch=4))
    assert dict(summary.inputs) == {"timeout": 1} and "the time for it was up after" in summary.text()
    facts = json.loads(next(out.glob("v-*.json")).read_text())
    (table,) = tables(out).values()
    assert 0 < facts["frames"]["decoded"] == table.count(b"\n") - 1 < 40
    assert dict(label_files([str(video)], out, config(models["aar"])).inputs) == {"ok": 1}
    assert next(iter(tables(out).values())).count(b"\n") == 41


@pytest.mark.slow
def test_memory_runs_out(tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are halved until they fit; where one face does not, the input says so and the run goes on."""
    video, out = encode(tmp_path / "v.mp4", moving(10)), tmp_path / "out"
    forward, sizes = AAR.forward, []

    def limited(limit: int):
        def run(self, clips, state=None):
            sizes.append(clips.shape[1])
            if clips.shape[1] > limit:
                raise RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."
                )
            return forward(self, clips, state)

        return run

    label_files([str(video)], tmp_path / "enough", config(models["aar"], batch=8))
    monkeypatch.setattr(AAR, "forward", limited(2))
    assert dict(label_files([str(video)], out, config(models["aar"], batch=8)).inputs) == {"ok": 1}
    assert sizes[:3] == [8, 4, 2] and max(sizes[2:]) == 2
    assert tables(out) == tables(tmp_path / "enough")
    monkeypatch.setattr(AAR, "forward", limited(0))
    Image.fromarray(blank()).save(tmp_path / "a.png")
    paths = [str(video), str(tmp_path / "a.png")]
    summary = label_files(paths, tmp_path / "none", config(models["aar"], batch=8))
    assert dict(summary.inputs) == {"oom": 1, "no_face": 1}
    assert "too little memory for a single face" in summary.text()


def test_numbers_that_are_not_finite_are_no_labels(
    tmp_path: Path, models: dict[str, str], monkeypatch
) -> None:
    forward = AAR.forward

    def broken(self, clips, state=None):
        found = forward(self, clips, state)
        found.probabilities[:, 1:] = float("nan")
        return found

    monkeypatch.setattr(AAR, "forward", broken)
    video = encode(tmp_path / "v.mp4", moving(3))
    faces = given_faces(tmp_path, "v", range(1, 4))
    summary = label_files([str(video)], tmp_path / "out", config(models["aar"], faces=faces))
    (sidecar,) = (tmp_path / "out").glob("v-*.json")
    facts = json.loads(sidecar.read_text())
    # Of three frames the first; of the two that begin anew the first; of the last the first, which is all.
    assert [row["success"] for row in csv.DictReader(sidecar.with_suffix(".csv").open())] == ["1", "0", "1"]
    assert dict(summary.inputs) == {"partial": 1}
    assert facts["sentence"] == "the model gives numbers that are not finite for 1 faces"
    assert facts["warnings"] == ["1 faces are not labelled: the model gives numbers that are not finite"]
    assert "nan" not in sidecar.with_suffix(".csv").read_text()


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_frame_that_is_not_finite_spoils_no_other(
    batch: int, tmp_path: Path, models: dict[str, str], monkeypatch
) -> None:
    """The state after it is lost; the frames after it are those of a clip that begins there."""
    from tests.label.test_faces import points

    forward = AAR.forward
    darker = [(face() * (1 - k / 20)).astype(np.uint8) for k in range(8)]
    video = encode(tmp_path / "v.mkv", darker, "ffv1", "bgr0")

    def poisoned(self, clips, state=None):
        found = forward(self, clips, state)
        for t in ((clips[0] - marked).abs().amax(dim=(1, 2, 3)) < 1e-3).nonzero()[
            :1
        ]:  # if it is in this call
            found.probabilities[:, t:] = float("nan")
            for part in found.state:
                part.fill_(float("nan"))
        return found

    faces = given_faces(tmp_path, "v", range(1, 9), step=0)
    options = config(models["aar"], batch=batch, faces=faces)
    crops = [align_face(f, points(49)) for f in darker]
    model = load_model(models["aar"])
    size = model.config.image_size
    pixels = to_input(np.stack([crop_face(crop, size).image for crop in crops]), model.config)  # (T, 3, S, S)
    marked = pixels[3]
    with torch.inference_mode():
        expected = [model(part[None]).probabilities[0].numpy() for part in (pixels[:3], pixels[4:])]
    monkeypatch.setattr(AAR, "forward", poisoned)
    assert dict(label_files([str(video)], tmp_path / "out", options).inputs) == {"partial": 1}
    rows = list(csv.DictReader(next((tmp_path / "out").glob("v-*.csv")).open()))
    assert [row["success"] for row in rows] == ["1"] * 3 + ["0"] + ["1"] * 4
    found = np.array([[float(row[f"AU{au:02d}_p"]) for au in model.config.aus] for row in rows])
    np.testing.assert_allclose(np.delete(found, 3, axis=0), np.concatenate(expected), atol=2e-6)
    assert not found[3].any()


@pytest.mark.slow
def test_streams_do_not_depend_on_the_batch_when_ids_pause(tmp_path: Path, models: dict[str, str]) -> None:
    """A face that was gone for longer than ids are kept begins anew, in one batch as in many."""
    video = encode(tmp_path / "v.mkv", moving(60, step=0), "ffv1", "bgr0")
    faces = given_faces(tmp_path, "v", (1, 2, 3, 40, 41, 60), step=0)
    found = {}
    for batch in (1, 2, 16, 64):
        label_files([str(video)], tmp_path / str(batch), config(models["aar"], batch=batch, faces=faces))
        (found[batch],) = tables(tmp_path / str(batch)).values()
    assert len(set(found.values())) == 1
    rows = list(csv.DictReader(found[1].decode().splitlines()))
    assert rows[0]["AU01_p"] == rows[39]["AU01_p"] != rows[40]["AU01_p"], "frame 40 is a first one again"
    assert rows[59]["AU01_p"] != rows[0]["AU01_p"], "a pause of 19 frames is none"


@pytest.mark.slow
def test_a_mistake_in_one_input_does_not_stop_the_others(
    tmp_path: Path, models: dict[str, str], monkeypatch, capsys
) -> None:
    inputs, load = folder_of_inputs(tmp_path), Source.image

    def image(source, limit):
        if "face.png" in source.path:
            raise KeyError("a mistake of this program")
        return load(source, limit)

    monkeypatch.setattr(Source, "image", image)
    summary = label_files([str(inputs)], tmp_path / "out", config(models["aar"]))
    assert dict(summary.inputs) == {"ok": 1, "undecodable": 1, "no_face": 1}
    assert "unexpected KeyError" in summary.text() and "Traceback" in capsys.readouterr().err
    monkeypatch.undo()
    assert label_files([str(inputs)], tmp_path / "out", config(models["aar"])).kept == 2, "tried again"


def test_an_averaging_model_has_no_label_for_a_frame(tmp_path: Path) -> None:
    from tests.models.examples import small

    small("aa-gsp-tavg").save_pretrained(tmp_path / "model")
    Image.fromarray(face()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="aa-gsp-tavg averages over a whole clip"):
        label_files([str(tmp_path / "a.png")], tmp_path / "out", config(str(tmp_path / "model")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "roi", "aroi-intra", "b-net", "aa", "aa-gsh", "aa-gsp"])
def test_every_variant_labels_and_draws(name: str, tmp_path: Path) -> None:
    from tests.models.examples import small

    small(name, aus=(2, 25)).double().save_pretrained(tmp_path / "model")
    video = encode(tmp_path / "v.mp4", moving(3))
    options = {"faces": given_faces(tmp_path, "v", range(1, 4)), "overlay": True}
    summary = label_files([str(video)], tmp_path / "out", config(str(tmp_path / "model"), **options))
    assert dict(summary.inputs) == {"ok": 1}
    assert len(list((tmp_path / "out").glob("*.overlay.mp4"))) == 1


def given_faces(tmp_path: Path, stem: str, frames: Iterable[int], step: int = 1) -> str:
    """A folder with the face's landmarks in each of these frames of a clip, so that no detector is needed."""
    from tests.label.test_faces import points, write_faces

    (tmp_path / "faces").mkdir(exist_ok=True)
    rows = [[k, 0, *(points(49) + [step * (k - 1), 0]).ravel()] for k in frames]
    write_faces(tmp_path / "faces" / f"{stem}.csv", rows, 98)
    return str(tmp_path / "faces")


# ---- the command and the class -------------------------------------------------------------------


def test_the_command(tmp_path: Path, models: dict[str, str], capsys) -> None:
    inputs = folder_of_inputs(tmp_path)
    (tmp_path / "list.txt").write_text(f"{inputs / 'face.png'}\n\n{inputs / 'more'}\n")
    arguments = ["label", "--model", models["aar"], "--out", str(tmp_path / "out"), "--workers", "1"]
    assert (
        main(
            [*arguments, "--manifest", str(tmp_path / "list.txt"), "--format", "elan", "--format", "openface"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "2 inputs: 1 ok, 1 no_face" in out and re.search(r"^  model +\d\.\d\d s$", out, re.M)
    assert len(list((tmp_path / "out").glob("*.elan.tsv"))) == 2
    assert main([*arguments, str(tmp_path / "nothing.mp4"), str(inputs / "face.png")]) == 3
    assert "undecodable: " in capsys.readouterr().out
    for wrong in (
        ["--shard", "1"],
        ["--threshold", "2"],
        ["--batch", "0"],
        ["--timeout", "-1"],
        ["--timeout", "inf"],
        ["--stall", "0"],
    ):
        assert main([*arguments, str(inputs), *wrong]) == 1
        assert re.match(
            r"aufast: .*(shard|threshold|batch|timeout|stall)", capsys.readouterr().err.splitlines()[-1]
        )
    assert main(["label", str(inputs), "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "a model folder holds" in capsys.readouterr().err


def flat(table: dict[str, np.ndarray]) -> list[tuple]:
    return sorted(zip(*(map(str, column) for column in table.values()), strict=True))


@pytest.mark.slow
def test_the_labeler_is_a_picklable_function_of_columns(tmp_path: Path, models: dict[str, str]) -> None:
    inputs = folder_of_inputs(tmp_path)
    paths = np.array([str(p) for p in (inputs / "face.png", inputs / "clip.mp4", inputs / "no.mp4")])
    labeler = Labeler(config(models["aar"]))
    whole = labeler({"path": paths})
    assert list(whole)[:5] == ["path", "status", "sentence", "frame", "face_id"]
    assert list(whole["status"]) == ["ok"] * 9 + ["undecodable"]
    assert list(whole["frame"]) == [1, *range(1, 9), 0], "an input without a frame has one row, frame 0"
    assert whole["sentence"][-1] == "there is no such file" and whole["AU12_p"].dtype == np.float64
    copy = pickle.loads(pickle.dumps(labeler))
    assert copy._recognizer is None, "weights do not travel"
    parts = [copy({"path": paths[k : k + 1]}) for k in range(3)]
    assert flat(whole) == sorted(row for part in parts for row in flat(part))
    empty = labeler({"path": paths[:0]})
    assert list(empty) == list(whole) and all(len(column) == 0 for column in empty.values())


@pytest.mark.slow
def test_ray_data_gives_the_same_table(tmp_path: Path, models: dict[str, str]) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        inputs = folder_of_inputs(tmp_path)
        paths = [str(inputs / name) for name in ("face.png", "clip.mp4", "no.mp4")]
        options = config(models["aar"])
        data = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=3)
        labelled = data.map_batches(Labeler, fn_constructor_args=(options,), batch_size=1, concurrency=2)
        found = labelled.take_all()
    finally:
        ray.shutdown()
    expected = Labeler(options)({"path": np.array(paths)})
    assert sorted(tuple(str(row[name]) for name in expected) for row in found) == flat(expected)


def test_threads_end_with_the_labeler(tmp_path: Path, models: dict[str, str]) -> None:
    before = set(threading.enumerate())
    labeler = Labeler(config(models["aar"]))
    labeler({"path": np.array([str(encode(tmp_path / "v.mp4", moving(3)))])})
    labeler.close()
    assert set(threading.enumerate()) <= before
