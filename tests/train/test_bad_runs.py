"""What a run may meet: each is a sentence, and nothing half-written is taken for whole."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from aufast.train import checkpoint, train
from aufast.train.checkpoint import load_checkpoint
from aufast.train.loop import SKIPS, Trainer
from aufast.train.objectives import RegionObjective
from tests.disks import run_on_disk
from tests.train.runs import MAKERS, metrics, outcome


def last(run):
    return load_checkpoint(run / "last")


def test_a_loss_that_is_no_number_names_its_frames_and_keeps_the_last_checkpoint(
    packed, tmp_path, monkeypatch
):
    inner, seen = RegionObjective.forward, []

    def forward(self, batch, counts):
        seen.append(batch)
        loss = inner(self, batch, counts)
        return loss * math.nan if len(seen) == 10 else loss

    monkeypatch.setattr(RegionObjective, "forward", forward)
    config = MAKERS["margl"](packed, stage={"accumulate": 2, "batch": 4})
    with pytest.raises(
        ValueError, match=r"step 5: the loss is nan; the step is not taken and \S+last is kept"
    ) as error:
        train(config, tmp_path / "run")
    names = re.findall(r"([FM]\d{3}_T1) from frame (\d+)", str(error.value))
    trainer_videos = Trainer(config, tmp_path / "other", _alone()).split.train
    expected = [
        (trainer_videos[v].name, str(trainer_videos[v].numbers[f]))
        for v, f in zip(seen[9]["video"].tolist(), seen[9]["frame"].tolist(), strict=True)
    ]
    assert names == expected and len(names) == 4
    model, _, position = last(tmp_path / "run")
    assert position.step == 3
    assert all(value.isfinite().all() for value in model.state_dict().values())
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True)


def _alone():
    from aufast.train.processes import Processes

    return Processes(0, 1, torch.device("cpu"))


def test_a_gradient_that_is_no_number_stops_the_run_too(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda tensors: torch.tensor(math.inf))
    with pytest.raises(ValueError, match="step 1: the gradient's norm is inf; the step is not taken"):
        train(MAKERS["aar"](packed), tmp_path / "run")


@pytest.mark.parametrize("bad", [4, SKIPS])
def test_float16_steps_may_be_left_out_but_not_for_ever(packed, tmp_path, monkeypatch, bad):
    """The scaler halves its scale and goes on; what is no number at any scale stops the run."""
    inner, seen = RegionObjective.forward, []

    def forward(self, batch, counts):
        seen.append(batch)
        loss = inner(self, batch, counts)
        if len(seen) <= bad:  # a finite loss, and a gradient that is NaN
            weight = next(p for p in self.parameters() if p.requires_grad)
            loss = loss + (weight - weight.detach()).abs().sum().sqrt() * 0
        return loss

    monkeypatch.setattr(RegionObjective, "forward", forward)
    config = MAKERS["margl"](packed, batch=6, precision="float16", device="cpu")
    if bad < SKIPS:
        assert train(config, tmp_path / "run")
        assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line)
        return
    with pytest.raises(
        ValueError, match=rf"step {SKIPS}: the gradient's norm is nan, in {SKIPS} steps in a row; "
    ):
        train(config, tmp_path / "run")
    assert len(seen) == SKIPS
    assert all(value.isfinite().all() for value in last(tmp_path / "run")[0].state_dict().values())


@pytest.mark.parametrize(
    ("system", "precision"),
    [
        ("aar", "bfloat16"),
        ("margl", "float16"),
        pytest.param("margl", "bfloat16", marks=pytest.mark.slow),
        pytest.param("aar", "float16", marks=pytest.mark.slow),
    ],
)
def test_low_precision_trains(packed, tmp_path, system, precision):
    """Near float32's losses, yet not the same; weights stay float32."""
    curves = {}
    for name in ("float32", precision):
        assert train(MAKERS[system](packed, precision=name, device="cpu"), tmp_path / name)
        curves[name] = torch.tensor([line["loss"] for line in metrics(tmp_path / name) if "loss" in line])
    first = (curves[precision][:3] - curves["float32"][:3]).abs() / curves["float32"][:3]
    assert 0 < first.max() < 0.05
    assert curves[precision].isfinite().all()
    tensors = last(tmp_path / precision)[0].state_dict().values()
    assert {value.dtype for value in tensors if value.is_floating_point()} == {torch.float32}


