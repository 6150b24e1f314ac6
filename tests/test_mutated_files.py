"""Every reader on files with changed bytes: the right kind of result, or one clear error, never a crash."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st

from aufast import data, faces, models
from aufast.data.landmarks import load_landmarks, write_landmarks
from aufast.data.matlab import read_fitted_points, read_matrix
from aufast.label import STATUSES, LabelConfig, Outcome
from aufast.label.given import GivenFaces
from aufast.label.run import _finished
from aufast.train.checkpoint import (
    Position,
    finish_links,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from aufast.train.loop import make_optimizer
from aufast.train.options import parse_run
from aufast.train.run import describe, read_config, read_split
from tests.data import trees
from tests.models.examples import small
from tests.strategies import examples, mutations
from tests.train import runs

pytestmark = pytest.mark.fuzz
# What a reader may raise: the files' fault, said in a sentence. Anything else is a fault of the reader.
SENTENCES = (ValueError, OSError)


def sum_up(folder: Path) -> None:
    """Fit the sums to a changed folder, as one who means harm would."""
    names = [path.name for path in sorted(folder.iterdir()) if path.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def model(folder: Path) -> None:
    small("aa-gsh").save_pretrained(folder)


def load_model(folder: Path) -> None:
    loaded = models.load_model(folder)
    assert all(value.isfinite().all() for value in loaded.state_dict().values() if value.is_floating_point())


def load_model_with_fitting_sums(folder: Path) -> None:
    sum_up(folder)
    load_model(folder)


def picture(name: str) -> Callable[[Path], None]:
    """Something to see, in the format of the name."""

    def make(folder: Path) -> None:
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 255, (19, 23, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)

    return make


def load_picture(folder: Path) -> None:
    (path,) = folder.iterdir()
    image = faces.load_image(path)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def points(folder: Path) -> None:
    write_landmarks(folder / "points.csv", np.arange(1, 5), np.repeat(trees.POINTS[None], 4, axis=0))


def load_points(folder: Path) -> None:
    found = load_landmarks(folder / "points.csv", np.arange(1, 6))
    assert found.shape == (5, 49, 2) and found.dtype == np.float64


def boxes(folder: Path) -> None:
    rows = [f"{frame},{face},{10 + frame},12,{60.5 + frame},70" for frame in range(1, 6) for face in (0, 1)]
    (folder / "boxes.csv").write_text("\n".join(["frame,face_id,x1,y1,x2,y2", *rows]) + "\n")


def load_boxes(folder: Path) -> None:
    given_faces = GivenFaces(folder / "boxes.csv")
    for index in range(6):
        assert all(len(face.box) == 4 for face in given_faces.of(index))


def bp4d(folder: Path) -> None:
    trees.bp4d(folder, {"F001_T1": {k: {12: k % 2} for k in range(1, 5)}})


def disfa(folder: Path) -> None:
    trees.disfa(folder, "SN001", 4, {12: {2: 3}})


def affwild2(folder: Path) -> None:
    rows = [",".join(map(str, [0, 1, -1] * 4)) for _ in range(4)]
    trees.affwild2(folder, "Train_Set", "a", rows, [1, 2, 3, 4])


def table(folder: Path) -> None:
    spec = {"name": "own", "table": "frames.csv", "labels": {"1": "AU01", "4": "AU04"}, "missing": [9]}
    spec["columns"] = {"image": "path", "subject": "who", "video": "clip", "frame": "frame"}
    rows = [f"a{k}.png,A,A1,{k},{k % 2},9" for k in range(1, 5)]
    (folder / "frames.csv").write_text("\n".join(["path,who,clip,frame,AU01,AU04", *rows]) + "\n")
    (folder / "spec.json").write_text(json.dumps(spec, indent=1))
    for k in range(1, 5):
        trees.save_image(folder / f"a{k}.png", k)


def check_videos(videos: list[data.Video]) -> None:
    for video in videos:
        assert video.labels.shape == video.mask.shape == (len(video.numbers), len(video.aus))
        assert np.isin(video.labels[video.mask], (0, 1)).all()


def packed(folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source"
    bp4d(source)
    data.prepare_dataset(source, folder, size=32)


def load_packed(folder: Path) -> None:
    dataset = data.PackedDataset(folder)
    for video in dataset.videos:
        arrays = (video.frames, video.landmarks, video.labels, video.mask, video.numbers)
        assert all(len(array) == len(video) for array in arrays)


def run(folder: Path) -> None:
    """A training run with a checkpoint of a model and the moments that Adam has of it."""
    config = runs.aar(folder / "data")
    (folder / "config.json").write_text(json.dumps(describe(config), indent=1))
    subjects = {"train": ["F001", "F002"], "validation": [], "test": ["M001"]}
    (folder / "split.json").write_text(json.dumps({"dataset": "bp4d", **subjects}))
    trained = models.create_model("aar", **{k: v for k, v in asdict(config.model).items() if k != "variant"})
    optimizer = make_optimizer(config.graph.optimizer, [*trained.parameters()])
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(folder, trained, optimizer_tensors(optimizer), Position(step=7, links=("last", "best")))


def load_run(folder: Path) -> None:
    """As `aufast train --resume` does."""
    config = read_config(folder)
    assert all(isinstance(name, str) for name in read_split(folder)["train"])
    finish_links(folder)
    loaded, moments, position = load_checkpoint(folder / "last")
    optimizer = make_optimizer(config.graph.optimizer, [*loaded.parameters()])
    restore_optimizer(optimizer, moments)
    assert isinstance(position.step, int)


def load_summed_run(folder: Path) -> None:
    sum_up(folder / "last")
    load_run(folder)


def settings(folder: Path) -> None:
    pytest.importorskip("jsonargparse", reason="reads the options")
    lines = "data:\n  part: 3\n  crop: [90, 100]\nseed: 5\nregions:\n  epochs: 7\n  optimizer: {lr: 0.2}\n"
    (folder / "mine.yaml").write_text(lines)


def load_settings(folder: Path) -> None:
    parser = argparse.ArgumentParser(prog="aufast train margl", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--out")
    config, _ = parse_run("margl", ["--config", str(folder / "mine.yaml"), "--out", "x"], parser)
    assert isinstance(config.seed, int) and isinstance(config.regions.optimizer.lr, float)


def imagenet(folder: Path) -> None:
    safetensors.torch.save_file(models.ResNet18(width=2).state_dict(), folder / "resnet18.safetensors")


def load_imagenet(folder: Path) -> None:
    models.ResNet18(width=2).load_imagenet(folder / "resnet18.safetensors")


def matlab(folder: Path) -> None:
    scipy.io.savemat(folder / "plain.mat", {"pts": np.arange(12.0).reshape(6, 2)})
    h5py = pytest.importorskip("h5py", reason="h5py is not installed; it reads MATLAB 7.3")
    with h5py.File(folder / "hdf5.mat", "w") as file:
        entries = [file.create_dataset(f"r/{k}", data=np.ones((2, 49)) * k) for k in range(3)]
        predicted = file.create_dataset("fit/pred", (3, 1), dtype=h5py.ref_dtype)
        for k, entry in enumerate(entries):
            predicted[k, 0] = entry.ref


def load_matlab(folder: Path) -> None:
    assert read_matrix(folder / "plain.mat", "pts").dtype == np.float64
    fitted = read_fitted_points(folder / "hdf5.mat")
    assert all(points is None or points.dtype == np.float64 for points in fitted)


def film(folder: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed; it reads videos")
    with av.open(str(folder / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        for k in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * k, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def load_film(folder: Path) -> None:
    """Frame by frame: what is missing is an error in its place."""
    nothing, frames = np.zeros((4, 1), np.int8), np.arange(4)
    where = {"movie": folder / "film.mp4", "positions": frames}
    video = data.Video("own", "A", "film", (12,), frames, nothing, nothing.astype(bool), **where)
    for frame in data.iterate_frames(video):
        if isinstance(frame, ValueError):
            raise frame
        assert frame.dtype == np.uint8 and frame.ndim == 3


def sidecar(folder: Path) -> None:
    """What a run of `aufast label` leaves beside a table, to know on the next run that it is done."""
    outcome = Outcome(frames={"expected": 3, "decoded": 3, "failed": 0}, with_face=3, faces=1)
    facts = {**asdict(outcome), "outputs": [], "config": asdict(LabelConfig(model="m"))}
    (folder / "a.json").write_text(json.dumps(facts))


def load_sidecar(folder: Path) -> None:
    outcome = _finished(folder / "a.json", LabelConfig(model="m"))
    if outcome is None:
        raise ValueError("labelled again")
    assert outcome.status in STATUSES and outcome.frames.keys() >= {"decoded", "failed"}
    assert isinstance(outcome.sentence, str) and isinstance(outcome.seconds.get("all", 0.0), float)


AFFWILD2 = "AU_Detection_Challenge/Train_Set/a.txt"
FOLDERS = {
    "model": (model, load_model, ("config.json", "model.safetensors", "SHA256SUMS")),
    "model, sums that fit": (model, load_model_with_fitting_sums, ("config.json", "model.safetensors")),
    "png": (picture("a.png"), load_picture, ("a.png",)),
    "jpeg": (picture("a.jpg"), load_picture, ("a.jpg",)),
    "gif": (picture("a.gif"), load_picture, ("a.gif",)),
    "bmp": (picture("a.bmp"), load_picture, ("a.bmp",)),
    "tiff": (picture("a.tiff"), load_picture, ("a.tiff",)),
    "webp": (picture("a.webp"), load_picture, ("a.webp",)),
    "landmarks": (points, load_points, ("points.csv",)),
    "boxes": (boxes, load_boxes, ("boxes.csv",)),
    "BP4D": (bp4d, lambda f: check_videos(data.read_bp4d(f)), ("AUCoding/AU_OCC/F001_T1.csv",)),
    "DISFA": (disfa, lambda f: check_videos(data.read_disfa(f)), ("ActionUnit_Labels/SN001/SN001_au12.txt",)),
    "Aff-Wild2": (affwild2, lambda f: check_videos(data.read_affwild2(f)), (AFFWILD2,)),
    "table": (table, lambda f: check_videos(data.read_table(f / "spec.json")), ("spec.json", "frames.csv")),
    "run": (run, load_run, ("config.json", "split.json", "last/training.json", "last/optimizer.safetensors")),
    "run, sums that fit": (run, load_summed_run, ("last/training.json", "last/optimizer.safetensors")),
    "settings": (settings, load_settings, ("mine.yaml",)),
    "ImageNet": (imagenet, load_imagenet, ("resnet18.safetensors",)),
    "MATLAB": (matlab, load_matlab, ("plain.mat", "hdf5.mat")),
    "film": (film, load_film, ("film.mp4",)),
    "sidecar": (sidecar, load_sidecar, ("a.json",)),
    "packed": (packed, load_packed, ("index.json", "videos/F001_T1/labels.npy", "videos/F001_T1/frames.npy")),
}  # fmt: skip
CASES = [(kind, name) for kind, (_, _, names) in FOLDERS.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {Path(name).name}" for kind, name in CASES])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_changed_bytes_end_in_a_result_or_a_sentence(kind: str, name: str, tmp_path: Path) -> None:
    make, read, _ = FOLDERS[kind]
    folder = tmp_path / "whole"
    folder.mkdir()
    make(folder)
    read(folder)  # the whole one is right
    whole = (folder / name).read_bytes()
    outcomes: dict[str, Any] = {"read": 0, "refused": 0}

    @examples(25)
    @given(mutations(whole))
    def check(changed: bytes) -> None:
        (folder / name).write_bytes(changed)
        try:
            read(folder)
            outcomes["read"] += 1
        except SENTENCES as error:
            outcomes["refused"] += 1
            assert str(error).strip(), error

    check()
    assert outcomes["refused"]


@examples(40)
@given(st.binary(max_size=400))
def test_bytes_that_are_no_file_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "noise"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    small_model = folder / "model"
    small_model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (small_model / name).write_bytes(content)
    sum_up(small_model)
    (folder / "a.jpg").write_bytes(content)
    (folder / "a.csv").write_bytes(content)
    for read in (
        lambda: models.load_model(small_model),
        lambda: faces.load_image(folder / "a.jpg"),
        lambda: load_landmarks(folder / "a.csv", np.arange(3)),
        lambda: GivenFaces(folder / "a.csv"),
    ):
        with pytest.raises(SENTENCES):
            read()


@pytest.mark.parametrize(
    ("old", "new"), [(b"'descr':", b"'descr'("), (b"(4, 12), }", b"(4, 12), {"), (b"(4, 12)", b"(9**9, 12)")]
)
def test_a_damaged_header_of_an_array_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    (tmp_path / "whole").mkdir()
    packed(tmp_path / "whole")
    path = tmp_path / "whole/videos/F001_T1/labels.npy"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=r"labels\.npy: missing, cut short or damaged"):
        load_packed(tmp_path / "whole")


def test_no_reader_unpickles(tmp_path: Path) -> None:
    """A pickle under the name of the weights is refused before anything in it runs."""
    small("aa-gsh").save_pretrained(tmp_path / "model")
    torch.save({"weights": torch.ones(1)}, tmp_path / "model" / "model.safetensors")
    sum_up(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        models.load_model(tmp_path / "model")
