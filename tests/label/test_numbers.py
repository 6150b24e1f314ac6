"""The numbers in the tables are the model's own, each face's and each video's apart."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aufast.faces import FaceDetector, align_face, au_centers, crop_face
from aufast.label import label_files
from aufast.models import AAR, load_model, to_input
from tests.label.clips import encode, face, moving
from tests.label.runs import config, given_faces, tables


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


def test_an_averaging_model_has_no_label_for_a_frame(tmp_path: Path) -> None:
    from tests.models.examples import small

    small("aa-gsp-tavg").save_pretrained(tmp_path / "model")
    Image.fromarray(face()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="aa-gsp-tavg averages over a whole clip"):
        label_files([str(tmp_path / "a.png")], tmp_path / "out", config(str(tmp_path / "model")))