def test_a_full_disk_keeps_the_last_checkpoint(packed, tmp_path, monkeypatch):
    config = MAKERS["margl"](packed)
    inner, calls = checkpoint.write_whole, []

    def full(path, data):
        calls.append(path)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return inner(path, data)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(
        OSError, match=r"run: cannot be written: No space left on device; \S+last is as it was"
    ):
        train(config, tmp_path / "run")
    assert last(tmp_path / "run")[2].step == 3
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1, "nothing half-written stays"
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True)


FILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from aufast.train import train
from aufast.train.checkpoint import load_checkpoint
from aufast.train.run import Log
from tests.train.runs import MAKERS, outcome

packed, disk, moment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config, inner = MAKERS["margl"](packed), Log.write
assert train(config, disk / "whole")

def write(self, step, values):
    if step == moment:
        with open(disk / "others", "wb", buffering=0) as file:
            try:
                while file.write(bytes(512)):
                    pass
            except OSError:
                pass
    inner(self, step, values)

Log.write = write
try:
    train(config, disk / "run")
except OSError as error:
    print(error)
Log.write = inner
print(load_checkpoint(disk / "run" / "last")[2].step, *disk.glob("run/checkpoints/.*"))
(disk / "others").unlink()
assert train(config, disk / "run", resume=True)
print(outcome(disk / "run") == outcome(disk / "whole"))
"""


def test_a_disk_that_is_full_from_a_random_step_on(packed, tmp_path):
    """Measurements fail, or the next checkpoint does, three steps after the last one at most."""
    moment = random.Random().randrange(4, 22)
    sentence, step, same = run_on_disk("size=16m", tmp_path, FILLED, packed, tmp_path, moment).splitlines()
    assert re.match(
        r"\S+/run(/metrics.jsonl)?: cannot be written: No space left on device; \S+/last is as it was",
        sentence,
    )
    assert int(step) == (moment - 1) // 3 * 3, "and nothing half-written is beside it"
    assert same == "True"


READ_ONLY = """
import subprocess, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from aufast.train import evaluate_runs, train
from tests.train.runs import MAKERS

packed, disk = map(Path, sys.argv[1:])
def remount(options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)
def refused(action):
    try:
        action()
    except OSError as error:
        print(error)
