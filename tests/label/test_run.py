"""Runs over many inputs: what is written, when it is written again, the command and the class."""

from __future__ import annotations

import json
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aufast.cli import main
from aufast.label import FORMATS, LabelConfig, Labeler, label_files
from aufast.label.files import in_shard
from aufast.label.finding import Seen
from tests.label.clips import blank, encode, face, moving
from tests.label.runs import config, folder_of_inputs, given_faces, log, tables


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
@pytest.mark.parametrize("name", ["resnet18", "roi", "aroi-intra", "b-net", "aa", "aa-gsh", "aa-gsp"])
def test_every_variant_labels_and_draws(name: str, tmp_path: Path) -> None:
    from tests.models.examples import small

    small(name, aus=(2, 25)).double().save_pretrained(tmp_path / "model")
    video = encode(tmp_path / "v.mp4", moving(3))
    options = {"faces": given_faces(tmp_path, "v", range(1, 4)), "overlay": True}
    summary = label_files([str(video)], tmp_path / "out", config(str(tmp_path / "model"), **options))
    assert dict(summary.inputs) == {"ok": 1}
    assert len(list((tmp_path / "out").glob("*.overlay.mp4"))) == 1


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
