"""Model folders: round trips, and every kind of damage refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from aufast.models import AAR, MARGL, load_model, pretrained
from tests.models.examples import EACH, inputs, randomize, small


@pytest.fixture
def folder(tmp_path):
    model = small("aar")
    randomize(model)
    model.trained_on = ("bp4d", "SYNTHETIC disfa")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def resign(folder):
    """Write sums that fit, so that what lies behind them is reached."""
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    for key, value in values.items():
        (config if key in config else config["config"])[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    resign(folder)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    resign(folder)


@pytest.mark.parametrize("name", EACH)
def test_round_trip(name, tmp_path):
    model = small(name)
    randomize(model)
    if name in ("margl", "maroi-intra", "aroi-intra"):
        model.set_adjacency(torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1]]))
    model.save_pretrained(tmp_path)
    batch = inputs(model)
    expected = model.eval()(*batch).probabilities
    for found in (load_model(tmp_path), type(model).from_pretrained(tmp_path)):
        assert type(found) is type(model)
        assert found.config == model.config
        assert not found.training
        assert all(p.requires_grad for p in found.parameters())
        state = found.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(found(*batch).probabilities, expected)


def test_what_it_was_trained_on_is_kept(folder, tmp_path):
    load_model(folder).save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again").trained_on == ("bp4d", "SYNTHETIC disfa")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_is_kept(dtype, tmp_path):
    small("margl").to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {dtype}


def test_saving_leaves_three_files_and_replaces_old_ones(folder):
    other = small("aar")
    other.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["SHA256SUMS", "config.json", "model.safetensors"]
    assert torch.equal(load_model(folder).head.weight, other.head.weight)


def test_channels_last_weights_can_be_saved(tmp_path):
    model = small("margl").to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path).backbone.conv1.weight, model.backbone.conv1.weight)


def test_killed_at_random_moments_a_save_leaves_one_model_or_is_refused(tmp_path):
    """A process that saves two models in turn over one another, until SIGKILL."""
    both = [small("aar"), small("aar")]
    for model in both:
        randomize(model)
    draw = random.Random(5)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            while True:
                for model in both:
                    model.save_pretrained(tmp_path / "model")
        time.sleep(draw.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        try:
            found = load_model(tmp_path / "model").state_dict()
        except ValueError as error:
            assert "cut short or changed: its SHA-256" in str(error) or "no such file" in str(error)
        else:
            whole = [all(torch.equal(found[k], v) for k, v in m.state_dict().items()) for m in both]
            assert any(whole)
    both[0].save_pretrained(tmp_path / "model")
    assert torch.equal(next(load_model(tmp_path / "model").parameters()), next(both[0].parameters()))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_a_killed_save_leaves_is_gone_after_the_next(at, folder, monkeypatch):
    """The kill comes while the first, the second or the last of the three files is forced to the disk."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1, at))
        monkeypatch.setattr(
            pretrained.os, "fsync", lambda _: next(calls, None) or os.kill(os.getpid(), signal.SIGKILL)
        )
        small("aar").save_pretrained(folder)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    names = ["SHA256SUMS", "config.json", "model.safetensors"]
    assert len(os.listdir(folder)) == 4
    small("aar").save_pretrained(folder)
    assert sorted(os.listdir(folder)) == names
    load_model(folder)


def test_training_goes_on_after_loading(folder):
    model = load_model(folder).train()
    model(*inputs(model)).logits.sum().backward()
    assert all(p.grad is not None for p in model.graph.parameters())


def test_an_interrupted_save_is_refused(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = os.replace

    def fail_on_sums(source, target):
        if str(target).endswith("SHA256SUMS"):
            raise OSError("disk full")
        replace(source, target)

    other = small("aar")
    other.trained_on = load_model(folder).trained_on  # so that config.json is the same
    monkeypatch.setattr(pretrained.os, "replace", fail_on_sums)
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == sorted(before)
    with pytest.raises(ValueError, match=r"model.safetensors: cut short or changed"):
        load_model(folder)


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_bit])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damage_is_named(folder, damage, name):
    damage(folder / name)
    with pytest.raises(ValueError, match=f"{name}: cut short or changed"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "SHA256SUMS"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file; a model folder holds"):
        load_model(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere/SHA256SUMS: no such file"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no sum for config.json"),
        (b"abc\n", "must hold lines of a SHA-256 and a file name"),
        (b"\xff\xfe", "must hold lines of a SHA-256 and a file name"),
    ],
    ids=["empty", "no-name", "not-text"],
)
def test_damaged_sums_are_named(folder, text, message):
    (folder / "SHA256SUMS").write_bytes(text)
    with pytest.raises(ValueError, match=f"SHA256SUMS: {message}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 4}, "config.json: aar: unknown config key 'widht'; did you mean width"),
        ({"format_version": 2}, "config.json: written in format 2, this aufast reads up to 1; update aufast"),
        ({"format_version": "1"}, "config.json: holds no format_version"),
        ({"model": "aarr"}, "config.json: unknown model 'aarr'; did you mean aar"),
        ({"model": None}, "config.json: holds no 'model'"),
        ({"config": []}, "config.json: holds no 'config'"),
        ({"trained_on": "bp4d"}, "config.json: 'trained_on' must be a list of names, got 'bp4d'"),
        ({"width": -1}, "config.json: AARConfig: width must be an integer of at least 1, got -1"),
        (
            {"aus": [1, 4]},
            r"model.safetensors: tensor 'frame.branches.conv1.weight' has shape \(72, 16, 3, 3\), "
            r"but config.json with its 2 AUs needs \(48, 16, 3, 3\)",
        ),
        ({"model": "aa"}, "model.safetensors: unknown tensor 'head.bias'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_named(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"], ids=["cut", "list", "binary"])
def test_a_config_that_is_no_object_is_named(folder, text):
    (folder / "config.json").write_text(text)
    resign(folder)
    with pytest.raises(ValueError, match="config.json: (not JSON|holds no format_version)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["head.weight"].fill_(float("nan")),
            "tensor 'head.weight' holds values that are not finite",
        ),
        (
            lambda t: t["relations.1.U"][0, 0].fill_(float("inf")),
            "tensor 'relations.1.U' holds values that are not finite",
        ),
        (lambda t: t.pop("relations.0.W_z"), "tensor 'relations.0.W_z' is missing"),
        (lambda t: t.update(more=torch.ones(1)), "unknown tensor 'more'"),
        (
            lambda t: t.update({"head.bias": torch.ones(3, dtype=torch.int64)}),
            "tensor 'head.bias' must be torch.float32, got torch.int64",
        ),
    ],
    ids=["nan", "inf", "missing", "unknown", "integer"],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
        load_model(folder)


class Explosive:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_refused_and_never_run(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Explosive(tmp_path / "exploded")))
    resign(folder)
    with pytest.raises(ValueError, match="model.safetensors: not a safetensors file"):
        load_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_the_other_class_says_what_to_use(folder):
    with pytest.raises(
        ValueError, match="holds the model 'aar', which is no MARGL; use aufast.models.load_model"
    ):
        MARGL.from_pretrained(folder)
    assert AAR.from_pretrained(str(folder)).name == "aar"