subprocess.run(["mount", "--bind", packed, packed], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", packed], check=True)
refused(lambda: (packed / "new").touch())
config = MAKERS["margl"](packed, epochs=1)
remount("ro")
refused(lambda: train(config, disk / "run"))
remount("rw")
assert train(config, disk / "run")
remount("ro")
refused(lambda: train(config, disk / "run", resume=True))
refused(lambda: evaluate_runs([disk / "run"]).save(disk / "run"))
"""


def test_read_only_places(packed, tmp_path):
    """Data may be read-only; a run's folder may not, and a table of it is computed before that is said."""
    data, new, old, table = run_on_disk("size=16m", tmp_path, READ_ONLY, packed, tmp_path).splitlines()
    assert data == f"[Errno 30] Read-only file system: '{packed}/new'"
    reason = f"{tmp_path}/run: cannot be written: Read-only file system"
    assert new == old == f"{reason}; nothing was begun"
    assert table == f"{reason}; the runs are as they were"


def test_a_run_in_a_thread_leaves_signals_alone(packed, tmp_path):
    """Only the main thread may take SIGTERM; schedulers that train in another one have their own way."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, MAKERS["margl"](packed, epochs=1), tmp_path / "run").result()


def test_a_place_that_cannot_be_written_is_named(packed, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/run: cannot be written: Not a directory; nothing was begun"):
        train(MAKERS["margl"](packed), tmp_path / "file" / "run")


def test_a_second_writer_is_refused(packed, tmp_path):
    config = MAKERS["margl"](packed, epochs=1)
    assert train(config, tmp_path / "run")
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="run: another process is training it"):
            train(config, tmp_path / "run", resume=True)


def test_a_folder_that_holds_something_is_refused(packed, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists; --resume goes on with it, or name a new folder"):
        train(MAKERS["margl"](packed), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_other_settings_are_refused_and_free_ones_are_not(packed, tmp_path):
    assert train(MAKERS["margl"](packed, epochs=1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"run: was begun with regions.batch 8, not 4"):
        train(MAKERS["margl"](packed, epochs=1, batch=4), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"was begun with (system|.*) "):
        train(MAKERS["aar"](packed, epochs=1), tmp_path / "run", resume=True)
    shutil.copytree(packed, tmp_path / "moved")
    assert train(MAKERS["margl"](tmp_path / "moved", epochs=1, log_every=9), tmp_path / "run", resume=True)


def test_other_data_are_refused(packed, tmp_path):
    """The same settings, but a training subject is no longer there."""
    assert train(MAKERS["margl"](packed, epochs=1), tmp_path / "run")
    trained = json.loads((tmp_path / "run" / "split.json").read_text())["train"]
    shutil.copytree(packed, tmp_path / "fewer")
    index = json.loads((packed / "index.json").read_text())
    index["videos"] = [video for video in index["videos"] if video["subject"] != trained[0]]
    (tmp_path / "fewer" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="run: was begun with other data: train differs from split.json"):
        train(MAKERS["margl"](tmp_path / "fewer", epochs=1), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "training.json", "SHA256SUMS"]
)
def test_a_damaged_checkpoint_is_refused_by_name(packed, tmp_path, name):
    config = MAKERS["margl"](packed, epochs=1)
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "last" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"last/(SHA256SUMS|model|optimizer|training)"):
        train(config, tmp_path / "run", resume=True)


def test_measurements_that_were_cut_short_are_refused(packed, tmp_path):
    config = MAKERS["margl"](packed, epochs=1)
    train(config, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(
        ValueError, match=r"metrics.jsonl: was cut short: the last checkpoint knows \d+ bytes"
    ):
        train(config, tmp_path / "run", resume=True)


def test_a_run_of_a_newer_version_is_refused(packed, tmp_path):
    config = MAKERS["margl"](packed, epochs=1)
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="written by a newer aufast"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"root": "nowhere"}}, "nowhere/index.json: no such file: not a packed data set"),
        (
            {"model": {"aus": (12, 25)}},
            r"labels AUs \(1, .*but the model is for \(12, 25\): AU 25 is missing",
        ),
        ({"data": {"part": 4}}, "test_part must be from 1 to 3, got 4"),
        ({"data": {"split": "groups"}}, "there is nothing to train on"),
        ({"data": {"crop": (36, 48)}}, "a crop of 48 pixels does not fit a face of 40"),
        ({"data": {"validation": "subjects", "validation_subjects": 4}}, "there are 4 training subjects"),
        ({"batch": 1000}, r"a step takes 1000 × 1 × 1 .* but there are 96 to train on"),
        ({"device": "tpu9"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu9'"),
        ({"initial": "nowhere"}, "nowhere/SHA256SUMS: no such file"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(packed, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(MAKERS["margl"](packed, **options), tmp_path / "run")


def test_tensorboard_that_is_not_there_is_named(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'aufast\[tensorboard\]'"):
        train(MAKERS["margl"](packed, tensorboard=True), tmp_path / "run")


def test_tensorboard_gets_the_same_numbers(packed, tmp_path):
    pytest.importorskip("tensorboard", reason="writes TensorBoard's files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(MAKERS["margl"](packed, epochs=1, tensorboard=True), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(line["step"], line["loss"]) for line in metrics(tmp_path / "run") if "loss" in line]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])


def test_tensorboard_of_a_run_that_went_on_has_every_step_once(packed, tmp_path, monkeypatch):
    """Steps after the last checkpoint were written down, and are done and written again."""
    pytest.importorskip("tensorboard", reason="writes TensorBoard's files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, inner = MAKERS["margl"](packed, epochs=1, tensorboard=True, save_every=3), Trainer._step

    def step(self, *a):
        if self.position.step == 5:
            raise KeyboardInterrupt
        return inner(self, *a)

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    assert last(tmp_path / "run")[2].step == 3
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [event.step for event in events.Scalars("loss")]
    assert found == [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, len(found) + 1))


def test_the_same_seed_is_the_same_run_with_any_number_of_loaders(packed, tmp_path):
    for loaders in (0, 2):
        train(MAKERS["margl"](packed, epochs=1, data={"loaders": loaders}), tmp_path / str(loaders))
    assert outcome(tmp_path / "0") == outcome(tmp_path / "2")
    train(MAKERS["margl"](packed, epochs=1, seed=1), tmp_path / "other")
    assert outcome(tmp_path / "other") != outcome(tmp_path / "0")
