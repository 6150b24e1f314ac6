"""Inputs that cannot be read, change, take too long or too much: each costs itself alone."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from aufast.label import Labeler, label_files
from aufast.label.files import Source
from aufast.label.finding import FaceStage, Seen
from aufast.models import AAR
from tests.label.clips import blank, encode, face, moving
from tests.label.runs import config, folder_of_inputs, tables


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
